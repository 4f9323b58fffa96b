"""Every launch of ours that is counted: the real launchers, on as many rows as the page says.

The logits are allocated and never touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from grpo_fast.kernels import logprob
from grpo_fast.kernels import policy as one_pass
from grpo_fast.objective import objectives
from grpo_fast.presets import OBJECTIVES

OURS = "grpo_fast"
ROWS = 2048
WIDE = 151936
# 32001 and 50257 break 16-byte rows; 262144 is the widest vocabulary in use.
OTHER_VOCABULARIES = (32001, 50257, 262144)
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_NAMES = {_F32: "fp32", _BF16: "bf16", _F16: "fp16"}


@dataclass(frozen=True)
class Case:
    """A launch that is counted."""

    contestant: str
    kernel: str
    """What it does: logprob_fwd, logprob_bwd, policy; for others their own name."""
    V: int
    dtype: torch.dtype
    """Of the logits."""
    out: torch.dtype | None
    """Of the gradient by logits, None where there is none."""
    options: str
    launch: Callable[[], object]
    rows: int = ROWS

    @property
    def name(self) -> str:
        """Kernel, types, vocabulary and options, which identify a launch."""
        types = _NAMES[self.dtype] + (
            f" -> {_NAMES[self.out]}" if self.out not in (None, self.dtype) else ""
        )
        few = self.contestant == OURS and self.rows != ROWS
        rows = f" rows={self.rows}" if few else ""
        options = f" {self.options}" if self.options else ""
        return f"{self.kernel} {types} V={self.V}{rows}{options}"


class Rows:
    """Arguments of a launch over `n` rows."""

    def __init__(self, dtype: torch.dtype, V: int, n: int):
        self.logits = torch.empty(1, n, V, dtype=dtype)
        self.ids = torch.zeros(n, dtype=torch.int64)
        self.active = torch.ones(n, dtype=torch.bool)
        self.vector = torch.zeros(n)
        self.terms = torch.zeros(6, n)

    def options(self, names: str) -> dict[str, object]:
        """Keywords of the launchers by the words of `Case.options`."""
        words = names.split()
        given: dict[str, object] = {"inv_temperature": self.vector if "by-row" in words else 0.7}
        if "softcap" in words:
            given["softcap"] = 30.0
        if "no entropy" in names:
            given["entropy"] = False
        if "mask" in words:
            given["active"] = self.active
        return given

    def gradient(self, out: torch.dtype | None) -> torch.Tensor:
        """Where the gradient goes: over the logits, in their bytes where it is narrower."""
        if out is None or out == self.logits.dtype:
            return self.logits
        return self.logits.view(out)[..., : self.logits.shape[-1]]


def forward(case: Case) -> None:
    """Launch `logprob_fwd`."""
    rows = Rows(case.dtype, case.V, case.rows)
    logprob.logprob_fwd(rows.logits, rows.ids, rows.terms[:4], **rows.options(case.options))


def backward(case: Case) -> None:
    """Launch `logprob_bwd`, in place or narrower in place."""
    rows = Rows(case.dtype, case.V, case.rows)
    given = rows.options(case.options)
    if "dentropy" in case.options.split():
        given |= {"dentropy": rows.vector, "dlse": rows.vector}
    out = rows.gradient(case.out)
    logprob.logprob_bwd(rows.logits, rows.ids, rows.terms[:4], rows.vector, out, **given)


def policy(case: Case) -> None:
    """Launch `policy`, with a gradient where the case has one."""
    rows = Rows(case.dtype, case.V, case.rows)
    given = rows.options(case.options)
    if "off-policy" in case.options.split():
        given |= {"old_logp": rows.vector, "ref_logp": rows.vector}
    if "bonus" in case.options.split():
        given |= {"entropy_coef": 0.01}
    one_pass.policy(
        rows.logits,
        rows.ids,
        rows.vector,
        rows.vector,
        rows.terms,
        None if case.out is None else rows.gradient(case.out),
        token_loss=objectives.token_loss,
        objective=objectives.clip,
        kl=objectives.k3,
        kl_gradient=objectives.k3,
        through_ratio=OBJECTIVES["clip"].through_ratio,
        weight_kl=True,
        parameters=(0.8, 1.2, float("inf"), 0.5),
        beta=0.04,
        **given,
    )


_LAUNCH = {"logprob_fwd": forward, "logprob_bwd": backward, "policy": policy}
# kernel, dtype, out, options: at the widest vocabulary
_AT_WIDE = (
    ("logprob_fwd", _BF16, None, ""),
    ("logprob_fwd", _F16, None, ""),
    ("logprob_fwd", _F32, None, ""),
    ("logprob_fwd", _BF16, None, "no entropy"),
    ("logprob_fwd", _F32, None, "no entropy"),
    ("logprob_fwd", _BF16, None, "by-row mask"),
    ("logprob_fwd", _BF16, None, "softcap"),
    ("logprob_bwd", _BF16, _BF16, ""),
    ("logprob_bwd", _F16, _F16, ""),
    ("logprob_bwd", _F32, _BF16, ""),
    ("logprob_bwd", _F32, _F16, ""),
    ("logprob_bwd", _F32, _F32, ""),
    ("logprob_bwd", _BF16, _BF16, "dentropy"),
    ("logprob_bwd", _F32, _BF16, "dentropy"),
    ("logprob_bwd", _BF16, _BF16, "by-row mask"),
    ("logprob_bwd", _BF16, _BF16, "softcap"),
    ("policy", _BF16, None, "off-policy no gradient"),
    ("policy", _F32, None, "off-policy no gradient"),
    ("policy", _BF16, _BF16, ""),
    ("policy", _BF16, _BF16, "off-policy by-row mask"),
    ("policy", _F16, _F16, "off-policy"),
    ("policy", _F32, _BF16, "off-policy"),
    ("policy", _F32, _F32, "off-policy"),
    ("policy", _BF16, _BF16, "bonus"),
    ("policy", _F32, _BF16, "bonus off-policy"),
    ("policy", _BF16, _BF16, "softcap"),
)
# at every other vocabulary
_ELSEWHERE = (
    ("logprob_fwd", _BF16, None, ""),
    ("logprob_fwd", _F32, None, ""),
    ("logprob_bwd", _BF16, _BF16, ""),
    ("logprob_bwd", _F32, _BF16, ""),
    ("policy", _BF16, _BF16, ""),
    ("policy", _F32, _BF16, "off-policy"),
)
# rows that are fewer than one wave
_FEW = (1, 8, 64)


def _case(
    kernel: str,
    dtype: torch.dtype,
    out: torch.dtype | None,
    options: str,
    V: int = WIDE,
    rows: int = ROWS,
) -> Case:
    case: Case

    def launch() -> None:
        _LAUNCH[kernel](case)

    case = Case(OURS, kernel, V, dtype, out, options, launch, rows)
    return case


def cases() -> Iterator[Case]:
    """All of ours."""
    has_switch = "entropy" in inspect.signature(logprob.logprob_fwd).parameters
    for row in _AT_WIDE:
        if has_switch or "no entropy" not in row:
            yield _case(*row)
    for V in OTHER_VOCABULARIES:
        for row in _ELSEWHERE:
            yield _case(*row, V=V)
    for rows in _FEW:
        for kernel, out in (("logprob_fwd", None), ("logprob_bwd", _BF16)):
            yield _case(kernel, _BF16, out, "", V=262144, rows=rows)
