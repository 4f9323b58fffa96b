"""One rank of `test_sharded.py`: `python sharded_worker.py ENGINE JSON`, a list of keywords of
`train`, with the environment that torchrun gives. Engine: fsdp, deepspeed, none, or
posing: FSDP is asked for, and Accelerate left as it is.

On a CPU Accelerate trains DDP when it is asked for FSDP, and DeepSpeed sees one process: `pretend`
tells them otherwise, and every run asserts that its parameters are shards.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from ddp_worker import Canned, reward
from tiny_trainer import checkpoint, dataset, tokenizer, trainer
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from grpo_fast import GRPOTrainer
from grpo_fast.models.sharding import is_sharded, units


def pretend(engine: str) -> None:
    """Let Accelerate take gloo processes on a CPU for those of an accelerator."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if "WORLD_SIZE" not in os.environ or engine == "posing":
        return
    if engine == "deepspeed":
        import deepspeed

        # gloo alone: the operation over shared memory would be compiled first, for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        kind = ("gloo", DistributedType.MULTI_XPU)
        PartialState._prepare_backend = lambda *_, **__: kind
        return
    plain = PartialState.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = init
    AcceleratorState._reset_state()


class Sharded(TrainerCallback):
    """Asserts in every step that parameters are shards, and notes how many bytes are here."""

    def __init__(self, stage: int) -> None:
        self.stage, self.seen = stage, 0

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.stage == 3:
            assert all(hasattr(p, "ds_id") for p in model.parameters())
            assert all(p.numel() == 0 for p in model.parameters())
        elif self.stage == 0:
            from torch.distributed.tensor import DTensor

            assert units(model) and is_sharded(model)
            for name, p in model.named_parameters():
                assert isinstance(p, DTensor), name
                # an empty shard where a dimension is shorter than the ranks
                assert p.to_local().numel() < p.numel(), name
        self.seen += 1


class Empty(Canned):
    """The second half of a window, which is all of the second of two ranks, has no completion."""

    def generate(self, examples, count):
        """None where the place is in the second half."""
        found = super().generate(examples, count)
        half = self.args.generation_batch_size // 2
        for i in range(len(found.completion_ids)):
            if self.first + i >= half:
                found.completion_ids[i], found.truncated[i] = [], True
        return found


def failing(completions, trainer_state, **_):
    """Raises on the second rank, in the second window."""
    if os.environ.get("RANK") == "1" and trainer_state.global_step >= 2:
        raise ArithmeticError("this reward cannot count")
    return reward(completions, lambda *_: None)


FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}


def engine_arguments(engine: str, stage: int, fsdp: dict[str, Any]) -> dict[str, Any]:
    """What `GRPOConfig` is given beside the run itself."""
    if engine in ("fsdp", "posing"):
        return {"fsdp": True, "fsdp_config": {**FSDP, **fsdp}}
    if engine == "deepspeed":
        zero = {"stage": stage}
        if stage == 3:
            # the default of 1e5 would partition nothing of so small a model
            zero["stage3_param_persistence_threshold"] = 0
        config = {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        return {"deepspeed": config, "use_cpu": False}
    return {}


def policy_of(folder: Path, tied: bool, lora: bool) -> Any:
    """The tiny Qwen3 that every process loads from the same files."""
    place = folder.parent / ("tied" if tied else "untied")
    model = AutoModelForCausalLM.from_pretrained(place)
    if lora:
        import peft

        torch.manual_seed(5)
        names = ["q_proj", "v_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=4))
    return model


def write_models(folder: Path) -> None:
    """What `policy_of` loads."""
    for name, tied in (("tied", True), ("untied", False)):
        checkpoint(folder / name, tie_word_embeddings=tied)


def train(
    folder: str | Path,
    size: int,
    engine: str = "none",
    stage: int = 0,
    sampled: bool = False,
    tied: bool = False,
    lora: bool = False,
    fsdp: dict[str, Any] | None = None,
    resume: str | bool | None = None,
    die: int | None = None,
    kind: str = "",
    named: bool = False,
    replicas: int = 1,
    **overrides: Any,
) -> Any:
    """Four optimizer steps with `size` sequences on this rank, saved under `folder`/final.

    Args:
        kind: `empty`: a rank without completions; `failing`: a rank whose reward raises;
            `finished`: nothing is left to train.
        named: the trainer loads the model, with the engine's configuration in force.
        replicas: how many times FSDP2 holds the parameters (HSDP).
        die: the step at which the process ends, after its checkpoint.
    """
    settings = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
        "num_generations": 4,
        "num_iterations": 2,
        "optim": "sgd",
        "learning_rate": 0.3,
        "max_grad_norm": 0.5,
        "beta": 0.1,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_dataset": dataset(3),
        "train_dataset": dataset(6),
    }
    watch = Sharded(stage)
    callbacks = [watch] if engine != "none" and stage in (0, 3) else []
    if die is not None:
        callbacks.append(_Die(die))
    if replicas > 1:
        from accelerate.parallelism_config import ParallelismConfig

        shards = int(os.environ["WORLD_SIZE"]) // replicas
        sizes = {"dp_replicate_size": replicas, "dp_shard_size": shards}
        overrides["parallelism_config"] = ParallelismConfig(**sizes)
    given = {**settings, **engine_arguments(engine, stage, fsdp or {}), **overrides}
    run = trainer(
        str(folder),
        policy=str(Path(folder).parent / "untied")
        if named
        else policy_of(Path(folder), tied, lora),
        reward=failing if kind == "failing" else reward,
        cls=GRPOTrainer if sampled else Empty if kind == "empty" else Canned,
        callbacks=callbacks,
        processing_class=tokenizer(),
        **given,
    )
    run.train(resume)
    if callbacks and die is None and kind != "finished":
        assert watch.seen > 0
    run.save_model(f"{folder}/final")
    return run


class _Die(TrainerCallback):
    """Ends the process without a word after a checkpoint, as a scheduler does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            torch.distributed.barrier()
            os._exit(9)


def main(engine: str, runs: str) -> None:
    """Each of the runs, one after the other, in the same processes."""
    torch.set_num_threads(1)
    pretend(engine)
    from accelerate.state import AcceleratorState

    for keywords in json.loads(runs):
        AcceleratorState._reset_state()
        # the last run's, with which the model of the next one would be partitioned at once
        unset_hf_deepspeed_config()
        train(engine=engine, **keywords)


if __name__ == "__main__":
    main(*sys.argv[1:])
