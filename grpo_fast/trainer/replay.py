"""Replay: whole groups of earlier windows, trained on again beside the fresh ones.

    A window of P fresh groups gets n = round(share / (1 - share) * P) older ones, drawn without
    replacement with weights discount^age, age in windows.

A group keeps its advantages and the log-probs that it was sampled with, so that the importance
ratio of its tokens is pi / pi_then: Schaul et al., 2016, for the buffer; the clip of the loss and
`off_policy_mask_threshold` for what has become too unlikely. Groups without an advantage are not
kept: they carry no gradient.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_fast.rollout.rollouts import Rollouts

from .window import MicroBatch

if TYPE_CHECKING:
    from .scored import ScoredTrainer


@dataclass
class Group:
    """G completions of one prompt as they were sampled.

    Args:
        prompt: token ids.
        completions: G lists of token ids.
        advantages: (G,) float32.
        logp: (n,) float32, log-probs of the policy that sampled, n tokens in all.
        rollout_logp: (n,) float32 of the sampler, or None.
        mask: (n,) bool, or None.
        window: which window it is of.
    """

    prompt: list[int]
    completions: list[list[int]]
    advantages: Tensor
    logp: Tensor
    rollout_logp: Tensor | None
    mask: Tensor | None
    window: int

    def to(self, device: torch.device | str) -> Group:
        """The same group on another device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Group(**moved)


