"""What fits: the largest batch and context of each way to train, and what would have to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .architecture import Architecture
from .devices import GIB, Devices
from .setup import Setup
from .step import StepPlan, estimate

# tokens of an MLP at once: below it the products of a layer get short
TILE = 2048


@dataclass(frozen=True)
class Candidate:
    """A way to train, at the largest batch that fits, or at a batch of one where none does."""

    plan: StepPlan
    fits: bool
    context: int
    """Tokens of the longest sequence that fits with a batch of one; 0: none."""

    @property
    def setup(self) -> Setup:
        """How it is set up."""
        return self.plan.setup


def base_setup(method: str, asked: Setup) -> Setup:
    """A method with the weights it is usually given: fp32 with autocast, or bf16 under an adapter.

    Args:
        method: one of `setup.METHODS`.
        asked: everything else.
    """
    if asked.device == "cpu":
        return replace(asked, method=method)
    weights = "fp32" if method == "full" else "bf16"
    sharding = "none" if method == "qlora" else asked.sharding
    return replace(asked, method=method, weights=weights, autocast=True, sharding=sharding)


def candidates(
    architecture: Architecture, asked: Setup, devices: Devices, methods: tuple[str, ...]
) -> list[Candidate]:
    """Each method without checkpointing, with it, and with tiled MLPs too.

    The optimizer step stays what it is: with a larger batch there are fewer micro-batches.

    Args:
        architecture: the model.
        asked: lengths, ranks and options; its batch x accumulation is kept.
        devices: what one rank has.
        methods: of `setup.METHODS`, the one preferred first.
    """
    found = []
    for method in methods:
        setup = base_setup(method, asked)
        ways = [setup] if setup.checkpointing or setup.tile else _ways(setup)
        found += [_fit(architecture, way, devices) for way in ways]
    return found


def recommended(found: list[Candidate]) -> Candidate | None:
    """The first that fits: of the methods in their order, the one that computes least twice."""
    return next((candidate for candidate in found if candidate.fits), None)


def _ways(setup: Setup) -> list[Setup]:
    again = replace(setup, checkpointing=True)
    return [setup, again, replace(again, tile=TILE)]


def _fit(architecture: Architecture, setup: Setup, devices: Devices) -> Candidate:
    sequences = setup.batch * setup.accumulation
    for batch in (b for b in range(sequences, 0, -1) if sequences % b == 0):
        plan = estimate(architecture, replace(setup, batch=batch, accumulation=sequences // batch))
        if plan.fits(devices):
            return Candidate(plan, True, largest_context(architecture, setup, devices))
    return Candidate(plan, False, largest_context(architecture, setup, devices))


def largest_context(architecture: Architecture, setup: Setup, devices: Devices) -> int:
    """Tokens of prompt and completion that fit with a batch of one, at most the model's context.

    The prompt keeps its length, and as many sequences are sampled at once.

    Args:
        architecture, setup, devices: as for `candidates`.
    """
    sequences = setup.batch * setup.accumulation
    one = replace(setup, batch=1, accumulation=sequences)

    def fits(completion: int) -> bool:
        return estimate(architecture, replace(one, completion=completion)).fits(devices)

    most = max(1, (architecture.context or 1 << 20) - setup.prompt)
    longest = _largest(fits, most)
    return setup.prompt + longest if longest else 0


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where smaller ones fit too; 0 when 1 does not."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def changes(architecture: Architecture, setup: Setup, devices: Devices) -> list[str]:
    """What would have to change for a setup to fit, each change alone and the useful ones together.

    Args:
        architecture, devices: as for `candidates`.
        setup: one that does not fit.
    """
    lines, room = [], devices.usable_bytes
    for text, changed in _changes(setup):
        total = estimate(architecture, changed).total
        verdict = "fits" if total <= room else f"{(total - room) / GIB:.1f} GiB too many"
        lines.append(f"{text}: {total / GIB:.1f} GiB, {verdict}")
    return lines


def _changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if not setup.checkpointing:
        setup_again = replace(setup, checkpointing=True)
        yield "gradient_checkpointing: true", setup_again
    if setup.at_once > setup.generations // setup.ranks:
        fewer = max(1, setup.generations // setup.ranks)
        yield f"sampling_batch_size: {fewer}", replace(setup, sampled=fewer)
    if setup.completion > 1:
        half = replace(setup, completion=max(1, setup.completion // 2))
        yield f"max_completion_length: {half.completion}", half
    if setup.beta > 0 and setup.method == "full":
        yield "beta: 0, no reference policy", replace(setup, beta=0.0)
    if setup.optimizer == "adamw":
        yield "optim: adamw_bnb_8bit", replace(setup, optimizer="adamw_8bit")
    if setup.method == "full":
        yield "lora_r: 16 over bf16 weights", replace(base_setup("lora", setup), checkpointing=True)
    if setup.method != "qlora":
        packed = replace(base_setup("qlora", setup), checkpointing=True, sharding="none")
        yield "lora_r: 16 and quantization: nf4", packed
    for ranks in (2, 4, 8):
        if setup.method != "qlora" and ranks > setup.ranks:
            shared = replace(setup, ranks=ranks, sharding="fsdp2", checkpointing=True)
            yield f"{ranks} devices with FSDP2", shared
