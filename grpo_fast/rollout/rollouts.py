"""What a sampler is, and what it returns: prompts and their completions as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from grpo_fast.checks import fail


@dataclass
class Rollouts:
    """P prompts with G completions each, prompt after prompt.

    Args:
        prompt_ids: P * G prompts, without padding.
        completion_ids: P * G completions: the EOS token included when it was sampled, and nothing
            after it.
        truncated: P * G flags, True where no EOS was sampled.
        logp: log-prob of each completion token under the sampler, nats at the sampling
            temperature; None where the sampler does not say.
        mask: whether the policy wrote each completion token; the others (a tool's answer, an
            environment's turn) are read and neither trained nor counted. None: it wrote all.
        version: optimizer steps that the weights which sampled had behind them; None: the
            trainer's own count.
        extras: {name: P * G values} of what an environment found out; rewards get them beside the
            dataset's columns.

    Raises:
        ValueError: lists of unequal lengths.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    truncated: list[bool]
    logp: list[list[float]] | None = None
    mask: list[list[bool]] | None = None
    version: int | None = None
    extras: dict[str, list[Any]] | None = None

    def __post_init__(self) -> None:
        count = len(self.completion_ids)
        for name in ("prompt_ids", "truncated", "logp", "mask"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                fail(name, f"{count} entries, one for each completion", len(value))
        for name in ("logp", "mask"):
            for row, value in enumerate(getattr(self, name) or ()):
                length = len(self.completion_ids[row])
                if len(value) != length:
                    fail(f"{name}[{row}]", f"{length} entries, one for each token", len(value))
        for name, value in (self.extras or {}).items():
            if not isinstance(value, (list, tuple)) or len(value) != count:
                got = len(value) if isinstance(value, (list, tuple)) else type(value).__name__
                fail(f"extras[{name!r}]", f"{count} values, one for each completion", got)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion that the policy wrote."""
        if self.mask is None:
            return [len(ids) for ids in self.completion_ids]
        return [sum(map(bool, row)) for row in self.mask]


def joined(parts: list[Rollouts]) -> Rollouts:
    """Several rollouts as one, in order; what one of them does not have, none has."""

    def all_of(name: str) -> list | None:
        values = [getattr(part, name) for part in parts]
        return None if any(v is None for v in values) else [x for v in values for x in v]

    names = ("prompt_ids", "completion_ids", "truncated", "logp", "mask")
    return Rollouts(*(all_of(name) for name in names), version=parts[0].version)


@runtime_checkable
class Sampler(Protocol):
    """Where completions come from: the policy itself, or an engine with a copy of its weights."""

    def sample(self, prompts: list[list[int]], num_generations: int) -> Rollouts:
        """`num_generations` completions of each prompt, given as token ids, in order."""
        ...

    def sync(self, model: nn.Module) -> None:
        """Take the weights of the policy; every rank calls it when they may have changed."""
        ...
