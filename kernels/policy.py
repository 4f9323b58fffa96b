"""The one-pass policy loss from rows of logits: log-prob, objective, KL and gradient in one launch.

Bytes per row of V logits of e bytes: reads 2 V e (the second from L2 where the rows in flight fit
there, which is V < 38,000 in bf16), writes V e. Without a gradient: reads V e.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.configs import forward_launch, gradient_launch, stays_in_l2
from grpo_fast.kernels.lang import device_function, row_factors, row_pointer
from grpo_fast.kernels.launch import PER_CALL, gradient_arguments, is_narrowed, row_arguments
from grpo_fast.kernels.logprob import logprob_bwd
from grpo_fast.kernels.row_gradient import store_row_gradient, store_zero_row
from grpo_fast.kernels.row_parts import is_shared, row_parts
from grpo_fast.kernels.row_stats import row_stats


@triton.jit
def evaluate_token(
    n,
    logp,
    entropy,
    old_logp_ptr,
    ref_logp_ptr,
    rollout_logp_ptr,
    advantage_ptr,
    weight_ptr,
    parameters,
    beta,
    entropy_coef,
    rollout_bounds,
    TOKEN_LOSS: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    ROLLOUT_WEIGHT: tl.constexpr,
    THROUGH_RATIO: tl.constexpr,
    WEIGHT_KL: tl.constexpr,
    ROLLOUT_MASK: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
):
    """Weighted loss of token n, ratio, kl, dloss/dlogp and dloss/dentropy."""
    # on-policy log-ratios are 0 for every finite logp, NaN where logp is NaN
    old_logp = logp
    ref_logp = logp
    if HAS_OLD:
        old_logp = tl.load(old_logp_ptr + n)
    if HAS_REF:
        ref_logp = tl.load(ref_logp_ptr + n)
    advantage = tl.load(advantage_ptr + n)
    if HAS_ROLLOUT:
        rollout_gap = old_logp - tl.load(rollout_logp_ptr + n)
        low, high = rollout_bounds
        advantage *= ROLLOUT_WEIGHT(rollout_gap, low, high, ROLLOUT_MASK)
    weight = tl.load(weight_ptr + n)
    loss, by_logp, by_ratio, ratio, kl = TOKEN_LOSS(
        logp,
        logp - old_logp,
        ref_logp,
        advantage,
        parameters[0],
        parameters[1],
        parameters[2],
        parameters[3],
        beta,
        OBJECTIVE,
        KL,
        KL_GRADIENT,
        THROUGH_RATIO,
        WEIGHT_KL,
        HAS_REF,
    )
    dentropy = 0.0
    if HAS_DENTROPY:
        loss -= entropy_coef * entropy
        dentropy = -entropy_coef * weight
    return loss * weight, ratio, kl, (by_logp + by_ratio) * weight, dentropy


@triton.jit
def store_terms(ptr, stride, loss, logp, entropy, ratio, kl, dlogp):
    """Column of the (6, N) terms."""
    tl.store(ptr, loss)
    ptr += stride
    tl.store(ptr, logp)
    ptr += stride
    tl.store(ptr, entropy)
    ptr += stride
    tl.store(ptr, ratio)
    ptr += stride
    tl.store(ptr, kl)
    ptr += stride
    tl.store(ptr, dlogp)


@triton.jit
def store_saved(ptr, stride, logp, entropy, peak, log_sum, dentropy):
    """Column of (5, N): the statistics of a row and dloss/dentropy, for a gradient that is written
    later."""
    tl.store(ptr, logp)
    ptr += stride
    tl.store(ptr, entropy)
    ptr += stride
    tl.store(ptr, peak)
    ptr += stride
    tl.store(ptr, log_sum)
    ptr += stride
    tl.store(ptr, dentropy)


@triton.jit(
    do_not_specialize=[*PER_CALL, "stride_saved", "stride_out_b", "stride_out_t"],
    do_not_specialize_on_alignment=[
        "ids_ptr",
        "active_ptr",
        "old_logp_ptr",
        "ref_logp_ptr",
        "rollout_logp_ptr",
        "advantage_ptr",
        "weight_ptr",
        "terms_ptr",
        "inv_temperature_ptr",
    ],
)
def policy_kernel(
    logits_ptr,
    ids_ptr,
    active_ptr,
    old_logp_ptr,
    ref_logp_ptr,
    rollout_logp_ptr,
    advantage_ptr,
    weight_ptr,
    terms_ptr,
    parts_ptr,
    saved_ptr,
    out_ptr,
    T,
    stride_b,
    stride_t,
    stride_out_b,
    stride_out_t,
    stride_stats,
    stride_saved,
    V,
    scale,
    softcap,
    inv_temperature,
    inv_temperature_ptr,
    param_a,
    param_b,
    param_c,
    param_d,
    beta,
    entropy_coef,
    rollout_low,
    rollout_high,
    TOKEN_LOSS: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    ROLLOUT_WEIGHT: tl.constexpr,
    THROUGH_RATIO: tl.constexpr,
    WEIGHT_KL: tl.constexpr,
    ROLLOUT_MASK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    SAVE: tl.constexpr,
    NARROW: tl.constexpr,
    KEEP: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
    BWD_STRIPS: tl.constexpr,
    BWD_VEC: tl.constexpr,
):
    """terms[:, n] = weighted loss, logp, entropy, ratio, kl, dloss/dlogp; out[n] =
    dloss/dlogits[n]."""
    n = tl.program_id(0).to(tl.int64)
    loss, logp, entropy, ratio, kl, dlogp = 0.0, 0.0, 0.0, 1.0, 0.0, 0.0
    peak, log_sum, dentropy = 0.0, 0.0, 0.0
    target = tl.load(ids_ptr + n).to(tl.int32)
    row_ptr = row_pointer(logits_ptr, n, T, stride_b, stride_t, VEC)
    active = True
    if HAS_MASK:
        active = tl.load(active_ptr + n) != 0
    if HAS_ROW_TEMPERATURE:
        inv_temperature = tl.load(inv_temperature_ptr + n).to(tl.float32)
    factors = row_factors(scale, softcap, inv_temperature, HAS_SOFTCAP, NEGATIVE)
    if active:
        logp, entropy, peak, log_sum = row_stats(
            row_ptr, target, V, factors, parts_ptr, n, HAS_PARTS, HAS_ENTROPY, HAS_SOFTCAP,
            NEGATIVE, KEEP, SEGMENT, STRIPS, THREADS, VEC,
        )  # fmt: skip
        loss, ratio, kl, dlogp, dentropy = evaluate_token(
            n,
            logp,
            entropy,
            old_logp_ptr,
            ref_logp_ptr,
            rollout_logp_ptr,
            advantage_ptr,
            weight_ptr,
            (param_a, param_b, param_c, param_d),
            beta,
            entropy_coef,
            (rollout_low, rollout_high),
            TOKEN_LOSS,
            OBJECTIVE,
            KL,
            KL_GRADIENT,
            ROLLOUT_WEIGHT,
            THROUGH_RATIO,
            WEIGHT_KL,
            ROLLOUT_MASK,
            HAS_OLD,
            HAS_REF,
            HAS_ROLLOUT,
            HAS_DENTROPY,
        )
    if SAVE:
        store_saved(saved_ptr + n, stride_saved, logp, entropy, peak, log_sum, dentropy)
    store_terms(terms_ptr + n, stride_stats, loss, logp, entropy, ratio, kl, dlogp)
    if WRITE_GRADIENT:
        grad_ptr = row_pointer(out_ptr, n, T, stride_out_b, stride_out_t, BWD_VEC)
        # clipped, zero-advantage and masked rows: their logits are not read a second time
        if (dlogp == 0.0) & (dentropy == 0.0):
            store_zero_row(grad_ptr, V, 0, V, BWD_STRIPS, THREADS, BWD_VEC)
        else:
            store_row_gradient(
                row_ptr, grad_ptr, target, V, 0, V, (logp, entropy, peak, log_sum),
                (dlogp, 0.0, dentropy), factors, HAS_SOFTCAP, NEGATIVE, False, HAS_DENTROPY,
                NARROW, KEEP, BWD_STRIPS, THREADS, BWD_VEC,
            )  # fmt: skip


def _numbers(
    parameters: tuple[float, float, float, float], bounds: tuple[float, float]
) -> dict[str, float]:
    """Launch arguments of the objective and of the rollout weight."""
    names = ("param_a", "param_b", "param_c", "param_d", "rollout_low", "rollout_high")
    return dict(zip(names, map(float, (*parameters, *bounds)), strict=True))


def policy(
    logits: torch.Tensor,
    ids: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    terms: torch.Tensor,
    out: torch.Tensor | None,
    *,
    token_loss: Callable,
    objective: Callable,
    kl: Callable,
    kl_gradient: Callable,
    through_ratio: bool,
    weight_kl: bool,
    parameters: tuple[float, float, float, float],
    beta: float,
    entropy_coef: float = 0.0,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    rollout_weight: Callable | None = None,
    rollout_bounds: tuple[float, float] = (0.0, float("inf")),
    rollout_mask: bool = False,
    active: torch.Tensor | None = None,
    inv_temperature: float | torch.Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
) -> None:
    """Fill terms (6, N) fp32 and, unless out is None, out (B, T, V) with dloss/dlogits.

    loss = weight * (token_loss - entropy_coef * entropy), the advantage times rollout_weight before
    it; terms are loss, logp, entropy, ratio, kl and the loss's derivative by logp (not that by the
    entropy). With active, a row where it is 0 is not read and gets ratio 1 and zeros.

    Args:
        logits: (B, T, V) fp32, fp16 or bf16 with stride 1 over V; out may be logits itself, or its
            bytes as a narrower type.
        ids, advantages, weights, old_logp, ref_logp, active: (N,), N = B * T; floats are fp32.
        token_loss, objective, kl, kl_gradient, rollout_weight: functions of
            `grpo_fast/objective/objectives.py`.
        parameters: the numbers of the objective.
        rollout_logp: (N,) fp32, NaN where there is none; needs rollout_weight, which gets old_logp
            (else the token's own logp) - rollout_logp, rollout_bounds and rollout_mask.
        inv_temperature: one number, or (N,) fp32 with each row's own.
        entropy: False leaves that term 0 where no entropy_coef needs it; no other bit changes.
    """
    assert rollout_logp is None or rollout_weight is not None
    B, T, V = logits.shape
    if B * T == 0:
        return
    target = logits if out is None else out
    narrow = is_narrowed(logits, target)
    # few rows: the gradient too is shared between programs, but for one that goes over its logits
    later = out is not None and not narrow and is_shared(logits)
    saved = terms.new_empty(5, B * T) if later else None
    has_entropy = entropy or entropy_coef != 0.0
    with torch.cuda.device_of(logits):
        arguments = row_arguments(logits, scale, softcap, inv_temperature)
        arguments |= forward_launch(logits, softcap)
        backward = gradient_launch(logits, target, softcap)
        parts = row_parts(logits, ids, active, has_entropy, arguments)
        policy_kernel[(B * T,)](
            ids_ptr=ids,
            active_ptr=active,
            old_logp_ptr=old_logp,
            ref_logp_ptr=ref_logp,
            rollout_logp_ptr=rollout_logp,
            advantage_ptr=advantages,
            weight_ptr=weights,
            terms_ptr=terms,
            parts_ptr=parts,
            saved_ptr=saved,
            stride_stats=terms.stride(0),
            stride_saved=B * T,
            beta=float(beta),
            entropy_coef=float(entropy_coef),
            **_numbers(parameters, rollout_bounds),
            TOKEN_LOSS=device_function(token_loss),
            OBJECTIVE=device_function(objective),
            KL=device_function(kl),
            KL_GRADIENT=device_function(kl_gradient),
            ROLLOUT_WEIGHT=None if rollout_logp is None else device_function(rollout_weight),
            THROUGH_RATIO=through_ratio,
            WEIGHT_KL=weight_kl,
            ROLLOUT_MASK=rollout_logp is not None and rollout_mask,
            HAS_MASK=active is not None,
            HAS_PARTS=parts is not None,
            HAS_OLD=old_logp is not None,
            HAS_REF=ref_logp is not None,
            HAS_ROLLOUT=rollout_logp is not None,
            HAS_ENTROPY=has_entropy,
            HAS_DENTROPY=entropy_coef != 0.0,
            WRITE_GRADIENT=out is not None and not later,
            SAVE=later,
            BWD_STRIPS=backward["STRIPS"],
            BWD_VEC=backward["VEC"],
            KEEP=out is not None and stays_in_l2(logits),
            **gradient_arguments(logits, target),
            **arguments,
        )
    if later:
        transform = {"inv_temperature": inv_temperature, "scale": scale, "softcap": softcap}
        dentropy = saved[4] if entropy_coef != 0.0 else None
        logprob_bwd(
            logits, ids, saved[:4], terms[5], out, dentropy=dentropy, skip_zeros=True, **transform
        )
