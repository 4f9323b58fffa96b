"""The plan as a picture: a stacked bar for each phase, and the device's memory as a line."""

from __future__ import annotations

from pathlib import Path

from .devices import GIB, Devices
from .step import TERMS, StepPlan


def draw(plans: list[StepPlan], path: str | Path, devices: Devices | None = None) -> None:
    """Write a PNG with a row of bars for each plan, in GiB of one rank.

    Args:
        plans: from `estimate`, at least one.
        path: where.
        devices: what it has to fit; None draws no line.
    """
    from matplotlib.figure import Figure

    bars = [(_label(plan), phase, terms) for plan in plans for phase, terms in plan.phases.items()]
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(bars)
    for place, term in enumerate(TERMS):
        sizes = [terms.get(term, 0) / GIB for _, _, terms in bars]
        if any(sizes):
            axes.barh(range(len(bars)), sizes, left=left, label=term, color=f"C{place % 10}",
                      hatch="//" if place >= 10 else None)  # fmt: skip
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(range(len(bars)), [f"{name}: {phase}" for name, phase, _ in bars], fontsize=8)
    axes.invert_yaxis()
    if devices is not None:
        axes.axvline(devices.usable_bytes / GIB, color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{plans[0].architecture.name} on {devices} (dashed: usable)", fontsize=10)
    axes.set_xlabel("GiB on one rank, planned")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)


def _label(plan: StepPlan) -> str:
    setup = plan.setup
    return setup.method + (" ckpt" if setup.checkpointing else "") + (" tiled" * bool(setup.tile))