class GroupReplay:
    """The groups that a rank keeps, and the drawing; a part of a checkpoint."""

    def __init__(self, share: float, discount: float, size: int, seed: str) -> None:
        self.share, self.discount, self.size, self.seed = share, discount, size, seed
        self.reset()

    @classmethod
    def of(cls, args: Any) -> GroupReplay | None:
        """That of the arguments on this rank; None where they switch it off."""
        if not args.replay_share:
            return None
        seed = f"{args.seed}:replay:{args.process_index}"
        return cls(args.replay_share, args.replay_discount, args.replay_size, seed)

    def reset(self) -> None:
        """Forget everything."""
        self.groups: list[Group] = []
        self.window = 0

    def draw(self, fresh: int) -> list[Group]:
        """Older groups for a window of `fresh` ones; fewer where there are not so many."""
        wanted = round(self.share / (1 - self.share) * fresh)
        rng = random.Random(f"{self.seed}:{self.window}")
        weights = [self.discount ** (self.window - group.window) for group in self.groups]
        # Efraimidis and Spirakis, 2006: the largest of u^(1/w) are a draw without replacement
        keys = [rng.random() ** (1 / max(weight, 1e-9)) for weight in weights]
        order = sorted(range(len(keys)), key=lambda i: (-keys[i], i))
        return [self.groups[i] for i in sorted(order[:wanted])]

    def keep(self, groups: list[Group]) -> None:
        """End a window: keep what it sampled."""
        self.groups = [*self.groups, *groups][-self.size :]
        self.window += 1

    def state_dict(self) -> dict[str, Any]:
        """The groups, and the count of windows."""
        return {"window": self.window, "groups": [vars(group) for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.window = state["window"]
        self.groups = [Group(**group) for group in state["groups"]]


def mix(
    trainer: ScoredTrainer,
    replay: GroupReplay,
    micro_batches: list[MicroBatch],
    rollouts: Rollouts,
) -> list[MicroBatch]:
    """The micro-batches of a window with older groups spread over them, and the window kept.

    Args:
        trainer: whose settings, reference and metrics are used.
        replay: the groups of this rank.
        micro_batches: fresh ones, with old_logp.
        rollouts: what they were made of, in order.
    """
    size = trainer.args.num_generations
    fresh = len(rollouts.completion_ids) // size
    drawn, count = replay.draw(fresh), len(micro_batches)
    share = len(drawn) / (len(drawn) + fresh)
    trainer.metrics.add("replay/share", share)
    for group in drawn:
        trainer.metrics.add("replay/age", replay.window - group.window)
    kept = _groups(micro_batches, rollouts, size, replay.window)
    out, start = [], 0
    for index, micro in enumerate(micro_batches):
        sequences = len(micro.packed.cu_seqlens) - 1
        part = slice(start, start + sequences)
        start += sequences
        older = drawn[index * len(drawn) // count : (index + 1) * len(drawn) // count]
        out.append(_with(trainer, micro, rollouts, part, older) if older else micro)
    replay.keep(kept)
    return out


def _groups(micros: list[MicroBatch], rollouts: Rollouts, size: int, window: int) -> list[Group]:
    """The groups of a window that carry a gradient."""
    advantages = torch.cat([micro.advantages for micro in micros]).cpu()
    columns = {
        "old_logp": torch.cat([micro.old_logp for micro in micros]).cpu(),
        "rollout_logp": _joined(micros, "rollout_logp", lambda logp: logp),
        "mask": _joined(micros, "mask", _all),
    }
    lengths = torch.tensor([0, *map(len, rollouts.completion_ids)]).cumsum(0).tolist()
    groups = []
    for start in range(0, len(rollouts.completion_ids), size):
        own = slice(start, start + size)
        if not advantages[own].any():
            continue
        tokens = slice(lengths[start], lengths[start + size])
        cut = {name: None if c is None else c[tokens].clone() for name, c in columns.items()}
        groups.append(
            Group(
                rollouts.prompt_ids[start],
                rollouts.completion_ids[own],
                advantages[own].clone(),
                cut["old_logp"],
                cut["rollout_logp"],
                cut["mask"],
                window,
            )
        )
    return groups


def _all(logp: Tensor) -> Tensor:
    return torch.ones_like(logp, dtype=torch.bool)


def _joined(micros: list[MicroBatch], name: str, known: Any) -> Tensor | None:
    """(N,) of a whole window on the CPU, by `known` where one micro-batch says nothing."""
    columns = [getattr(micro, name) for micro in micros]
    if all(column is None for column in columns):
        return None
    pairs = zip(columns, micros, strict=True)
    return torch.cat([known(m.old_logp) if c is None else c for c, m in pairs]).cpu()


def _with(
    trainer: ScoredTrainer, micro: MicroBatch, rollouts: Rollouts, part: slice, older: list[Group]
) -> MicroBatch:
    """One micro-batch with older groups behind its own sequences."""
    device = trainer.args.device
    prompts = [group.prompt for group in older for _ in group.completions]
    completions = [ids for group in older for ids in group.completions]
    packed = trainer.packer.pack(
        [*rollouts.prompt_ids[part], *prompts],
        [*rollouts.completion_ids[part], *completions],
        device,
    )
    alone = trainer.packer.pack(prompts, completions, device)

    def behind(own: Tensor | None, theirs: list[Tensor | None], known: Any) -> Tensor | None:
        """Own and older tokens, by `known` where one of them says nothing."""
        if own is None and all(value is None for value in theirs):
            return None
        own = known(micro.old_logp) if own is None else own
        pairs = zip(theirs, older, strict=True)
        return torch.cat([own, *(known(g.logp) if v is None else v for v, g in pairs)])

    older = [group.to(device) for group in older]
    reference = None
    if micro.ref_logp is not None:
        theirs = trainer.reference.logprobs(lambda model: trainer._logprobs(model, alone))
        reference = torch.cat([micro.ref_logp, theirs])
    return replace(
        micro,
        packed=packed,
        advantages=torch.cat([micro.advantages, *(group.advantages for group in older)]),
        mask=behind(micro.mask, [group.mask for group in older], _all),
        old_logp=torch.cat([micro.old_logp, *(group.logp for group in older)]),
        ref_logp=reference,
        rollout_logp=behind(
            # where the sampler agreed, its log-probs are the old ones
            micro.rollout_logp,
            [group.rollout_logp for group in older],
            lambda logp: logp,
        ),
    )
