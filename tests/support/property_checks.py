"""One call on the torch backend and on the kernels: the same loss, gradients and metrics.

Tolerances. fp32: a relative L2 distance of 2e-5 per tensor (3e-7 is what is usually seen); where an
ill-conditioned call exceeds it, the error of the kernels against float64 may be 1.5 times that of
the torch backend. fp16 and bf16: that error may be 1.5 times the torch backend's and four roundings
of the type, since the kernels leave dlogits in it while the torch backend keeps them in fp32. Where
a sum over the vocabulary cancels these roundings are more than that: the torch backend is run again
with dlogits in the type, and the error may be 1.5 times that one's.
NaN and infinities have to be in the same places.
"""

from __future__ import annotations

import functools
import math
import os
from unittest import mock

import torch
from property_cases import Call, Tensors, build, small_accelerator
from torch import Tensor

import grpo_fast
from grpo_fast.engine.chunks import LinearHead

BOUND = 2e-5
ROUNDING = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}
# Below this times the largest number that could come up nothing is compared: denormals differ
TINY = 1e-30
SCRIPT = """
# the failing call: TRITON_INTERPRET=1 PYTHONPATH=.:tests/support python <this file>
from interpreter import install

install()
from property_cases import Call
from property_checks import compare

compare({call!r})
"""


class Mismatch(AssertionError):
    """The backends disagree; the message ends with a script that shows it."""


def _stored_type(head: LinearHead) -> torch.dtype | None:
    """`LinearHead.narrow` as the kernels have it."""
    return head.weight.dtype if head.weight.dtype.itemsize == 2 else None


def run(
    call: Call, backend: str, *, double: bool = False, narrow: bool = False
) -> dict[str, Tensor]:
    """Results by name: `loss`, `grad NAME`, `metric NAME`, or the fields of `LogProbs`.

    narrow: the torch backend leaves dlogits in the type of the weight.
    """
    if narrow:
        with mock.patch.object(LinearHead, "narrow", property(_stored_type)):
            return run(call, backend)
    tensors = build(call)
    leaves = tensors.leaves
    if double:
        leaves = {k: v.double() for k, v in leaves.items()}
        for name in ("ref_hidden", "ref_weight"):
            if name in tensors.given:
                tensors.given[name] = tensors.given[name].double()
    for name, leaf in leaves.items():
        leaves[name] = leaf.detach().requires_grad_(name in call.wanted)
    with mock.patch.dict(os.environ, GRPO_FAST_BACKEND=backend), small_accelerator(call):
        results = (_loss if call.loss else _log_probs)(call, tensors, leaves)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            # a gradient that never came is a result as well
            results[f"grad {name}"] = torch.zeros(()) if leaf.grad is None else leaf.grad
    return results


def arguments(call: Call, tensors: Tensors, leaves: dict[str, Tensor]) -> tuple[list, dict]:
    """Positional and keyword arguments of the function of a call."""
    given = dict(tensors.given)
    if call.linear:
        first = [leaves["hidden"], leaves["weight"]]
        given["bias"] = leaves.get("bias")
        if call.lora:
            given["lora"] = (leaves["lora_A"], leaves["lora_B"], 0.5)
    else:
        logits = leaves["logits"]
        given |= {"inplace": True} if call.inplace else {}
        first = [logits * 1.0 if call.inplace else logits]
    return [*first, tensors.ids, *([tensors.advantages] if call.loss else [])], given


