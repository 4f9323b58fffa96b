"""`grpo-fast plan MODEL`: the memory of a whole step, what fits, and a configuration that does."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from grpo_fast.checks import fail
from grpo_fast.plan.architecture import VERIFIED, Architecture, read
from grpo_fast.plan.devices import DEVICES, GIB, Devices, devices
from grpo_fast.plan.fit import Candidate, base_setup, candidates, changes, recommended
from grpo_fast.plan.setup import CRITICS, METHODS, OPTIMIZERS, SHARDINGS, Setup
from grpo_fast.plan.step import TERMS, StepPlan, estimate
from grpo_fast.plan.yaml import as_yaml

_EXAMPLES = """\
examples:
  grpo-fast plan Qwen/Qwen3-8B --gpus 1xH100-80 --prompt-tokens 1024 --completion-tokens 15360
  grpo-fast plan ./model/config.json --gpus 8xA100-80 --methods full --yaml run.yaml
  grpo-fast plan Qwen/Qwen3-0.6B --gpus 4090-24 --chart plan.png --json
  grpo-fast plan ./model --gpus 1x64GiB --methods lora --device cpu --measure

The config is enough: weights are neither read nor made. --measure makes random ones and runs two
steps on this machine. `grpo-fast plan --tokens N --model MODEL` is about one call of the loss.
"""


def run(argv: list[str]) -> int:
    """Print the plan; 0 when a configuration fits, 1 when none does.

    Args:
        argv: the arguments after `plan`.
    """
    asked = _parser().parse_args(argv)
    room = devices(asked.gpus)
    architecture = read(asked.model)
    setup = _setup(asked, room)
    if asked.measure:
        return _measured(architecture, setup, asked)
    methods = METHODS if asked.methods is None else tuple(asked.methods)
    if setup.device == "cpu" and asked.methods is None:
        methods = ("full", "lora")
    found = candidates(architecture, setup, room, methods)
    best = recommended(found)
    if asked.json:
        print(json.dumps(_as_dict(architecture, room, found, best), indent=1))
    else:
        _print(architecture, room, setup, found, best)
    if best is None and not asked.json:
        print("\nnothing fits. What would have to change:")
        for line in changes(architecture, found[-1].setup, room):
            print(f"  {line}")
    if best is not None and asked.yaml:
        Path(asked.yaml).write_text(as_yaml(best.plan, asked.dataset, asked.reward))
    if asked.chart:
        from grpo_fast.plan.chart import draw

        draw([c.plan for c in _best_of_each(found)], asked.chart, room)
    return 0 if best is not None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grpo-fast plan",
        description="The memory of a whole training step on each GPU, from the model's config "
        "alone: which ways to train fit, with which batch and context.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, config.json or hub name")
    add("--gpus", default="1xH100-80", help=f"COUNTxNAME, of {', '.join(DEVICES)}, or COUNTx48GiB")
    add("--methods", nargs="+", choices=METHODS, help="which to look at, the preferred one first")
    add("--prompt-tokens", type=int, default=512, help="of the longest prompt")
    add("--completion-tokens", type=int, default=512, help="max_completion_length")
    add("--num-generations", type=int, default=8, help="completions of a prompt")
    add("--sequences", type=int, help="completions of an optimizer step on each GPU; default: one "
        "group over all GPUs")  # fmt: skip
    add("--batch", type=int, help="per_device_train_batch_size of --measure; default: --sequences")
    add("--sampled", type=int, help="completions sampled at once on each GPU; default: --sequences")
    add("--lora-r", type=int, default=16, help="rank of the adapter")
    add("--beta", type=float, default=0.0, help="above 0: full training holds a reference")
    add("--critic", choices=CRITICS, default="none", help="of PPO")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adamw")
    add("--sharding", choices=("auto", *SHARDINGS), default="auto", help="auto: fsdp2 over several")
    add("--checkpointing", action="store_true", help="only with activation checkpointing")
    add("--offload", action="store_true", help="its checkpoints lie in host memory")
    add("--mlp-tile", type=int, help="only with MLPs of so many tokens at once")
    add("--attention", choices=("flash", "sdpa"), default="flash",
        help="sdpa: packed rows of short sequences need a mask")  # fmt: skip
    add("--share-prompts", action="store_true", help="prompts are computed once for a group")
    add("--workspace-bytes", type=int, help="budget of the logits; default: the loss's own")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: fp32, no autocast")
    add("--measure", action="store_true", help="run one method on this machine, and compare")
    add("--json", action="store_true", help="everything, as JSON")
    add("--yaml", metavar="FILE", help="write the recommended configuration for grpo-fast train")
    add("--dataset", help="of that configuration")
    add("--reward", help="of that configuration")
    add("--chart", metavar="FILE.png", help="draw the phases of the best way of each method")
    return parser


def _setup(asked: argparse.Namespace, room: Devices) -> Setup:
    sequences = asked.sequences
    if sequences is None:
        sequences = max(1, -(-asked.num_generations // room.count))
    batch = asked.batch or sequences
    if sequences < 1 or sequences % batch:
        fail("--batch", f"a divisor of --sequences {sequences}", batch)
    if sequences * room.count % asked.num_generations:
        expected = f"whole groups: a multiple of {asked.num_generations} over {room.count} GPUs"
        fail("--sequences", expected, sequences)
    sharding = asked.sharding
    if sharding == "auto":
        sharding = "fsdp2" if room.count > 1 and asked.device == "cuda" else "none"
    return Setup(
        rank=asked.lora_r,
        ranks=room.count,
        sharding=sharding,
        batch=batch,
        accumulation=sequences // batch,
        sampled=asked.sampled,
        prompt=asked.prompt_tokens,
        completion=asked.completion_tokens,
        generations=asked.num_generations,
        checkpointing=asked.checkpointing,
        offload=asked.offload,
        tile=asked.mlp_tile,
        optimizer=asked.optimizer,
        beta=asked.beta,
        critic=asked.critic,
        masks=asked.attention == "sdpa",
        share_prompts=asked.share_prompts,
        workspace_bytes=asked.workspace_bytes,
        device=asked.device,
    )


def _best_of_each(found: list[Candidate]) -> list[Candidate]:
    """One candidate of each method: the first that fits, or the last."""
    best: dict[str, Candidate] = {}
    for candidate in found:
        known = best.get(candidate.setup.method)
        if known is None or not known.fits:
            best[candidate.setup.method] = candidate
    return list(best.values())


def _print(
    architecture: Architecture,
    room: Devices,
    setup: Setup,
    found: list[Candidate],
    best: Candidate | None,
) -> None:
    counts = architecture.counts
    print(
        f"{architecture.name}: {architecture.family}, {counts.total / 1e9:.2f} B parameters, "
        f"{architecture.layers} layers, H = {architecture.H}, V = {architecture.V}"
    )
    if not architecture.verified:
        print(
            f"note: {architecture.family} is counted like the others, but no closed formula of it "
            f"was compared (they were for {', '.join(VERIFIED)})"
        )
    print(
        f"{room}: {room.memory_bytes / GIB:.1f} GiB each, {room.usable_bytes / GIB:.1f} usable "
        "(less 1.2 GiB of context and 5 % for fragmentation: allowances, not measured)"
    )
    print(
        f"{setup.prompt} + {setup.completion} tokens; completions on each GPU: {setup.at_once} "
        f"sampled at once, {setup.batch * setup.accumulation} in an optimizer step\n"
    )
    head = ("method", "checkpointing", "mlp_tile", "batch", "GiB", "in phase", "longest context")
    rows = [head]
    for candidate in found:
        own = candidate.setup
        rows.append(
            (
                own.method + (" fsdp2" if own.sharding == "fsdp2" else ""),
                "yes" if own.checkpointing else "no",
                str(own.tile or "-"),
                str(own.batch) if candidate.fits else "none fits",
                f"{candidate.plan.total / GIB:.1f}",
                candidate.plan.phase,
                f"{candidate.context:,}" if candidate.context else "none",
            )
        )
    _table(rows)
    if best is None:
        return
    print(f"\n{best.setup.method}, what each phase holds in GiB:")
    _table(_phases(best.plan))
    derived = [term for term, how in TERMS.items() if how == "never measured"]
    print(
        f"\nnone of these terms was measured on a GPU; {', '.join(derived)} and 8-bit optimizers "
        "were not on a CPU either. --measure compares.\n\n"
        f"recommended (--yaml FILE writes it):\n{as_yaml(best.plan)}",
        end="",
    )


def _phases(plan: StepPlan) -> list[tuple[str, ...]]:
    used = [t for t in TERMS if any(terms.get(t, 0) for terms in plan.phases.values())]
    rows: list[tuple[str, ...]] = [("phase", *used, "together")]
    for phase, terms in plan.phases.items():
        sizes = [terms.get(term, 0) for term in used]
        rows.append((phase, *(f"{s / GIB:.2f}" for s in (*sizes, sum(sizes)))))
    return rows


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _as_dict(
    architecture: Architecture, room: Devices, found: list[Candidate], best: Candidate | None
) -> dict:
    return {
        "model": architecture.name,
        "family": architecture.family,
        "formulas_verified": architecture.verified,
        "parameters": architecture.counts.total,
        "gpus": str(room),
        "memory_bytes": room.memory_bytes,
        "usable_bytes": room.usable_bytes,
        "terms": TERMS,
        "candidates": [
            {**c.plan.as_dict(), "fits": c.fits, "longest_context": c.context} for c in found
        ],
        "recommended": None if best is None else found.index(best),
        "recommended_yaml": None if best is None else as_yaml(best.plan),
        "changes": [] if best is not None else changes(architecture, found[-1].setup, room),
    }


def _measured(architecture: Architecture, setup: Setup, asked: argparse.Namespace) -> int:
    import torch

    from .measure import measure

    if setup.device == "cuda" and not torch.cuda.is_available():
        fail("--measure", "a GPU, or --device cpu", "none on this machine")
    method = (asked.methods or ["full"])[0]
    setup = replace(base_setup(method, setup), sharding="none")
    plan = estimate(architecture, setup)
    print("two steps of random weights are run ...", file=sys.stderr)
    measured = measure(architecture, setup)
    planned = totals(plan)
    if asked.json:
        print(json.dumps({**plan.as_dict(), "planned": planned, "measured": measured}, indent=1))
        return 0
    rows = [("phase", "planned MiB", "measured MiB", "planned / measured")]
    for name in ("sampling", "training", "step"):
        a, b = planned[name], measured[name]
        rows.append((name, f"{a / 2**20:.0f}", f"{b / 2**20:.0f}", f"{a / b:.2f}"))
    _table(rows)
    return 0


def totals(plan: StepPlan) -> dict[str, int]:
    """What is planned for the phases that can be told apart from outside, and for the step.

    Args:
        plan: from `estimate`.
    """
    all_of_them = plan.totals()
    training = max(all_of_them["backward begins"], all_of_them["backward ends"])
    sampling = all_of_them["sampling"]
    return {"sampling": sampling, "training": training, "step": max(sampling, training)}
