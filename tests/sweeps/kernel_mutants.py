"""Errors of the kernels that the tests have to notice; see `mutants.py`."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    breaks: str
    tests: str
    """Key of `SUITES` in `full_mutants.py`: what has to fail."""


def mutants_of(file: str, *errors: tuple[str, str, str, str]) -> list[Mutant]:
    """Mutants of one file: what was there, what comes there, what it breaks, whose tests."""
    return [Mutant(file, *error) for error in errors]


KERNEL_MUTANTS = [
    *mutants_of(
        "kernels/row_stats.py",
        (
            "rest = tl.fma(rest, decay, tl.sum(tl.sum(p, 2), 0))",
            "rest = rest + tl.sum(tl.sum(p, 2), 0)",
            "the running sum is not rescaled with the max",
            "kernel_rows",
        ),
        (
            "raw = tl.maximum(raw, tl.max(tl.max(u, 2), 0))",
            "raw = raw + 0.0",
            "the running maximum stays that of the target",
            "kernel_rows",
        ),
        (
            "dot = tl.fma(decay, tl.fma(d, rest, dot), more)",
            "dot = tl.fma(decay, dot, more)",
            "the moment of the entropy is not moved with the max",
            "kernels",
        ),
        (
            "last - tl.where(skipped < last, TILE, 0)",
            "last",
            "one whole tile too many",
            "kernel_rows",
        ),
        (
            "(cols < V - first) & (cols != target - first)",
            "(cols < V - first)",
            "the target is in the mass beside it too",
            "kernels",
        ),
        (
            "rest = tl.fma(decay, rest, decay_2 * rest_2)",
            "rest = tl.fma(decay, rest, rest_2)",
            "a segment is added at the maximum of another",
            "kernel_rows",
        ),
        (
            "rest = tl.sum(weight * rest, 0)",
            "rest = tl.sum(rest, 0)",
            "the threads are added at maxima of their own",
            "kernels",
        ),
        (
            "near = t > -1.0",
            "near = t > 1e30",
            "log-probs near 0 are rounded away",
            "kernels",
        ),
        (
            "residual = tl.fma(base, LN2, -peak)",
            "residual = 0.0 * peak",
            "the log-sum is relative to what nobody stores",
            "kernel_rows",
        ),
        (
            "if tl.abs(peak) > FAR:",
            "if peak > 1e38:",
            "rows of finfo.min lose their sum",
            "kernel_rows",
        ),
    ),
    *mutants_of(
        "kernels/row_gradient.py",
        (
            "slope, offset = 0.0, -dlogp * share",
            "slope, offset = 0.0, 0.0 * share",
            "no -p beside the target",
            "kernels",
        ),
        (
            "at_target = dlogp * one_minus_exp(logp)",
            "at_target = dlogp * 1.0",
            "no -p at the target",
            "kernels",
        ),
        (
            "        at_target += dlse * p_target\n",
            "        at_target += 0.0 * p_target\n",
            "the target has no gradient by lse",
            "kernel_rows",
        ),
        (
            "tl.store(out_ptr + target, at_target",
            "tl.store(out_ptr + target + 1, at_target",
            "the target is the next token",
            "kernels",
        ),
        (
            "slope = -dentropy * share * LN2",
            "slope = dentropy * share * LN2",
            "the sign of the gradient of the entropy",
            "kernels",
        ),
        (
            "offset += dentropy * share * (log_total - entropy)",
            "offset += dentropy * share * log_total",
            "the gradient of the entropy about the wrong mean",
            "kernels",
        ),
        (
            "dx = dx * (1.0 - u * u)",
            "dx = dx * (1.0 - u)",
            "the derivative of the softcap",
            "kernels",
        ),
        (
            "at_target *= 1.0 - u * u",
            "at_target *= 1.0",
            "the derivative of the softcap at the target",
            "kernels",
        ),
        (
            "has_target = (target >= start) & (target - start < columns)",
            "has_target = target - start < columns",
            "an absent target is written before the row",
            "kernel_rows",
        ),
        (
            "doubled = tl.minimum(first + first, stop)",
            "doubled = tl.minimum(first + first, stop - TILE)",
            "the narrow gradient of the last whole tile is missing",
            "kernel_rows",
        ),
    ),
    *mutants_of(
        "kernels/row_parts.py",
        (
            "tl.program_id(1).to(tl.int64)",
            "tl.program_id(1).to(tl.int64) * 0",
            "every part is the first one",
            "kernel_rows",
        ),
    ),
    *mutants_of(
        "kernels/scale.py",
        (
            "if (factor != 1.0) | (not IN_PLACE):",
            "if factor != 1.0:",
            "a factor of 1 leaves the cast out",
            "kernel_rows",
        ),
        (
            "x = tl.load(x_ptr + cols, mask=mask).to(tl.float32)",
            "x = tl.load(x_ptr + cols, mask=mask).to(tl.float16)",
            "gradients in half precision are scaled in it",
            "kernel_rows",
        ),
    ),
    *mutants_of(
        "kernels/configs.py",
        (
            "return all(step % 16 == 0 for step in steps)",
            "return any(step % 16 == 0 for step in steps)",
            "rows that start anywhere are read 16 bytes at a time",
            "kernel_rows",
        ),
    ),
    *mutants_of(
        "kernels/logprob.py",
        (
            "    if HAS_MASK:\n        active = tl.load(active_ptr + n) != 0\n    if HAS_DLSE:",
            "    if HAS_DLSE:",
            "backward reads masked rows",
            "calls",
        ),
        (
            "active = (dlogp != 0.0) | (dentropy != 0.0)",
            "active = dlogp != 0.0",
            "few rows: those with an entropy bonus alone get no gradient",
            "kernel_rows",
        ),
    ),
    *mutants_of(
        "kernels/policy.py",
        (
            "(by_logp + by_ratio) * weight, dentropy",
            "by_logp * weight, dentropy",
            "no gradient through the ratio",
            "kernels",
        ),
        (
            "dentropy = -entropy_coef * weight",
            "dentropy = entropy_coef * weight",
            "the entropy bonus has the gradient of a penalty",
            "kernels",
        ),
        (
            "rollout_gap = old_logp - tl.load(rollout_logp_ptr + n)",
            "rollout_gap = tl.load(rollout_logp_ptr + n) - old_logp",
            "the rollout ratio upside down",
            "kernels",
        ),
        (
            "if (dlogp == 0.0) & (dentropy == 0.0):",
            "if dlogp == 0.0:",
            "rows with an entropy bonus alone get no gradient",
            "kernels",
        ),
    ),
]
