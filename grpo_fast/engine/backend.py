"""Which implementation of the row functions runs: Triton or torch. Says which and why; never falls
back silently."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from grpo_fast.checks import fail

VARIABLE = "GRPO_FAST_BACKEND"


class Backend(NamedTuple):
    """The three row functions and `scale`, from `kernels/` or `torch_backend.py`, and why these."""

    name: str
    reason: str
    logprob_fwd: Callable
    logprob_bwd: Callable
    policy: Callable
    scale: Callable
    """scale(x, factor, out): out = x * factor, in fp32; nothing where factor is 1 and out is x."""


@functools.cache
def _has_triton() -> bool:
    # a look at the file system, which is not for every call
    return importlib.util.find_spec("triton") is not None


def _choose(device: torch.device) -> tuple[str, str]:
    asked = os.environ.get(VARIABLE, "auto").lower() or "auto"
    if asked not in ("auto", "torch", "triton"):
        fail(VARIABLE, "auto, torch or triton", repr(asked))
    if asked == "torch":
        return "torch", f"{VARIABLE}=torch"
    has_triton = _has_triton()
    accelerator = device.type in ("cuda", "xpu")
    if asked == "auto" and not accelerator:
        return "torch", f"Triton has no {device.type} code generator"
    if asked == "auto" and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return "torch", f"the kernels need compute capability 8.0, {device} has {capability}"
    if not has_triton:
        raise RuntimeError(
            f"tensors on {device} use the Triton kernels, but triton is not installed: pip install "
            f"triton, or set {VARIABLE}=torch."
        )
    if not accelerator and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{VARIABLE}=triton with tensors on {device} needs Triton's interpreter: set "
            "TRITON_INTERPRET=1 before Python starts."
        )
    where = "Triton's interpreter" if not accelerator else f"a {device.type} device"
    return "triton", f"{VARIABLE}={asked}, {where}"


def select(device: torch.device | str) -> Backend:
    """The backend for tensors on a device, by the device and GRPO_FAST_BACKEND (auto, torch,
    triton).

    Raises:
        ValueError: GRPO_FAST_BACKEND is none of the three.
        RuntimeError: Triton is wanted and cannot run there; the message says what to do.
    """
    name, reason = _choose(torch.device(device))
    if name == "torch":
        from . import torch_backend as rows

        functions = (rows.logprob_fwd, rows.logprob_bwd, rows.policy, rows.scale)
        return Backend(name, reason, *functions)
    from grpo_fast.kernels import logprob, policy, scale

    functions = (logprob.logprob_fwd, logprob.logprob_bwd, policy.policy, scale.scale)
    return Backend(name, reason, *functions)


def explain(device: torch.device | str | None = None) -> str:
    """One line: the backend for a device (default: the GPU when there is one) and the reason."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = _choose(torch.device(device))
    return f"{name} on {device} ({reason})"
