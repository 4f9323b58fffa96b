"""The memory of a whole step: what every phase holds on one rank, term by term, before it runs.

    sampling    weights + optimizer + reference + critic + KV cache + logits
    scoring     weights + optimizer + reference + critic + one layer + head
    training    weights + optimizer + reference + critic + gradients + activations + masks + head

The step needs what the largest phase needs. Training is looked at twice: where backward begins,
when every layer's activations are there, and where it ends, when every gradient is. What layers
keep is counted by `trace.costs`; everything else is arithmetic, whose formulas and sources
docs/memory.md lists. Nothing here has been compared with a GPU; on the CPU it has
(benchmarks/results/plan/).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from .architecture import Architecture
from .devices import GIB, Devices
from .setup import OPTIMIZERS, Setup
from .shape import head_workspace
from .trace import Costs, costs

# order of the bars
TERMS: dict[str, str] = {
    "weights": "measured on CPU",
    "copies": "never measured",
    "gathered": "never measured",
    "reference": "measured on CPU",
    "critic": "never measured",
    "optimizer": "measured on CPU (AdamW)",
    "gradients": "measured on CPU",
    "activations": "measured on CPU",
    "masks": "measured on CPU",
    "head": "measured on CPU",
    "KV cache": "measured on CPU",
    "logits": "measured on CPU",
}
# nf4 with double quantization: half a byte, and a byte and 4 / 256 for each block of 64
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_HEAD_DTYPE = 4


@dataclass(frozen=True)
class StepPlan:
    """What a step needs, by phase and term, in bytes of one rank."""

    architecture: Architecture
    setup: Setup
    phases: dict[str, dict[str, int]]

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        """Bytes that it needs."""
        return sum(self.phases[self.phase].values())

    def totals(self) -> dict[str, int]:
        """Bytes of each phase."""
        return {name: sum(terms.values()) for name, terms in self.phases.items()}

    def fits(self, devices: Devices) -> bool:
        """Whether one of these devices holds it."""
        return self.total <= devices.usable_bytes

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "model": self.architecture.name,
            "family": self.architecture.family,
            "setup": asdict(self.setup),
            "phases_bytes": self.phases,
            "peak_phase": self.phase,
            "total_bytes": self.total,
        }


def estimate(architecture: Architecture, setup: Setup) -> StepPlan:
    """Plan a step.

    Args:
        architecture: from `architecture.read`.
        setup: how the run is set up.

    Raises:
        ValueError: see `trace.costs`.
    """
    decoder = costs(
        architecture,
        dtype=setup.weights,
        rank=setup.rank if setup.adapter else 0,
        checkpointing=setup.checkpointing,
        autocast=setup.autocast,
        # a part that is the whole changes nothing
        tile=setup.tile if setup.tile is not None and setup.tile < setup.tokens else None,
    )
    return StepPlan(architecture, setup, _Step(architecture, setup, decoder).phases())


class _Step:
    def __init__(self, architecture: Architecture, setup: Setup, decoder: Costs) -> None:
        self.of, self.setup, self.decoder = architecture, setup, decoder
        self.counts = architecture.counts
        self.shards = setup.ranks if setup.sharding == "fsdp2" else 1
        adapter = self.counts.adapter * setup.rank
        if self.shards > 1:
            # what does not grow with tokens is copies of weights, which are gathered anew instead
            own = replace(decoder.layer, fixed=0.0)
            self.decoder = replace(decoder, layer=own)
        self.trained = adapter if setup.adapter else self.counts.total
        # peft keeps adapters in fp32 over bf16 weights
        self.grad_itemsize = 4 if setup.adapter else setup.itemsize

    def phases(self) -> dict[str, dict[str, int]]:
        return {
            "sampling": self._sampling(),
            "scoring": self._scoring(),
            "backward begins": self._training(start=True),
            "backward ends": self._training(start=False),
        }

    def _weights(self) -> int:
        counts, setup = self.counts, self.setup
        if setup.method == "qlora":
            packed = counts.linear * NF4_BYTES + (counts.total - counts.linear) * setup.itemsize
        else:
            packed = counts.total * setup.itemsize
        adapter = 4 * self.trained if setup.adapter else 0
        return int(packed + adapter) // self.shards

    def _always(self) -> dict[str, int]:
        """What lies there in every phase once the optimizer has stepped."""
        setup = self.setup
        per_parameter, place = OPTIMIZERS[setup.optimizer]
        if setup.optimizer == "adamw":
            per_parameter = 2 * self.grad_itemsize
        state = 0 if "host" in place else self.trained * per_parameter / self.shards
        held = {"weights": self._weights(), "optimizer": int(state)}
        if setup.beta > 0 and not setup.adapter:
            held["reference"] = self._weights()
        if setup.critic == "separate":
            # another backbone, trained in full like the policy
            held["critic"] = int((self._weights() + state) + self._gradients(True))
        # DDP's buckets hold the gradients a second time
        if setup.ranks > 1 and self.shards == 1:
            held["gradients"] = self.trained * self.grad_itemsize
        return held

    def _gradients(self, all_of_them: bool) -> int:
        """All, or at the beginning of backward the head's alone."""
        if self.setup.adapter and not all_of_them:
            return 0
        table = self.counts.head or self.counts.embeddings
        trained = self.trained if all_of_them else table
        return trained * self.grad_itemsize // self.shards

    def _gathered(self, sampling: bool) -> int:
        """What FSDP2 puts together: two layers and the tail, or all for sampling."""
        if self.shards == 1:
            return 0
        if sampling:
            return self.counts.total * self.setup.compute_itemsize
        one = self.counts.layer_parameters // self.of.layers
        tail = self.counts.head or self.counts.embeddings
        # the gradient of a layer is whole until it is scattered
        return (2 * one + tail) * self.setup.compute_itemsize + one * self.grad_itemsize

    def _sampling(self) -> dict[str, int]:
        setup, of = self.setup, self.of
        tokens = setup.at_once * (setup.prompt + setup.completion)
        cache = 2 * of.KV * of.layers * setup.compute_itemsize * tokens
        # a cache grows by concatenation: the old and the new of one layer are there together
        cache += cache // of.layers
        prompts = max(1, setup.at_once // setup.generations) * setup.prompt
        # next-token logits in the model's dtype, in fp32, their softmax, and what sorting copies
        logits = setup.at_once * of.V * (setup.compute_itemsize + 3 * 4)
        return {
            **self._always(),
            "copies": self._copies(),
            "gathered": self._gathered(True),
            "KV cache": cache,
            "activations": min(self.decoder.forward.at(prompts), cache) + self._dequantized(),
            "logits": logits,
        }

    def _scoring(self) -> dict[str, int]:
        tokens = self.setup.tokens
        return {
            **self._always(),
            "copies": self._copies(),
            "gathered": self._gathered(False),
            "activations": self.decoder.forward.at(tokens) + self._dequantized(),
            "masks": self._masks(),
            "head": self._head(),
        }

    def _training(self, start: bool) -> dict[str, int]:
        setup, of, decoder = self.setup, self.of, self.decoder
        tokens = setup.tokens
        kept = decoder.kept(of.layers if start else 1, tokens)
        if setup.offload:
            kept = decoder.kept(min(2, of.layers) if start else 1, tokens)
        transient = decoder.transient(tokens) + self._dequantized()
        head = self._head_gradients() if start else 0
        # checkpointed layers keep none of autocast's copies, which end with the forward; without
        # checkpointing they are kept, and counted, with the layers
        copies = self._copies() if start and setup.checkpointing else 0
        # the head has its gradients before backward reaches a layer
        if head + copies > transient:
            transient = 0
        else:
            head = copies = 0
        held = self._always()
        gradients = held.pop("gradients", 0) + self._gradients(setup.accumulation > 1 or not start)
        if not start:
            gradients, kept, transient = self._last(gradients, kept, transient)
        return {
            **held,
            "gradients": gradients,
            "copies": copies,
            "gathered": self._gathered(False),
            "activations": kept + transient,
            "masks": self._masks(),
            "head": self._head() + head,
        }

    def _last(self, gradients: int, kept: int, transient: int) -> tuple[int, int, int]:
        """The larger of two moments: the first layer's backward, without its own gradients and the
        table's, and the table's, of which there are two where one was there before."""
        if self.setup.adapter or self.shards > 1:
            return gradients, kept, transient
        table = self.counts.embeddings * self.grad_itemsize
        second = self.setup.accumulation > 1
        layer = self.counts.layer_parameters // self.of.layers * self.grad_itemsize
        missing = 0 if second else layer + table * (not self.of.tied)
        doubled = table if second or self.of.tied else 0
        if kept + transient - missing > doubled:
            return gradients - missing, kept, transient
        return gradients + doubled, 0, 0

    def _copies(self) -> int:
        """bf16 copies of fp32 weights, which autocast keeps until its region ends."""
        # FSDP2 gathers bf16 weights, of which there is nothing to cast
        return self.counts.linear * 2 if self.setup.copies and self.shards == 1 else 0

    def _dequantized(self) -> int:
        """A layer's weight, unpacked for its product."""
        if self.setup.method != "qlora":
            return 0
        return self.counts.largest_linear * self.setup.compute_itemsize

    def _head(self) -> int:
        """Its workspace, which stays, and the copy of its weight that autocast multiplies."""
        setup, of = self.setup, self.of
        rows = setup.batch * setup.completion
        held = head_workspace(of.V, of.H, rows, setup.device, setup.workspace_bytes)
        return held + (of.V * of.H * 2 if setup.copies else 0)

    def _head_gradients(self) -> int:
        """The selected rows, dhidden, and dweight where it does not become the gradient."""
        setup, of = self.setup, self.of
        rows = setup.batch * setup.completion * of.H * (setup.compute_itemsize + _HEAD_DTYPE)
        stolen = setup.accumulation == 1 and setup.weights == "fp32" and self.shards == 1
        return rows + (0 if setup.adapter or stolen else _HEAD_DTYPE * of.V * of.H)

    def _masks(self) -> int:
        """An additive mask of the rows in the dtype of the model, and the bool one it is of."""
        if not self.setup.masks:
            return 0
        L = max(self.setup.length, 256)
        rows = max(1, -(-self.setup.tokens // L))
        return rows * L * L * (1 + self.setup.compute_itemsize)


def summary(plan: StepPlan, devices: Devices | None = None) -> str:
    """Two lines for the start of a run: what the step needs, of what, and in which phase.

    Args:
        plan: from `estimate`.
        devices: what it has to fit; None says nothing of that.
    """
    largest = sorted(plan.phases[plan.phase].items(), key=lambda item: -item[1])[:4]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest if size)
    room = "" if devices is None else f" of {devices.usable_bytes / GIB:.1f} GiB usable"
    setup = plan.setup
    ranks = "" if setup.ranks == 1 else f" on each of {setup.ranks} ranks"
    where = f"{setup.method}, {setup.batch} x {setup.length} tokens{ranks}"
    return (
        f"memory   {plan.total / GIB:.1f} GiB{room}, when {_when(plan.phase)} ({where})\n"
        f"         {parts} GiB; planned, not measured: `grpo-fast plan MODEL --measure`"
    )


def _when(phase: str) -> str:
    return phase if phase.startswith("backward") else f"{phase} runs"
