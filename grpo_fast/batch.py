"""One call of a loss without its vocabulary-sized tensors: checked, flattened to (N,), 0 where
masked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import inputs, objectives
from .config import OBJECTIVES, LossConfig
from .inputs import Rows
from .weights import boundaries, sequence_sum, spread, token_weights


@dataclass(frozen=True)
class Batch:
    """Everything of a call that is not vocabulary-sized, flattened to (N,), 0 where masked."""

    rows: Rows
    bounds: Tensor | None
    """(S+1,) int64 sequence boundaries; None when nothing needs them."""
    advantages: Tensor
    weights: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    config: LossConfig
    n_tokens: int
    """Unmasked tokens, on the host; rows has fewer where inactive ones are skipped."""

    def listed(self, index: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """The per-token tensors of the rows in index, in the order of index."""
        fields = {
            "advantages": self.advantages,
            "weights": self.weights,
            "old_logp": self.old_logp,
            "ref_logp": self.ref_logp,
        }
        if index is not None:
            fields = {k: None if v is None else v[index] for k, v in fields.items()}
        return {k: None if v is None else v.to(dtype) for k, v in fields.items()}


def objective_arguments(config: LossConfig) -> dict[str, object]:
    """The arguments of the policy row function that come from the configuration."""
    return {
        "token_loss": objectives.token_loss,
        "objective": getattr(objectives, config.preset.objective),
        "kl": getattr(objectives, config.kl_estimator),
        "kl_gradient": getattr(objectives, config.kl_gradient or config.kl_estimator),
        "through_ratio": OBJECTIVES[config.preset.objective].through_ratio,
        "weight_kl": config.use_bias_correction_kl,
        "parameters": config.parameters,
        "beta": config.beta,
    }


def prepare(
    shape: tuple[int, ...],
    V: int,
    device: torch.device,
    *,
    ids: Tensor,
    advantages: Tensor,
    config: LossConfig,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    denominator: Tensor | float | int | None,
    skip_inactive_forward: bool,
) -> Batch:
    """Check everything beside the head or the logits, and flatten it.

    Waits for the device once, and once more for boundaries that are not on the host.
    """
    if not isinstance(config, LossConfig):
        inputs.fail("config", "a LossConfig", inputs.describe(config))
    inputs.check_cu_seqlens(cu_seqlens, shape, device)
    by_sequence = config.level != "token"
    needs_bounds = by_sequence or config.weights == "sequence_mean"
    needs_count = config.weights != "token_mean" and denominator is None
    if len(shape) == 1 and cu_seqlens is None and (needs_bounds or needs_count):
        what = f"(S+1,) boundaries for {config.loss_type} on packed (N,) input"
        inputs.fail("cu_seqlens", what, None)
    token_advantages = _advantages(advantages, shape, device, cu_seqlens)
    _check_denominator(denominator)
    if not isinstance(skip_inactive_forward, bool):
        inputs.fail("skip_inactive_forward", "True or False", repr(skip_inactive_forward))
    if config.beta > 0 and ref_logp is None:
        inputs.fail("ref_logp", f"reference log-probs {shape}, since beta = {config.beta}", None)
    bounds = None
    if len(shape) == 2 or cu_seqlens is not None:
        bounds = boundaries(token_advantages.view(shape), cu_seqlens)
    useful = None
    if not (config.beta > 0 or by_sequence):
        useful = token_advantages != 0
    elif skip_inactive_forward and by_sequence and config.beta == 0:
        # one token with an advantage makes the whole sequence's ratio matter
        alive = sequence_sum((token_advantages != 0).to(token_advantages.dtype), bounds)
        useful = spread(alive, bounds, token_advantages.numel()) != 0
    rows = inputs.flatten(ids, mask, V, shape, device, useful)
    flat, n_tokens = rows.mask, rows.n_unmasked
    if skip_inactive_forward and useful is not None:
        rows = Rows(rows.ids, flat & useful, rows.order, rows.n_gradient, rows.n_gradient)
    return Batch(
        rows,
        bounds,
        torch.where(flat, token_advantages, torch.zeros_like(token_advantages)),
        token_weights(config, flat, bounds, denominator, token_advantages.dtype),
        inputs.per_token("old_logp", old_logp, shape, flat),
        inputs.per_token("ref_logp", ref_logp, shape, flat),
        config,
        n_tokens,
    )


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
        got = inputs.describe(advantages)
        inputs.fail("advantages", f"floating-point tensor {expected} on {device}", got)
    if not advantages.is_contiguous():
        strides = f"strides {advantages.stride()}"
        inputs.fail("advantages", "a contiguous tensor (call .contiguous())", strides)
    packed = len(shape) == 1 and cu_seqlens is not None
    if packed and cu_seqlens.numel() - 1 == shape[0] and (cu_seqlens.diff() != 1).any():
        expected = "(N,) or (S,), which are one here: make every sequence one token or none empty"
        inputs.fail("advantages", expected, f"S = N = {shape[0]} with an empty sequence")
    flat = advantages.detach()
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if tuple(advantages.shape) == shape:
        return flat.reshape(-1)
    if len(shape) == 2:
        return flat[:, None].expand(shape).reshape(-1)
    return spread(flat, cu_seqlens.to(device=device, dtype=torch.int64), shape[0])


def _check_denominator(denominator: Tensor | float | int | None) -> None:
    expected = "None or a finite number > 0"
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1 or denominator.dtype == torch.bool or denominator.is_complex():
            inputs.fail("denominator", "one real number", inputs.describe(denominator))
        # 0 is the count of a window that is masked whole; a value on a GPU is not worth a wait
        if denominator.device.type == "cpu" and not 0 <= denominator.item() < float("inf"):
            inputs.fail("denominator", expected, denominator.item())
    elif denominator is not None and not (
        inputs.is_number(denominator) and 0 < denominator < float("inf")
    ):
        inputs.fail("denominator", expected, repr(denominator))
