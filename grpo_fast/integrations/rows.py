"""What a loss knows of each token, for trainers that log more than its means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from grpo_fast import loss as _loss
from grpo_fast.batch import Batch
from grpo_fast.metrics import summarize
from grpo_fast.terms import Terms

FIELDS = ("logp", "entropy", "ratio", "kl")
_SEEN: ContextVar[dict[str, Tensor] | None] = ContextVar("grpo_fast_rows", default=None)


@contextmanager
def per_token() -> Iterator[dict[str, Tensor]]:
    """A dict that `linear_policy_loss` fills inside the block: `FIELDS`, each (N,), detached.

    ratio is at the level of the configuration, spread over the tokens, and kl is not multiplied by
    it. What stands at a masked token means nothing.
    """
    seen: dict[str, Tensor] = {}
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def _listening(terms: Terms, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    seen = _SEEN.get()
    if seen is not None:
        # without a mask the terms are those of the listed rows, in the order of the list
        index = batch.rows.unmasked_index if terms.mask is None else None
        for name in FIELDS:
            values = getattr(terms, name)
            if index is not None:
                fill = 1.0 if name == "ratio" else 0.0
                values = values.new_full((batch.rows.ids.numel(),), fill).index_copy(
                    0, index, values
                )
            seen[name] = values
    return summarize(terms, batch)


# `linear_policy_loss` has no argument for this; outside `per_token` nothing is different
_loss.summarize = _listening
