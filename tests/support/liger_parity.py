"""Distances between `integrations/liger.py`, Liger-Kernel and float64, over every option.

`python tests/support/liger_parity.py` prints the table of docs/liger.md.
"""

from __future__ import annotations

import importlib.metadata
import inspect

import pytest
import torch
from liger_cases import KINDS, Data, Options, data, linear, options, truth
from loss_cases import relative

from grpo_fast.integrations.liger.linear import LigerFusedLinearGRPOLoss

TESTED = "0.8.5"
# a loss is a sum of terms of both signs and of about this size
SCALE = 0.1
BOUND = 1e-5
# how the table calls the pairs
WHO = {"ours": "ours", "Liger's": "Liger", "between": "both"}
# (name, default) of forward, in the order of Liger 0.8.5
REQUIRED = inspect.Parameter.empty
FORWARD = tuple(
    (name, REQUIRED)
    for name in ("_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages")
) + tuple(
    (name, None)
    for name in ("bias", "ref_per_token_logps", "old_per_token_logps", "ref_input", "ref_weight")
    + ("ref_bias", "vllm_is_ratio", "num_items_in_batch")
)


def distance(name: str, got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2; of the loss, relative to its terms where they cancel."""
    if name != "loss":
        return relative(got, want)
    error = abs(got.item() - want.item()) / max(abs(want.item()), SCALE)
    return float("inf") if error != error else error


def agree(got: dict, want: dict, context: object) -> None:
    """Every result is within BOUND of float64."""
    for name, value in got.items():
        if value is None:
            assert want[name] is None, (name, context)
            continue
        # the metric is that of the plain estimate, see docs/liger.md
        name = "kl" if name == "weighted_kl" and name not in want else name
        assert distance(name, value, want[name]) <= BOUND, (name, context)


def liger(name: str):
    """An object of the real package; skips the test where there is none to compare with."""
    try:
        found = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"liger-kernel {TESTED} is not installed (make test-liger)")
    if found != TESTED:
        pytest.skip(f"liger-kernel {found} is installed, this is about {TESTED}")
    if name == "triton_grpo_loss":
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        return triton_grpo_loss
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    return Theirs


def batches(o: Options) -> tuple[Data, Data]:
    """One with NaN in the masked places for us and one without for Liger; luspo's reductions agree
    where nothing is masked, and at sequence level without anything per token."""
    alike = o.level == "sequence" and not o.beta and o.ratio != "BT"
    lengths = (9, 9, 9) if o.loss_type == "luspo" and not alike else (9, 1, 0, 6)
    return data(lengths=lengths), data(0.0, lengths=lengths)


def compare(loss_type: str, level: str) -> dict[str, dict[str, float]]:
    """Largest distances of each result: ours and Liger's from float64, and from each other."""
    theirs = liger("LigerFusedLinearGRPOLoss")
    worst: dict[str, dict[str, float]] = {}
    for o in options(loss_type, level):
        ours, clean = batches(o)
        want, got = truth(o, ours), linear(LigerFusedLinearGRPOLoss, o, ours)
        other = linear(theirs, o, clean)
        assert got.keys() == other.keys()
        for name in got:
            # with weight_kl Liger's metric is that of the product, see docs/liger.md
            if got[name] is None or name == "weighted_kl":
                continue
            pairs = {"ours": (got, want), "Liger": (other, want), "both": (got, other)}
            for pair, (a, b) in pairs.items():
                row = worst.setdefault(name, dict.fromkeys(pairs, 0.0))
                row[pair] = max(row[pair], distance(name, a[name], b[name]))
    return worst


def table() -> str:
    """Markdown of `compare`, a line for each loss type and level."""
    heads = [f"{what}, {who}" for what in ("loss", "gradients", "KL") for who in WHO]
    lines = [f"| loss type | level | calls | {' | '.join(heads)} |", "|---" * 12 + "|"]
    for kind in KINDS:
        rows = compare(*kind)
        grads = [rows[name] for name in ("hidden", "weight", "bias")]
        rows["gradients"] = {pair: max(row[pair] for row in grads) for pair in WHO.values()}
        cells = [
            f"{rows[name][pair]:.1e}"
            for name in ("loss", "gradients", "kl")
            for pair in WHO.values()
        ]
        names = f"`{kind[0]}`", kind[1], str(len(options(*kind)))
        lines.append(f"| {' | '.join((*names, *cells))} |")
    return "\n".join(lines)


def few(loss_type: str, level: str) -> list[Options]:
    """Options of `triton_grpo_loss` in which every value occurs, and most pairs."""
    delta = None if loss_type in ("cispo", "sapo", "vespo") else 1.6
    weight_kl = loss_type != "vespo"
    return [
        Options(loss_type, level),
        Options(loss_type, level, 0.3, False, None, False, ratio=None),
        Options(loss_type, level, 0.3, weight_kl, delta, ratio="B"),
        Options(loss_type, level, 0.3, weight_kl, None, False, ratio="B1"),
        Options(loss_type, level, 0.0, False, delta, ratio="BT"),
        Options(loss_type, level, 0.3, False, None, ratio="BT"),
    ]


if __name__ == "__main__":
    print(table())