def _loss(call: Call, tensors: Tensors, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    args, given = arguments(call, tensors, leaves)
    loss, metrics = getattr(grpo_fast, call.op)(*args, **given)
    if loss.requires_grad:
        (loss * call.upstream).backward()
    return {"loss": loss.detach(), **{f"metric {k}": v for k, v in metrics.items()}}


def _log_probs(call: Call, tensors: Tensors, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    args, given = arguments(call, tensors, leaves)
    out = getattr(grpo_fast, call.op)(*args, **given)
    g = torch.Generator().manual_seed(call.seed + 1)
    total = torch.zeros(())
    for name, value in out._asdict().items():
        upstream = torch.randn(call.shape, generator=g)
        upstream = torch.where(torch.rand(call.shape, generator=g) < call.zeros, 0.0, upstream)
        if value is not None and (name != "lse" or call.lse):
            # a banned target has logp = -inf, and 0 * inf is not ours to answer for
            finite = torch.where(torch.isfinite(value), value, torch.zeros_like(value))
            total = total + (finite * upstream * call.upstream).sum()
    if total.requires_grad:
        total.backward()
    return {k: v.detach() for k, v in out._asdict().items() if v is not None}


def distance(a: Tensor, b: Tensor) -> float:
    """L2 distance over the places where both are finite."""
    both = torch.isfinite(a) & torch.isfinite(b)
    return torch.where(both, a.double() - b.double(), 0.0).norm().item()


def norm(a: Tensor) -> float:
    """L2 norm of the finite entries."""
    return torch.where(torch.isfinite(a), a.double(), 0.0).norm().item()


def _special(a: Tensor) -> Tensor:
    """Zeros where finite, and the NaN or infinity elsewhere."""
    return torch.where(torch.isfinite(a), torch.zeros_like(a), a).double()


def disagreement(call: Call, name: str, kernel: Tensor, plain: Tensor, again) -> str | None:
    """What is wrong with a result of the kernels; again(double=True) and again(narrow=True) run the
    torch backend once more."""
    if kernel.shape != plain.shape or kernel.dtype != plain.dtype:
        return f"{kernel.dtype} {tuple(kernel.shape)}, not {plain.dtype} {tuple(plain.shape)}"
    if not plain.is_floating_point():
        return None if torch.equal(kernel, plain) else f"{kernel.tolist()}, not {plain.tolist()}"
    if not torch.equal(_special(kernel).nan_to_num(5, 6, 7), _special(plain).nan_to_num(5, 6, 7)):
        n = [int((~torch.isfinite(t)).sum()) for t in (kernel, plain)]
        return f"{n[0]} places that are not finite, not {n[1]}, or others"
    apart, size = distance(kernel, plain), norm(plain)
    if name.startswith("metric"):
        # means of numbers near 1; a share of tokens moves by a whole token or not at all
        size = max(size, 1.0)
    if apart <= BOUND * size + TINY:
        return None
    truth = again(double=True)[name]
    ours, theirs, size = distance(kernel, truth), distance(plain, truth), norm(truth)
    slack = BOUND + (4 * ROUNDING[call.dtype] if name.startswith("grad") else 0.0)
    if ours <= 1.5 * theirs + slack * size + TINY:
        return None
    if call.linear and call.dtype != "fp32" and name.startswith("grad"):
        theirs = distance(again(narrow=True)[name], truth)
        if ours <= 1.5 * theirs + slack * size + TINY:
            return None
    return (
        f"relative distance {apart / max(size, TINY):.2e}, errors {ours / max(size, TINY):.2e} and "
        f"{theirs / max(size, TINY):.2e} of norm {size:.2e}"
    )


def check_empty(call: Call, results: dict[str, Tensor]) -> str | None:
    """With nothing unmasked the loss, every gradient and every metric is 0 or finite."""
    for name, value in results.items():
        if name.startswith("metric"):
            if not math.isfinite(value.item()):
                return f"{name} is {value.item()} with nothing unmasked"
        elif value.any() or torch.isnan(value).any():
            return f"{name} is not 0 with nothing unmasked"
    return None


def compare(call: Call) -> dict[str, Tensor]:
    """Results of the kernels; raises Mismatch where they are not those of the torch backend."""
    problems = []
    again = functools.cache(functools.partial(run, call, "torch"))
    try:
        plain, kernel = run(call, "torch"), run(call, "triton")
    except Exception as error:
        raise Mismatch(f"{type(error).__name__}: {error}\n{SCRIPT.format(call=call)}") from error
    if plain.keys() != kernel.keys():
        problems.append(f"results {sorted(kernel)}, not {sorted(plain)}")
    names = plain.keys() & kernel.keys()
    if call.max_rows is not None and torch.isnan(plain["loss"]):
        # with too little room everything but these is whatever the route left
        names = {"loss", "metric loss", "metric tokens"}
    for name in names:
        problem = disagreement(call, name, kernel[name], plain[name], again)
        problems += [] if problem is None else [f"{name}: {problem}"]
    if not build(call).mask.any() and call.loss:
        problem = check_empty(call, kernel)
        problems += [] if problem is None else [problem]
    if problems:
        raise Mismatch("\n".join(sorted(problems)) + "\n" + SCRIPT.format(call=call))
    return kernel
