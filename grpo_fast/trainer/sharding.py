"""Training a model whose parameters an engine shards: FSDP2 through Accelerate, DeepSpeed's ZeRO.

Accelerate and DeepSpeed do the work. Here stands what they leave open for a run that samples from
the policy: what is refused, the reference in shards of its own, and weights that load elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import deepspeed as hf_deepspeed

from grpo_fast.checks import fail
from grpo_fast.engine.gathering import is_dtensor, is_zero3
from grpo_fast.models.head import innermost
from grpo_fast.models.sharding import full_state, is_sharded, plain_name, reshard, units

from .head_sharding import HeadSharding


@contextmanager
def loaded_whole(args: Any) -> Iterator[None]:
    """Inside, `from_pretrained` gives every rank the whole model.

    With a ZeRO-3 config transformers would partition it at once; the head and the packing could
    then not be checked, nor a reference copied.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed.set_hf_deepspeed_config(config)


def _asked(variable: str) -> bool:
    """What `accelerate launch` says by an environment variable."""
    return os.environ.get(variable, "false").lower() == "true"


class ShardedTrainer(Trainer):
    """Trainer under FSDP2 or DeepSpeed, or without either.

    Attributes:
        head_sharding: a head that stays split by the vocabulary; None: as the engine has it.
    """

    head_sharding: HeadSharding | None = None

    def check_engine(self) -> None:
        """Refuse an engine that would not shard, or not what this trainer needs; before any work.

        Raises:
            ValueError: naming the option.
        """
        args, accelerator = self.args, self.accelerator
        kind = accelerator.distributed_type.value
        plain = f"{kind}, under which every rank would hold all parameters"
        if args.deepspeed or _asked("ACCELERATE_USE_DEEPSPEED"):
            if not self.is_deepspeed_enabled or kind != "DEEPSPEED":
                fail("deepspeed", "processes that Accelerate gives to DeepSpeed", plain, _LAUNCH)
            self._check_deepspeed()
        if args.fsdp or _asked("ACCELERATE_USE_FSDP"):
            if not self.is_fsdp_enabled or kind != "FSDP":
                fail("fsdp", "a device and processes that Accelerate shards for", plain, _LAUNCH)
            self._check_fsdp()
        parallel = getattr(accelerator, "parallelism_config", None)
        for name in ("tp_size", "cp_size", "sp_size"):
            if getattr(parallel, name, 1) > 1:
                # cp drops the mask, so that packed sequences would see their neighbours
                fail("parallelism_config", f"{name} = 1", getattr(parallel, name))
        if any(is_dtensor(p) or is_zero3(p) for p in self.model.parameters()):
            hint = "give its name, or load it before the arguments are made"
            fail("model", "whole weights, which are sharded when training begins", "shards", hint)

    def _check_deepspeed(self) -> None:
        if getattr(self.args, "target_kl", None) is not None:
            hint = "DeepSpeed steps inside of backward, where no step can be dropped."
            fail("target_kl", "None under DeepSpeed", self.args.target_kl, hint)

    def _check_fsdp(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            fail("fsdp_config", "version 2", plugin.fsdp_version)
        if plugin.cpu_ram_efficient_loading:
            hint = "the other ranks would hold nothing when head and packing are checked."
            fail("fsdp_config", "cpu_ram_efficient_loading False", True, hint)
        for name, p in self.model.named_parameters():
            if type(p).__name__ == "Params4bit" and not p.is_floating_point():
                hint = f"{name} in {p.dtype} would stay whole on every rank."
                fail("model", "bnb_4bit_quant_storage of a float type under FSDP2", p.dtype, hint)
        policy = plugin.mixed_precision_policy
        if policy is not None:
            # Accelerate rounds what the model returns, here losses and log-probs, to bf16, in which
            # a log-prob of -5 has steps of 0.03; and it adds gradients up in bf16
            plugin.mixed_precision_policy = replace(
                policy, output_dtype=None, reduce_dtype=torch.float32
            )

    def shard_frozen(self, model: nn.Module) -> nn.Module:
        """A frozen copy of the policy, in shards as the policy will be where there is an engine."""
        if self.is_fsdp_enabled:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            if self.head_sharding is not None:
                self.head_sharding.split(model)
            return fsdp2_prepare_model(self.accelerator, model)
        if self.is_deepspeed_enabled:
            return self._frozen_engine(model)
        return model

    def _frozen_engine(self, model: nn.Module) -> nn.Module:
        import deepspeed

        theirs = self.accelerator.state.deepspeed_plugin.deepspeed_config
        zero = theirs.get("zero_optimization", {})
        zero = {k: v for k, v in zero.items() if v != "auto" and not k.startswith("offload_opt")}
        # below stage 3 nothing is partitioned but what an optimizer has
        stage = 3 if zero.get("stage") == 3 else 0
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {**zero, "stage": 3} if stage else {"stage": 0},
        }
        for name in ("bf16", "fp16"):
            # the policy's, so that equal weights have a KL of 0; "auto" is what the arguments say
            enabled = theirs.get(name, {}).get("enabled", False)
            said = getattr(self.args, name) if enabled == "auto" else enabled
            config[name] = {"enabled": bool(said)}
        engine = deepspeed.initialize(model=model, config=config)[0]
        engine.eval()
        return engine

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, on the shards: of a unit left whole it would get plain tensors, which
        nobody trains."""
        reshard(self.model)
        return super().create_optimizer(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.head_sharding is not None and not is_sharded(self.model):
            self.head_sharding.split(self.model)
        prepared = super()._prepare_for_training(*args, **kwargs)
        sharded = self.is_fsdp_enabled or self._zero_stage == 3
        if sharded and not is_sharded(self.model):
            raise RuntimeError("the engine left every parameter whole on every rank")
        return prepared

    @property
    def engine(self) -> str | None:
        """What shards, as far as a checkpoint depends on it; None for whole weights."""
        if self.is_fsdp_enabled:
            kind = "SHARDED" if self._sharded_checkpoints else "FULL"
            return f"FSDP2 {kind}_STATE_DICT"
        return f"ZeRO-{self._zero_stage}" if self.is_deepspeed_enabled else None

    @property
    def _zero_stage(self) -> int:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return 0 if plugin is None else plugin.zero_stage

    def check_prepared(self) -> None:
        """Refuse to evaluate a model that the engine has not got yet.

        Raises:
            ValueError: `evaluate` came before `train`.
        """
        engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if engine and self.model_wrapped is self.model and not units(self.model):
            hint = "set eval_on_start."
            fail("evaluate", "a call after train() under FSDP2 or DeepSpeed", "one before", hint)

    def on_every_rank(self, what: str, stage: Callable[[], Any]) -> Any:
        """`stage()`; when it raises on some rank, all ranks raise, and none waits for the others.

        Raises:
            RuntimeError: on the ranks on which it went well, naming the first on which it did not.
        """
        if self.accelerator.num_processes == 1:
            return stage()
        error, result = None, None
        try:
            result = stage()
        except Exception as raised:  # noqa: BLE001 (the boundary: it is raised again below)
            error = raised
        ranks = self.accelerator.num_processes
        rank = ranks if error is None else self.accelerator.process_index
        first = torch.tensor(rank, device=self.args.device)
        torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        if error is not None:
            raise error
        if int(first) < ranks:
            raise RuntimeError(f"{what} failed on rank {int(first)}, whose output has the error")
        return result

    def evenly(self, dataloader: Any) -> Iterator[tuple[list, bool]]:
        """The batches of evaluation, and whether each counts.

        Where an engine gathers, all ranks make the same forwards: one with fewer batches goes
        through its last one again, or through the first row where it has none, for nothing.
        """
        batches = len(dataloader)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            most = torch.tensor(batches, device=self.args.device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            batches = int(most)
        last = [dataloader.dataset[0]]
        for last in dataloader:
            batches -= 1
            yield last, True
        for _ in range(batches):
            yield last, False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model for `from_pretrained`, whatever shards it; every rank calls it.

        Only inside of a checkpoint with `state_dict_type="SHARDED_STATE_DICT"` are there none but
        the shards, for `accelerate merge-weights` or for a resumed run.
        """
        shards = _internal_call and self._sharded_checkpoints
        whole = (self.is_fsdp_enabled and not shards) or self._zero_stage == 3
        if not whole:
            super().save_model(output_dir, _internal_call)
            return
        state = _untied(self.model, full_state(self.model))
        self._save(self.args.output_dir if output_dir is None else output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @property
    def _sharded_checkpoints(self) -> bool:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is not None and "SHARDED" in str(plugin.state_dict_type)


_LAUNCH = "start it with accelerate launch or torchrun, a process for each GPU."


def _untied(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the second name of a tied weight, which `from_pretrained` ties again."""
    named: dict[str, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        named[plain_name(name)] = p
    first: dict[int, str] = {}
    for name, p in named.items():
        first.setdefault(id(p), name)
    doubled = {name for name, p in named.items() if first[id(p)] != name}
    tied = getattr(innermost(model).config.get_text_config(), "tie_word_embeddings", False)
    return {n: t for n, t in state.items() if not (tied and n in doubled)}
