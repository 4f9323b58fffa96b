"""`head_sharding="vocabulary"`: an lm_head that no rank ever holds whole while it trains.

FSDP2 gathers V x H of it in forward and reduces V x H of its gradient in backward. Here its rows
stay where they are and the hidden states travel: `grpo_fast/loss/vocabulary.py`. It moves less as
long as the tokens of a micro-batch over all ranks are fewer than V (`grpo-fast plan --ranks`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.checks import fail
from grpo_fast.loss.vocabulary import sharded_logprob, sharded_policy_loss
from grpo_fast.models.head import find_head, innermost
from grpo_fast.models.packing import PackedBatch
from grpo_fast.models.sharding import SPLIT

from .window import MicroBatch

_METRICS_OF_RANK = 0


class HeadSharding:
    """The lm_head of the policy, and of its reference, split over the data-parallel ranks.

    Args:
        trainer: what has the policy, the arguments and the accelerator.

    Raises:
        ValueError: a head, a loss or an engine for which it is not right; it is named.
    """

    def __init__(self, trainer: Any) -> None:
        args, self.accelerator = trainer.args, trainer.accelerator
        if not trainer.is_fsdp_enabled:
            fail("head_sharding", "None without FSDP2", args.head_sharding)
        if not trainer.loss_config.preset.window:
            kind = trainer.loss_config.loss_type
            hint = "it divides by the tokens of each rank's micro-batch."
            fail("head_sharding", f"None for loss_type {kind!r}", args.head_sharding, hint)
        if args.target_kl is not None:
            fail("target_kl", "None with head_sharding", args.target_kl)
        if (share := trainer.loss_config.top_entropy_quantile) < 1:
            hint = "the quantile would be that of all ranks' tokens."
            fail("top_entropy_quantile", "1 with head_sharding", share, hint)
        head = find_head(trainer.model)
        lm = innermost(trainer.model)
        if head.lora is not None or not isinstance(lm.get_output_embeddings(), nn.Linear):
            hint = "leave lm_head out of target_modules and modules_to_save."
            fail("head_sharding", "None with an adapter on the lm_head", args.head_sharding, hint)
        if head.weight is lm.get_input_embeddings().weight:
            hint = "the embedding is looked up in the whole of it."
            fail("head_sharding", "None with tied embeddings", args.head_sharding, hint)
        ranks = self.accelerator.num_processes
        if head.weight.shape[0] < ranks:
            fail("head_sharding", f"None with fewer than {ranks} words", args.head_sharding)
        self.mesh: Any = None

    def split(self, model: nn.Module) -> None:
        """Leave this rank's rows of the head, as DTensors over all ranks, outside of FSDP2."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        device = self.accelerator.device
        if self.mesh is None:
            self.mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        module = innermost(model).get_output_embeddings()
        for name, p in list(module.named_parameters()):
            rows = distribute_tensor(p.detach().to(device), self.mesh, [Shard(0)])
            setattr(module, name, nn.Parameter(rows, requires_grad=p.requires_grad))
        setattr(module, SPLIT, True)
        where = next(name for name, child in model.named_modules() if child is module)
        self.accelerator.state.fsdp_plugin.ignored_modules = re.escape(where)

    @property
    def group(self) -> Any:
        """The ranks that hold the rows."""
        return self.mesh.get_group()

    def logprobs(
        self, model: nn.Module, packed: PackedBatch, temperature: float, workspace: int | None
    ) -> Tensor:
        """Log-probs (N,) of this rank's completion tokens; every rank calls it."""

        def score(hidden: Tensor, head: Any) -> Tensor:
            return sharded_logprob(
                packed.select(hidden),
                head,
                packed.ids,
                group=self.group,
                temperature=temperature,
                workspace_bytes=workspace,
            ).logp

        return model(**packed.inputs(), head_fn=score)

    def loss(
        self, hidden: Tensor, head: Any, micro: MicroBatch, config: Any, workspace: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of all ranks' micro-batches, and their metrics, once: on the first rank."""
        packed, ranks = micro.packed, self.accelerator.num_processes
        denominator = micro.denominator
        loss, metrics = sharded_policy_loss(
            hidden,
            replace(head, tp_group=self.group),
            packed.ids,
            micro.advantages,
            group=self.group,
            cu_seqlens=packed.cu_seqlens,
            config=config,
            mask=micro.mask,
            old_logp=micro.old_logp,
            ref_logp=micro.ref_logp,
            rollout_logp=micro.rollout_logp,
            # a rank's own is divided by the number of ranks, for engines that average
            denominator=None if denominator is None else denominator * ranks,
            workspace_bytes=workspace,
        )
        if self.accelerator.process_index != _METRICS_OF_RANK:
            metrics = {name: torch.zeros_like(value) for name, value in metrics.items()}
        return loss, metrics
