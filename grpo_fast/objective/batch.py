"""One call of a loss without its vocabulary-sized tensors: checked, flattened to (N,), 0 where
masked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fast import checks
from grpo_fast.config import LossConfig
from grpo_fast.presets import LEVELS
from grpo_fast.rows import Rows, boundaries_on, check_temperature, flat_mask, flatten, per_token

from . import objectives
from .corrections import corrected, correction_stage, rollout_bounds
from .tokens import Tokens, Totals
from .weights import boundaries, sequence_sum, spread, token_weights


@dataclass(frozen=True)
class Batch:
    """Everything of a call that is not vocabulary-sized, flattened to (N,), 0 where masked."""

    rows: Rows
    bounds: Tensor | None
    """(S+1,) int64 sequence boundaries; None when nothing needs them."""
    advantages: Tensor
    """With the rollout correction in them where it is known beforehand."""
    weights: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    rollout_logp: Tensor | None
    """NaN where the rollout has none; None also where nothing is left to be done with it."""
    rollout_gap: Tensor | None
    """log p(old) / p(rollout) where both are known beforehand."""
    inv_temperature: Tensor | None
    """1 / temperature of each token; None when it is one number."""
    entropy_threshold: Tensor | None
    """0-d: given from outside; None for this call's own quantile."""
    config: LossConfig

    def listed(self, index: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """The per-token tensors of the rows in index, in the order of index."""
        fields = {
            "advantages": self.advantages,
            "weights": self.weights,
            "old_logp": self.old_logp,
            "ref_logp": self.ref_logp,
            "rollout_logp": self.rollout_logp,
        }
        if index is not None:
            fields = {k: None if v is None else v[index] for k, v in fields.items()}
        return {k: None if v is None else v.to(dtype) for k, v in fields.items()}

    def part(self, index: Tensor, bounds: Tensor) -> Batch:
        """The batch of the rows in index, whole sequences of which bounds (S'+1,) are the ends."""
        fields = self.listed(index, self.advantages.dtype)
        n = index.numel()
        rows = Rows(self.rows.ids[index], self.rows.mask[index], index, n, n, n)
        return replace(self, rows=rows, bounds=bounds, rollout_gap=None, **fields)

    @property
    def per_sequence(self) -> bool:
        """True when a token's derivative needs the log-probs of its whole sequence."""
        return needs_sequences(self.config, self.rollout_logp is not None)

    @property
    def per_batch(self) -> bool:
        """True when a token's derivative needs the entropies of the whole batch."""
        return self.config.top_entropy_quantile < 1.0

    @property
    def known(self) -> bool:
        """True when no derivative needs a log-prob: the ratio is 1, and nothing else asks."""
        on_policy = self.old_logp is None and self.rollout_logp is None
        return on_policy and self.ref_logp is None and not self.per_batch


def needs_sequences(config: LossConfig, has_rollout: bool) -> bool:
    """True when a token's derivative needs the log-probs of its whole sequence."""
    by_sequence = has_rollout and not config.rollout_correction.startswith("token")
    masked = config.off_policy_mask_threshold is not None
    return LEVELS[config.level].of_sequence or by_sequence or masked


def rollout_arguments(batch: Batch, rollout_logp: Tensor | None) -> dict[str, object]:
    """The arguments of the policy row function for a correction that the pass itself applies."""
    if rollout_logp is None:
        return {}
    return {
        "rollout_logp": rollout_logp,
        "rollout_weight": objectives.rollout_weight,
        "rollout_bounds": rollout_bounds(batch.config),
        "rollout_mask": batch.config.rollout_correction.endswith("mask"),
    }


def prepare(
    shape: tuple[int, ...],
    V: int,
    device: torch.device,
    tokens: Tokens,
    config: LossConfig,
    totals: Totals,
    *,
    skip_inactive_forward: bool = False,
    max_rows: int | None = None,
    has_ref: bool = False,
) -> Batch:
    """Check everything beside the head or the logits, and flatten it.

    Waits for the device once; with max_rows not at all.

    Args:
        shape: (B, T) or (N,), the leading shape of hidden states or logits.
        has_ref: the log-probs of the reference are computed by the call itself.
    """
    cu_seqlens, denominator = tokens.cu_seqlens, totals.denominator
    if not isinstance(config, LossConfig):
        checks.fail("config", "a LossConfig", checks.describe(config))
    checks.check_cu_seqlens(cu_seqlens, shape, device)
    _check_options(config, skip_inactive_forward, max_rows, shape)
    by_sequence = needs_sequences(config, tokens.rollout_logp is not None)
    needs_bounds = by_sequence or config.weights == "sequence_mean"
    needs_count = config.weights != "token_mean" and denominator is None
    if len(shape) == 1 and cu_seqlens is None and (needs_bounds or needs_count):
        what = f"(S+1,) boundaries for {config.loss_type} on packed (N,) input"
        checks.fail("cu_seqlens", what, None)
    cut, valid = boundaries_on(device, cu_seqlens, shape)
    token_advantages = _advantages(tokens.advantages, shape, device, cut)
    _check_denominator(denominator)
    if config.beta > 0 and tokens.ref_logp is None and not has_ref:
        checks.fail("ref_logp", f"reference log-probs {shape}, since beta = {config.beta}", None)
    bounds = None
    if len(shape) == 2 or cu_seqlens is not None:
        bounds = boundaries(token_advantages.view(shape), cut)
    flat = flat_mask(tokens.mask, shape, device)
    # what is not finite in a masked place is no number to compute with, and a masked rollout
    # log-prob is one that is missing
    fields = {
        "old_logp": per_token("old_logp", tokens.old_logp, shape, flat),
        "ref_logp": per_token("ref_logp", tokens.ref_logp, shape, flat),
        "rollout_logp": per_token("rollout_logp", tokens.rollout_logp, shape, flat, torch.nan),
        "rollout_gap": None,
        "inv_temperature": _temperatures(tokens.temperature, shape, flat),
    }
    token_advantages = torch.where(flat, token_advantages, torch.zeros_like(token_advantages))
    if fields["old_logp"] is not None and fields["rollout_logp"] is not None:
        token_advantages, fields = _correct(config, token_advantages, fields, flat, bounds)
    useful = _useful(config, token_advantages, bounds, by_sequence)
    rows = flatten(
        tokens.ids,
        flat,
        V,
        shape,
        useful=useful,
        skip=skip_inactive_forward,
        bounds=bounds if by_sequence else None,
        max_rows=max_rows,
        valid=valid,
        cu_seqlens=cu_seqlens,
    )
    return Batch(
        rows,
        bounds,
        token_advantages,
        token_weights(config, flat, bounds, denominator, token_advantages.dtype),
        entropy_threshold=_threshold(config, totals.entropy_threshold, device),
        config=config,
        **fields,
    )


def _temperatures(
    temperature: Tensor | None, shape: tuple[int, ...], mask: Tensor
) -> Tensor | None:
    """1 / temperature (N,); the one number for all is the configuration's."""
    if temperature is None:
        return None
    if not isinstance(temperature, Tensor):
        expected = f"a tensor {shape[:1]} or {shape} (one number goes into config.temperature)"
        checks.fail("temperature", expected, checks.describe(temperature))
    return check_temperature(temperature, shape, mask)[1]


def _check_options(
    config: LossConfig, skip: bool, max_rows: int | None, shape: tuple[int, ...]
) -> None:
    if not isinstance(skip, bool):
        checks.fail("skip_inactive_forward", "True or False", repr(skip))
    if skip and config.top_entropy_quantile < 1.0:
        expected = "False with top_entropy_quantile, whose quantile is one of all tokens"
        checks.fail("skip_inactive_forward", expected, True)
    if max_rows is None:
        return
    total = 1
    for n in shape:
        total *= n
    good = isinstance(max_rows, int) and not isinstance(max_rows, bool)
    if not good or not 1 <= max_rows <= max(total, 1):
        checks.fail("max_rows", f"None or an integer in [1, {total}]", repr(max_rows))
    if skip:
        expected = "False with max_rows, where nobody counts the inactive rows"
        checks.fail("skip_inactive_forward", expected, True)


def _correct(config, advantages, fields, mask, bounds):
    """Advantages with the rollout correction in them, where it comes before the pass."""
    gap = fields["old_logp"] - fields["rollout_logp"]
    fields = {**fields, "rollout_gap": gap}
    if correction_stage(config, has_old=True) == "before":
        advantages = corrected(config, advantages, gap, mask, bounds)
        if config.off_policy_mask_threshold is None:
            fields["rollout_logp"] = None
    return advantages, fields


def _useful(
    config: LossConfig, advantages: Tensor, bounds: Tensor | None, by_sequence: bool
) -> Tensor | None:
    """(N,) rows that can have a gradient when unmasked; None for all."""
    if config.beta > 0 or config.entropy_coef > 0:
        return None
    if not by_sequence:
        return advantages != 0
    # one token with an advantage makes the ratio of the whole sequence matter
    alive = sequence_sum((advantages != 0).to(advantages.dtype), bounds)
    return spread(alive, bounds, advantages.numel()) != 0


def _threshold(
    config: LossConfig, value: Tensor | float | None, device: torch.device
) -> Tensor | None:
    if value is None:
        return None
    if config.top_entropy_quantile == 1.0:
        checks.fail("entropy_threshold", "None without top_entropy_quantile < 1", value)
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        if value.device.type == "cpu":
            # a copy of it to an accelerator would wait
            return torch.full((), value.item(), dtype=value.dtype, device=device)
        return value.detach().to(device).reshape(())
    if not checks.is_number(value) or value != value:
        checks.fail("entropy_threshold", "None or one number (nats)", checks.describe(value))
    return torch.full((), float(value), device=device)


def _advantages(
    advantages: Tensor, shape: tuple[int, ...], device: torch.device, cu_seqlens: Tensor | None
) -> Tensor:
    """(B,), (B, T), (S,) or (N,) advantages -> (N,) fp32."""
    allowed = {shape}
    if len(shape) == 2:
        allowed.add((shape[0],))
    elif cu_seqlens is not None:
        allowed.add((cu_seqlens.numel() - 1,))
    good = isinstance(advantages, Tensor) and tuple(advantages.shape) in allowed
    if not good or advantages.device != device or not advantages.is_floating_point():
        expected = " or ".join(str(s) for s in sorted(allowed, key=len))
        got = checks.describe(advantages)
        checks.fail("advantages", f"floating-point tensor {expected} on {device}", got)
    if not advantages.is_contiguous():
        strides = f"strides {advantages.stride()}"
        checks.fail("advantages", "a contiguous tensor (call .contiguous())", strides)
    flat = advantages.detach()
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if tuple(advantages.shape) == shape:
        return flat.reshape(-1)
    if len(shape) == 2:
        return flat[:, None].expand(shape).reshape(-1)
    return spread(flat, cu_seqlens, shape[0])


def _check_denominator(denominator: Tensor | float | int | None) -> None:
    expected = "None or a finite number > 0"
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1 or denominator.dtype == torch.bool or denominator.is_complex():
            checks.fail("denominator", "one real number", checks.describe(denominator))
        # 0 is the count of a window that is masked whole; a value on a GPU is not worth a wait
        if denominator.device.type == "cpu" and not 0 <= denominator.item() < float("inf"):
            checks.fail("denominator", expected, denominator.item())
    elif denominator is not None and not (
        checks.is_number(denominator) and 0 < denominator < float("inf")
    ):
        checks.fail("denominator", expected, repr(denominator))
