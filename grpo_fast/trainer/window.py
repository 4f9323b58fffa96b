"""What is trained on: micro-batches, and the window of them that one generation fills."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from grpo_fast.checks import fail
from grpo_fast.models.packing import PackedBatch
from grpo_fast.rollout.rollouts import Rollouts

_PACKED = tuple(f.name for f in fields(PackedBatch))
# belongs to an optimizer step, and is made anew for each
_TRANSIENT = ("packed", "denominator")


@dataclass
class MicroBatch:
    """S sequences with N completion tokens in all: what one forward and one loss are made of.

    A trainer that needs more of them is given a subclass, by `RolloutTrainer.micro_batch`, whose
    further fields have defaults. They are tensors, None or what JSON can write, and are saved,
    loaded and moved with the others.

    Args:
        packed: the sequences, as the model reads them.
        advantages: (S,) or (N,), float32.
        mask: (N,) bool, the tokens that count; None: all.
        old_logp: (N,) float32, log-probs of the policy when the window was made, in nats. None
            when every use of the window falls in the optimizer step that sampled it: the policy is
            then its own old policy.
        ref_logp: (N,) float32, log-probs of the reference policy, in nats.
        rollout_logp: (N,) float32, log-probs that the sampler gave, in nats.
        values: (N,) float32, what a critic expects; for PPO.
        returns: (N,) float32, what the critic is taught; for PPO.
        denominator: 0-d, what the loss divides by; set for each optimizer step.
        count: 0-d int64, what the micro-batch adds to denominators where completions without a
            gradient were left out of it; None: what the others add.
    """

    packed: PackedBatch
    advantages: Tensor
    mask: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    rollout_logp: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    denominator: Tensor | None = None
    count: Tensor | None = None

    @property
    def trained(self) -> Tensor:
        """(N,) bool, the tokens that count."""
        if self.mask is not None:
            return self.mask
        return torch.ones_like(self.packed.ids, dtype=torch.bool)

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: v.to(device) for name, v in moved.items() if hasattr(v, "to")}
        return replace(self, **moved)

    def state_dict(self) -> dict[str, Any]:
        """All fields but the denominator, those of `packed` beside the others."""
        own = [f.name for f in fields(self) if f.name not in _TRANSIENT]
        return {
            **{name: getattr(self.packed, name) for name in _PACKED},
            **{name: getattr(self, name) for name in own},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> MicroBatch:
        """What `state_dict` returned; a field it lacks, being older, has its default.

        Raises:
            ValueError: the state has a field that this class lacks.
        """
        known = [f.name for f in fields(cls) if f.name not in _TRANSIENT]
        foreign = [name for name in state if name not in (*_PACKED, *known)]
        if foreign:
            hint = "resume with the trainer that wrote it"
            fail("resume_from_checkpoint", f"micro-batches of {cls.__name__}", foreign, hint)
        packed = PackedBatch(**{name: state[name] for name in _PACKED if name in state})
        return cls(packed=packed, **{name: state[name] for name in known if name in state})

    # Trainer counts tokens and operations of `inputs["input_ids"]`: its batches are mappings

    def __contains__(self, name: str) -> bool:
        return name == "input_ids"

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self.packed.input_ids


class Window:
    """The micro-batches of one generation, served in turn until each was used often enough.

    Args:
        kind: class of the micro-batches.
        size: micro-batches of a window.
        uses: micro-steps that a window serves, a multiple of `size`.
        device: where loaded micro-batches go.
    """

    def __init__(
        self, kind: type[MicroBatch], size: int, uses: int, device: torch.device | str
    ) -> None:
        self.kind, self.size, self.uses, self.device = kind, size, uses, device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.micro_batches: list[MicroBatch] = []
        self.served = 0

    @property
    def spent(self) -> bool:
        """True when the next micro-step needs a new generation."""
        return self.served % self.uses == 0

    def fill(self, micro_batches: list[MicroBatch]) -> None:
        """Begin a new generation."""
        self.micro_batches = micro_batches

    def next(self) -> MicroBatch:
        """The micro-batch of the next micro-step."""
        micro = self.micro_batches[self.served % self.uses % self.size]
        self.served += 1
        return micro

    def state_dict(self) -> dict[str, Any]:
        """The count of micro-steps, and the micro-batches when some are still to be served."""
        unfinished = [] if self.spent else self.micro_batches
        return {
            "served": self.served,
            "micro_batches": [micro.state_dict() for micro in unfinished],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.served = state["served"]
        loaded = [self.kind.from_state_dict(micro) for micro in state["micro_batches"]]
        self.micro_batches = [micro.to(self.device) for micro in loaded]


def mask_of(rollouts: Rollouts, part: slice, packed: PackedBatch, whole: bool) -> Tensor | None:
    """(N,) bool: written by the policy, and with `whole` in a completion that ended; None: all."""
    device = packed.ids.device
    mask = flat(rollouts.mask, part, torch.bool, device)
    if whole and any(rollouts.truncated[part]):
        kept = ~torch.tensor(rollouts.truncated[part], device=device)
        kept = kept.repeat_interleave(packed.cu_seqlens.diff())
        mask = kept if mask is None else mask & kept
    return mask


def flat(
    values: list[list[Any]] | None, part: slice, dtype: torch.dtype, device: torch.device | str
) -> Tensor | None:
    """One number for each completion token of a micro-batch, (N,)."""
    if values is None:
        return None
    return torch.tensor([v for row in values[part] for v in row], dtype=dtype, device=device)
