"""One step on this machine: what it holds, phase by phase, beside what was planned.

A process of its own trains a model of random weights of the same shape for two steps of
`GRPOTrainer` on random prompts, and reads its peak in each phase: on the CPU the resident memory
(Linux keeps a high-water mark that can be reset), on CUDA that of torch's allocator. What the
interpreter and its libraries take before the model is there is subtracted.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_fast.checks import fail
from grpo_fast.plan.architecture import Architecture
from grpo_fast.plan.setup import Setup

# glibc raises its threshold as it goes, and then keeps what is freed; fixed, tensors come and go
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}


def measure(architecture: Architecture, setup: Setup, timeout: float = 3600) -> dict[str, int]:
    """Peak bytes of rank 0 above the interpreter, by phase.

    Args:
        architecture: the model; its weights are not read.
        setup: as planned. Ranks are processes of this machine, without sharding.
        timeout: seconds.

    Raises:
        ValueError: a setup that this machine cannot run.
        RuntimeError: the run failed, with the end of what it printed.
    """
    if setup.sharding != "none":
        hint = "measure the run itself, by torch.cuda.max_memory_allocated()."
        fail("--measure", "no sharding, which is not started from here", setup.sharding, hint)
    if setup.critic != "none":
        fail("--measure", "no critic", setup.critic, "only GRPOTrainer is run.")
    with tempfile.TemporaryDirectory() as folder:
        job = {"folder": folder, "setup": asdict(setup), "config": architecture.config.to_dict()}
        Path(folder, "job.json").write_text(json.dumps(job, default=str))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        ranks = [_start(folder, rank, setup.ranks, port) for rank in range(setup.ranks)]
        try:
            printed = [process.communicate(timeout=timeout)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(process.returncode for process in ranks):
            raise RuntimeError("--measure: the run failed:\n" + "\n".join(printed)[-3000:])
        return json.loads(Path(folder, "peaks.json").read_text())


def _start(folder: str, rank: int, ranks: int, port: str) -> subprocess.Popen:
    env = {**os.environ, **_ENVIRONMENT}
    if ranks > 1:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(ranks)}
    return subprocess.Popen(
        [sys.executable, "-m", "grpo_fast.cli.measure", folder],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class _Peak:
    """Peak memory since the last call of `reset`, above a baseline."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.base = 0 if self.cuda else self._status("VmRSS")

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024

    def reset(self) -> None:
        """Forget what was."""
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Bytes."""
        if self.cuda:
            return self.cuda.max_memory_allocated()
        return self._status("VmHWM") - self.base


def _warm_up() -> None:
    """Start the libraries' threads and pools, so that the baseline has them."""
    import torch

    a = torch.randn(256, 256, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        (a.to(dtype) @ a.to(dtype)).sum().backward()
    torch.nn.functional.scaled_dot_product_attention(*(torch.randn(1, 2, 64, 16),) * 3)


def _model(config: Any, setup: Setup, folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setup.weights]
    torch.manual_seed(0)
    if setup.method != "qlora":
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    from grpo_fast.models.quantized import quantization_config

    rank = os.environ.get("RANK", "0")
    path = Path(folder, f"weights{rank}")
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    options = {"quantization_config": quantization_config("nf4", dtype), "dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    # what stays fp32 lies in the mapped file, whose pages would all count while one is held
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    return model


def _tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def _reward(completions: list[str], **_: Any) -> list[float]:
    """Different for almost every two completions, so that every token has a gradient."""
    return [float(sum(map(ord, text)) % 97) for text in completions]


def _arguments(setup: Setup, folder: str) -> dict[str, Any]:
    """Fields of `GRPOConfig` that run this setup."""
    names = {"adamw": {}, "sgd": {"optim": "sgd"}}
    optimizer = names.get(setup.optimizer, {"optim": setup.optimizer.replace("adamw", "adamw_bnb")})
    if setup.optimizer == "paged_adamw_8bit":
        optimizer = {"optim": "paged_adamw_8bit"}
    checkpointing = {"use_reentrant": False, **({"offload": True} if setup.offload else {})}
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setup.batch,
        "gradient_accumulation_steps": setup.accumulation,
        "steps_per_generation": max(setup.accumulation, setup.at_once // setup.batch),
        "sampling_batch_size": setup.at_once,
        "num_generations": setup.generations,
        "max_completion_length": setup.completion,
        "generation_kwargs": {"min_new_tokens": setup.completion},
        "gradient_checkpointing": setup.checkpointing,
        "gradient_checkpointing_kwargs": checkpointing if setup.checkpointing else None,
        "mlp_tile": setup.tile,
        "workspace_bytes": setup.workspace_bytes,
        "beta": setup.beta,
        "bf16": setup.autocast,
        "use_cpu": setup.device == "cpu",
        "learning_rate": 1e-4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        **optimizer,
    }


def _worker(folder: str) -> None:
    import torch
    from transformers import AutoConfig

    from grpo_fast.trainer.config import GRPOConfig
    from grpo_fast.trainer.curves import Curves
    from grpo_fast.trainer.grpo import GRPOTrainer

    job = json.loads(Path(folder, "job.json").read_text())
    setup = Setup(**job["setup"])
    kind = job["config"].pop("model_type")
    config = AutoConfig.for_model(kind, **job["config"])
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, None
    adapter = None
    if setup.adapter:
        from peft import LoraConfig

        adapter = LoraConfig(r=setup.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if setup.method == "qlora":
        # what a library takes is no memory of the model
        import bitsandbytes  # noqa: F401
    tokenizer = _tokenizer(config.vocab_size)
    _warm_up()
    peak, peaks = _Peak(), {}

    class Watched(GRPOTrainer):
        """Notes the peak of each phase, of the last step."""

        def generate(self, *args: Any) -> Any:
            peak.reset()
            out = super().generate(*args)
            peaks["sampling"] = peak.read()
            return out

        def batch(self, *args: Any, **kwargs: Any) -> Any:
            peak.reset()
            out = super().batch(*args, **kwargs)
            peaks["scoring"] = peak.read()
            peak.reset()
            return out

    words = [f"w{2 + (7 * i) % (config.vocab_size - 2)}" for i in range(setup.prompt)]
    rows = [{"prompt": " ".join(words[i:] + words[:i])} for i in range(8)]
    arguments = _arguments(setup, folder)
    if "share_prompts" in GRPOConfig.__dataclass_fields__:
        arguments["share_prompts"] = setup.share_prompts
    run = Watched(
        _model(config, setup, folder),
        _reward,
        GRPOConfig(**arguments),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    run.remove_callback(Curves)
    torch.manual_seed(0)
    run.train()
    peaks["training"] = peak.read()
    peaks["step"] = max(peaks.values())
    if run.is_world_process_zero():
        Path(folder, "peaks.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    _worker(sys.argv[1])
