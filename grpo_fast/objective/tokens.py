"""What a call gives of each token, and what only the other calls of its step know."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Everything shaped like ids, (B, T) or packed (N,). What is masked may hold anything.

    A tensor per token that a new loss needs is a field here, and a line where it is used.
    """

    ids: Tensor
    """Sampled tokens, in [0, V) where unmasked."""
    advantages: Tensor | None = None
    """Also (B,), or (S,) of a packed batch; the losses need them."""
    mask: Tensor | None = None
    """Non-zero where a token counts."""
    cu_seqlens: Tensor | None = None
    """(S+1,) boundaries of a packed batch."""
    old_logp: Tensor | None = None
    """Log-probs of the policy that sampled (nats); None: on-policy, ratio 1."""
    ref_logp: Tensor | None = None
    """Log-probs of the reference (nats)."""
    rollout_logp: Tensor | None = None
    """Log-probs that the rollout engine gave (nats; NaN where it gave none)."""
    temperature: Tensor | float | None = None
    """Also (B,); None: the configuration's."""


@dataclass(frozen=True)
class Totals:
    """What only other micro-batches and ranks know."""

    denominator: Tensor | float | int | None = None
    """The count that the loss divides by; None: this call's."""
    entropy_threshold: Tensor | float | None = None
    """Nats, in place of the quantile of this call's own entropies."""
