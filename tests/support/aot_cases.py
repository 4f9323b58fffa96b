"""The launches that `aot.py` compiles: the real launchers on a chunk of rows, in every shape that
picks another kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grpo_fast.kernels import logprob, scale
from grpo_fast.kernels import policy as one_pass
from grpo_fast.objective import objectives
from grpo_fast.presets import OBJECTIVES

ROWS = 2048


def _rows(dtype: torch.dtype, V: int, n: int = ROWS):
    """Logits of n rows, never touched, their ids, a mask, and fp32 vectors of the same length."""
    ids = torch.zeros(n, dtype=torch.int64)
    active = torch.ones(n, dtype=torch.bool)
    return torch.empty(1, n, V, dtype=dtype), ids, active, torch.zeros(n), torch.zeros(6, n)


def forward(
    dtype: torch.dtype, V: int, *, full: bool, by_row: bool = False, entropy: bool = True, n=ROWS
) -> None:
    logits, ids, active, vector, stats = _rows(dtype, V, n)
    extra = {"active": active, "softcap": 30.0} if full else {}
    temperature = vector if by_row else 0.7
    extra |= {"inv_temperature": temperature, "entropy": entropy}
    logprob.logprob_fwd(logits, ids, stats[:4], **extra)


def backward(
    dtype: torch.dtype,
    V: int,
    *,
    full: bool,
    by_row: bool = False,
    out: torch.dtype | None = None,
    over: bool = False,
) -> None:
    """over: out lies on the bytes of the logits."""
    logits, ids, active, vector, stats = _rows(dtype, V)
    target = logits if out is None else torch.empty(logits.shape, dtype=out)
    if over:
        target = logits.view(out)[..., :V]
    extra = {"active": active, "softcap": 30.0, "dlse": vector, "dentropy": vector} if full else {}
    temperature = vector if by_row else 0.7
    logprob.logprob_bwd(
        logits, ids, stats[:4], vector, target, inv_temperature=temperature, **extra
    )


def scaled(dtype: torch.dtype, out: torch.dtype, V: int) -> None:
    """An upstream factor on a gradient of 8 rows, in place where the types are the same."""
    x = torch.empty(1, 8, V, dtype=dtype)
    scale.scale(x, torch.tensor(2.0), x if out == dtype else torch.empty(x.shape, dtype=out))


def policy(
    dtype: torch.dtype,
    V: int,
    *,
    full: bool = False,
    extras: bool = False,
    gradient: bool = True,
    objective: str = "clip",
    kl: Callable = objectives.k3,
    kl_gradient: Callable | None = None,
    rollout_mask: bool = False,
    out: torch.dtype | None = None,
    over: bool = True,
    n: int = ROWS,
) -> None:
    """full: mask, softcap, old and reference log-probs; extras: entropy bonus, rollout correction
    and a temperature for each row; over: a narrower out lies on the bytes of the logits."""
    logits, ids, active, vector, terms = _rows(dtype, V, n)
    given = (
        {"active": active, "softcap": 30.0, "old_logp": vector, "ref_logp": vector} if full else {}
    )
    if extras:
        given |= {
            "entropy_coef": 0.01,
            "rollout_logp": vector,
            "rollout_weight": objectives.rollout_weight,
            "rollout_mask": rollout_mask,
        }
    target = logits if out is None else torch.empty(logits.shape, dtype=out)
    if out is not None and over:
        target = logits.view(out)[..., :V]
    one_pass.policy(
        logits,
        ids,
        vector,
        vector,
        terms,
        target if gradient else None,
        token_loss=objectives.token_loss,
        objective=getattr(objectives, objective),
        kl=kl,
        kl_gradient=kl_gradient or kl,
        through_ratio=OBJECTIVES[objective].through_ratio,
        weight_kl=True,
        parameters=(0.8, 1.2, float("inf"), 0.5),
        beta=0.04 if full else 0.0,
        inv_temperature=vector if extras else 0.7,
        **given,
    )


def launch_rows(
    operation: str, rows: int, start: int, number: float, *, by_row: bool = False
) -> None:
    """Launch on a chunk of `rows` rows whose per-token vectors begin at element `start`."""
    part = slice(start, start + rows)
    total = start + rows
    # nothing is read or written, so all rows may share one
    logits = torch.empty(1, 1, 151936, dtype=torch.bfloat16).expand(1, rows, 151936)
    ids = torch.zeros(total, dtype=torch.int64)[part]
    vector = torch.zeros(total)[part]
    terms = torch.zeros(6, total)[:, part]
    temperature = {"inv_temperature": vector if by_row else 0.5 + number}
    if operation == "forward":
        logprob.logprob_fwd(logits, ids, terms[:4], **temperature)
    elif operation == "backward":
        logprob.logprob_bwd(logits, ids, terms[:4], vector, logits, **temperature)
    else:
        one_pass.policy(
            logits,
            ids,
            vector,
            vector,
            terms,
            logits,
            token_loss=objectives.token_loss,
            objective=objectives.clip,
            kl=objectives.k3,
            kl_gradient=objectives.k3,
            through_ratio=True,
            weight_kl=True,
            parameters=(1.0 - number / 4, 1.0 + number, 2.0 + number, number),
            beta=number,
            entropy_coef=0.01 + number,
            old_logp=vector,
            ref_logp=vector,
            rollout_logp=vector,
            rollout_weight=objectives.rollout_weight,
            rollout_bounds=(number / 2, 2.0 + number),
            **temperature,
        )


# V = 151936 is a multiple of 16, so its rows start on 16-byte boundaries and loads are wide;
# V = 50257 is odd. The small vocabularies take the narrow rows of the launch table.
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
CASES: dict[str, Callable[[], None]] = {
    "fwd bf16 V=151936": lambda: forward(_BF16, 151936, full=False),
    "fwd bf16 V=151936 no entropy": lambda: forward(_BF16, 151936, full=False, entropy=False),
    "fwd f32 V=151936": lambda: forward(_F32, 151936, full=False),
    "fwd bf16 V=50257 full": lambda: forward(_BF16, 50257, full=True),
    "fwd f32 V=151936 full": lambda: forward(_F32, 151936, full=True),
    "fwd f16 V=500": lambda: forward(_F16, 500, full=False),
    "bwd bf16 V=151936 in place": lambda: backward(_BF16, 151936, full=False),
    "bwd f32 V=151936, bf16 out": lambda: backward(_F32, 151936, full=False, out=_BF16),
    "bwd f32 V=151936, bf16 over the logits": lambda: backward(
        _F32, 151936, full=False, out=_BF16, over=True
    ),
    "bwd f32 V=50257 full, bf16 over the logits": lambda: backward(
        _F32, 50257, full=True, out=_BF16, over=True
    ),
    "bwd bf16 V=50257 full": lambda: backward(_BF16, 50257, full=True),
    "bwd f32 V=151936 full, bf16 out": lambda: backward(_F32, 151936, full=True, out=_BF16),
    "bwd f16 V=1000 full": lambda: backward(_F16, 1000, full=True),
    "policy bf16 V=151936 on-policy": lambda: policy(_BF16, 151936),
    "policy bf16 V=32000": lambda: policy(_BF16, 32000),
    "policy bf16 V=50257 full": lambda: policy(_BF16, 50257, full=True),
    "policy f32 V=151936 full, bf16 out": lambda: policy(_F32, 151936, full=True, out=_BF16),
    "policy f32 V=151936, bf16 of its own": lambda: policy(_F32, 151936, out=_BF16, over=False),
    "policy f32 V=151936 full": lambda: policy(_F32, 151936, full=True),
    "policy f32 V=151936 full, no gradient": lambda: policy(
        _F32, 151936, full=True, gradient=False
    ),
    "policy f16 V=500 cispo full": lambda: policy(
        _F16, 500, full=True, objective="cispo", kl=objectives.k1
    ),
    "scale bf16": lambda: scaled(_BF16, _BF16, 50257),
    "scale f32, bf16 out": lambda: scaled(_F32, _BF16, 4096),
    "fwd f32 V=151936 full, by row": lambda: forward(_F32, 151936, full=True, by_row=True),
    "bwd bf16 V=50257 full, by row": lambda: backward(_BF16, 50257, full=True, by_row=True),
    "policy bf16 V=151936 extras": lambda: policy(_BF16, 151936, extras=True),
    "policy f32 V=151936 vespo full, extras": lambda: policy(
        _F32, 151936, full=True, extras=True, objective="vespo", out=_BF16
    ),
    "policy bf16 V=50257 dppo_kl full, extras": lambda: policy(
        _BF16,
        50257,
        full=True,
        extras=True,
        objective="dppo_kl",
        kl=objectives.absolute,
        kl_gradient=objectives.k2,
        rollout_mask=True,
    ),
}
# a row of several segments, and fewer rows than the GPU has room for
FEW_ROWS: dict[str, Callable[[], None]] = {
    "fwd bf16 V=262144 of 64 rows": lambda: forward(_BF16, 262144, full=False, n=64),
    "fwd bf16 V=262144 of 64 rows, no entropy": lambda: forward(
        _BF16, 262144, full=False, entropy=False, n=64
    ),
    "fwd f32 V=151936 of 8 rows, full": lambda: forward(_F32, 151936, full=True, n=8),
    "policy bf16 V=262144 of 64 rows, extras": lambda: policy(_BF16, 262144, extras=True, n=64),
    "policy f32 V=151936 of 1 row, full, bf16 out": lambda: policy(
        _F32, 151936, full=True, out=_BF16, n=1
    ),
}
