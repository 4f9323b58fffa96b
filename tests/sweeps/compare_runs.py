"""Three short training runs on the CPU, and the same runs resumed from a checkpoint of another
checkout: logged curves, completions and final weights."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ARMS = {"full": 1, "lora": 1, "ranks": 2}
"""Name of a run -> its processes."""
STEPS, MIDDLE = 6, 3
# a window serves two optimizer steps, so the checkpoint of step 3 lies within one
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "num_generations": 4,
    "num_iterations": 2,
    "max_completion_length": 12,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": MIDDLE,
    "logging_steps": 1,
    "log_completions": True,
    "num_completions_to_print": 1,
    "mask_truncated_completions": True,
    "lr_scheduler_type": "cosine",
    "epsilon": 0.05,
    "disable_tqdm": True,
    "use_cpu": True,
    "report_to": "none",
    "seed": 3,
}
OWN: dict[str, dict[str, Any]] = {
    "full": {
        "learning_rate": 1e-2,
        "beta": 0.04,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "top_entropy_quantile": 0.8,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "lora": {
        "learning_rate": 3e-2,
        "beta": 0.02,
        "loss_type": "gspo",
        "mask_truncated_completions": False,
    },
    "ranks": {"learning_rate": 0.3, "loss_type": "grpo", "entropy_coef": 1e-3, "optim": "sgd"},
}
# ends of the logged names that hold a time
TIMED = ("time", "runtime", "per_second")
WORDS = [f"w{i}" for i in range(29)]
VOCAB = ["<pad>", "<eos>", "<unk>", *WORDS]


def tokenizer() -> Any:
    """One token for each of the words w0 ... w28, split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def model(arm: str, seed: int) -> Any:
    """A random Qwen3 of two layers, with logits spread so that completions end at uneven lengths.

    The run `ranks` has dropout, `full` an lm_head tied to the embedding.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=arm == "full",
        attention_dropout=0.2 if arm == "ranks" else 0.0,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config)


def dataset(rows: int) -> list[dict[str, Any]]:
    """Prompts of two to five words."""
    return [
        {"prompt": " ".join(WORDS[(i + j) % 29] for j in range(2 + i % 4)), "target": f"w{i % 5}"}
        for i in range(rows)
    ]


def reward(completions: list[str], target: list[str], **_: Any) -> list[float | None]:
    """Different for almost every two completions; the empty one cannot be judged."""
    numbers = [[int(word[1:]) for word in c.split() if word[1:].isdigit()] for c in completions]
    pairs = zip(numbers, target, strict=True)
    return [float((sum(n) + int(t[1:])) % 11) if n else None for n, t in pairs]


def build(arm: str, folder: Path, seed: int) -> Any:
    """The trainer of one run."""
    from grpo_fast import GRPOConfig, GRPOTrainer

    adapter = None
    if arm == "lora":
        from peft import LoraConfig

        adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    run = GRPOTrainer(
        model=model(arm, seed),
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **{**SETTINGS, **OWN[arm]}),
        train_dataset=dataset(6),
        eval_dataset=dataset(2) if arm == "full" else None,
        processing_class=tokenizer(),
        peft_config=adapter,
    )
    # to draw the curves takes longer than the steps; the name is not public
    for callback in list(run.callback_handler.callbacks):
        if type(callback).__name__ == "Curves":
            run.remove_callback(callback)
    return run


def train(arm: str, folder: Path, checkpoint: Path | None) -> None:
    """One process of a run: its curves, weights and completions go to folder/rank<r>.pt."""
    torch.set_num_threads(1)
    # a resumed run starts from other weights where the checkpoint has to bring them all
    other = checkpoint is not None and arm != "lora"
    run = build(arm, folder, seed=9 if other else 0)
    if checkpoint is not None:
        torch.manual_seed(77)
    run.train(str(checkpoint) if checkpoint else None)
    values = {f"weight/{n}": p.detach().clone() for n, p in run.model.state_dict().items()}
    for place, row in enumerate(run.state.log_history):
        kept = {k: v for k, v in row.items() if not k.endswith(TIMED)}
        # the loss of a resumed run is averaged over its own steps
        kept.pop("train_loss", None)
        values |= {f"log/{place:02d}/{key}": repr(value) for key, value in kept.items()}
    rank = run.accelerator.process_index
    if rank == 0:
        values |= _completions(folder)
    torch.save(values, folder / f"rank{rank}.pt")


def _completions(folder: Path) -> dict[str, str]:
    """Every row of every table of completions; a resumed run writes those of its own steps only."""
    import pyarrow.parquet as pq

    tables = sorted((folder / "completions").glob("*.parquet"))
    return {f"completions/{t.stem}": json.dumps(pq.read_table(t).to_pylist()) for t in tables}


def record(folder: Path, checkpoints: Path | None = None) -> int:
    """All runs, from the start or from the middle checkpoints of recorded runs; the number of runs
    that failed or that show nothing."""
    problems = []
    for arm in ARMS:
        own = folder / arm
        own.mkdir(parents=True, exist_ok=True)
        start = None if checkpoints is None else checkpoints / arm / f"checkpoint-{MIDDLE}"
        done = subprocess.run(_command(arm, own, start), capture_output=True, text=True)
        (own / "printed.txt").write_text(done.stdout + done.stderr)
        if done.returncode:
            problems.append(f"{arm}: " + "\n    ".join(done.stderr.strip().splitlines()[-12:]))
            continue
        problems += [f"{arm}: {text}" for text in _unrealistic(own)]
    print(f"{len(ARMS)} runs of {STEPS} steps", *problems, sep="\n  ")
    return len(problems)


def _command(arm: str, folder: Path, checkpoint: Path | None) -> list[str]:
    command = [sys.executable]
    if ARMS[arm] > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ARMS[arm])]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command += [os.path.abspath(__file__), arm, "--out", str(folder)]
    return command if checkpoint is None else [*command, "--from", str(checkpoint)]


def _unrealistic(folder: Path) -> list[str]:
    """What a run lacks, without which equal curves would show little."""
    logged = torch.load(folder / "rank0.pt", weights_only=True)

    def values(name: str) -> list[float]:
        found = [v for k, v in logged.items() if k.startswith("log/") and k.endswith(f"/{name}")]
        return [float(value) for value in found]

    problems = []
    if not any(0 < share < 1 for share in values("clip_ratio/region_mean")):
        problems.append("no step has clipped and unclipped tokens")
    if len(set(values("reward"))) < 3:
        problems.append("the reward hardly changes")
    if not all(norm > 0 for norm in values("grad_norm")):
        problems.append("a step has no gradient")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description="One process of one run.")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", type=Path, dest="checkpoint")
    options = parser.parse_args()
    train(options.arm, options.out, options.checkpoint)


if __name__ == "__main__":
    main()
