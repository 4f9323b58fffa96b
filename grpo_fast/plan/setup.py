"""How a run is set up, as far as its memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_fast.checks import fail

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = {
    # bytes of state for each trained parameter whose weights are fp32, and where they lie
    "adamw": (8.0, "device"),
    "adamw_8bit": (2.06, "device"),
    "paged_adamw_8bit": (2.06, "host where the device is full"),
    "sgd": (0.0, "device"),
}
SHARDINGS = ("none", "fsdp2")
CRITICS = ("none", "shared", "separate")


@dataclass(frozen=True)
class Setup:
    """What a step depends on, in tokens and bytes of one rank.

    Args:
        method: "full", "lora" (an adapter at every linear layer but the head) or "qlora" (the same
            over a base that is packed as nf4 with double quantization).
        weights: dtype of the weights that are loaded, "fp32" or "bf16"; of qlora, of what is not
            packed.
        autocast: bf16 autocast.
        rank: of the adapter.
        ranks: processes, one on each device.
        sharding: "none" (data parallel, whole weights on every rank) or "fsdp2".
        batch: sequences of a micro-batch (per_device_train_batch_size).
        accumulation: micro-batches of an optimizer step.
        sampled: sequences that a rank samples at once; None: batch x accumulation.
        prompt, completion: tokens of a prompt and a completion, the longest ones.
        generations: completions of a prompt.
        checkpointing: activation checkpointing.
        offload: the checkpoints lie in host memory.
        tile: `mlp_tile`.
        optimizer: one of `OPTIMIZERS`.
        beta: above 0, full training holds a reference policy.
        critic: of PPO: "none", "shared" (a head on the policy) or "separate" (another model).
        masks: packed rows of several sequences need an additive mask (sdpa and eager attention
            for sequences under half a row); flash attention and rows of one sequence need none.
        share_prompts: a prompt is computed once for the completions of a group that are in one
            micro-batch.
        workspace_bytes: budget of the logits.
        device: "cuda" or "cpu".

    Raises:
        ValueError: a value out of range, or two that exclude each other.
    """

    method: str = "full"
    weights: str = "fp32"
    autocast: bool = False
    rank: int = 16
    ranks: int = 1
    sharding: str = "none"
    batch: int = 1
    accumulation: int = 8
    sampled: int | None = None
    prompt: int = 512
    completion: int = 512
    generations: int = 8
    checkpointing: bool = False
    offload: bool = False
    tile: int | None = None
    optimizer: str = "adamw"
    beta: float = 0.0
    critic: str = "none"
    masks: bool = False
    share_prompts: bool = False
    workspace_bytes: int | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("weights", ("fp32", "bf16")),
            ("sharding", SHARDINGS),
            ("optimizer", tuple(OPTIMIZERS)),
            ("critic", CRITICS),
            ("device", ("cuda", "cpu")),
        ):
            if getattr(self, name) not in allowed:
                fail(name, f"one of {', '.join(allowed)}", repr(getattr(self, name)))
        lowest = {"rank": 1, "ranks": 1, "batch": 1, "accumulation": 1, "prompt": 1}
        for name, low in (*lowest.items(), ("completion", 1), ("generations", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                fail(name, f"an integer >= {low}", repr(value))
        if self.beta < 0:
            fail("beta", "a number >= 0", self.beta)
        if self.offload and not self.checkpointing:
            fail("offload", "False without checkpointing", True, "it moves the checkpoints.")
        if self.method == "qlora" and self.sharding == "fsdp2":
            hint = "sharded 4-bit weights were never tried; qlora runs data parallel."
            fail("sharding", "'none' with qlora", self.sharding, hint)

    @property
    def length(self) -> int:
        """Tokens of a sequence, as the forward of training sees it."""
        return self.prompt + self.completion - 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that the backbone computes."""
        if not self.share_prompts:
            return self.batch * self.length
        groups = -(-self.batch // self.generations)
        return groups * self.prompt + self.batch * (self.completion - 1)

    @property
    def at_once(self) -> int:
        """Sequences that a rank samples at once."""
        return self.batch * self.accumulation if self.sampled is None else self.sampled

    @property
    def adapter(self) -> bool:
        """Whether an adapter is trained."""
        return self.method != "full"

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 4 if self.weights == "fp32" else 2

    @property
    def compute_itemsize(self) -> int:
        """Bytes of a weight where it is multiplied."""
        return 2 if self.autocast else self.itemsize

    @property
    def copies(self) -> bool:
        """Whether autocast keeps bf16 copies of fp32 weights."""
        return self.autocast and self.weights == "fp32"
