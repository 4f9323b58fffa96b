"""Fields of `TrainingArguments` that would change what GRPO computes, or do nothing here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from grpo_fast.checks import fail, is_number, nearest

if TYPE_CHECKING:
    from .config import GRPOConfig

# field -> the values it may have, and what to use instead
_WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": (
        (0, None),
        "a policy loss has no labels; entropy_coef keeps a policy from collapsing",
    ),
    "neftune_noise_alpha": (
        (None,),
        "noise on the embeddings would make another policy of the one that sampled",
    ),
    "train_sampling_strategy": (
        ("random",),
        "the order of prompts is that of shuffle_dataset",
    ),
    # the name before transformers 5
    "group_by_length": ((False, None), "the order of prompts is that of shuffle_dataset"),
}


def check_inherited(args: GRPOConfig) -> None:
    """Refuse what would change the groups, replace the head, or have no effect.

    Raises:
        ValueError: naming the field, and what to use instead.
    """
    for name, (allowed, instead) in _WITHOUT_EFFECT.items():
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            fail(name, repr(allowed[0]), repr(value), instead)
    for name in ("learning_rate", "weight_decay", "adam_epsilon"):
        value = getattr(args, name)
        if not is_number(value) or not 0 <= value < float("inf"):
            fail(name, "a finite number >= 0", repr(value))
    if args.remove_unused_columns:
        hint = "it would drop the prompt and reward columns."
        fail("remove_unused_columns", "False", True, hint)
    if args.auto_find_batch_size:
        fail("auto_find_batch_size", "False", True, "it would change the groups.")
    if getattr(args, "enable_jit_checkpoint", False):
        hint = "it saves within a step, when the rollouts of the next one are already drawn."
        fail("enable_jit_checkpoint", "False", True, hint)
    _check_parallelism(getattr(args, "parallelism_config", None))
    _check_generation(args.generation_kwargs or {})
    if not args.use_liger_kernel:
        return
    # Liger's layers are welcome, its forward would take the place of the one with our head
    name = "fused_linear_cross_entropy"
    args.liger_kernel_config = {name: False, **(args.liger_kernel_config or {})}
    if args.liger_kernel_config[name]:
        fail("liger_kernel_config", f"{name} False", True, "it would replace the head.")


def _check_parallelism(config: Any) -> None:
    """Refuse what splits a sequence behind the loss's back; fields of accelerate's config."""
    ulysses = "grpo_fast.models.sequence_parallel splits packed rows."
    for name, hint in (
        # its hooks drop the mask and force is_causal
        (
            "cp_size",
            f"ring attention lets packed sequences see their neighbours, silently; {ulysses}",
        ),
        ("sp_size", f"accelerate's Ulysses computes a loss of labels itself; {ulysses}"),
        ("tp_size", "the ranks of a tensor-parallel group would each draw prompts of their own."),
    ):
        size = getattr(config, name, None) or 1
        if size > 1:
            fail(f"parallelism_config.{name}", "1", size, hint)


def _check_generation(given: dict[str, Any]) -> None:
    """GenerationConfig keeps a field that it does not know, and `generate` never reads it."""
    known = sorted(name for name in GenerationConfig().to_dict() if not name.startswith("_"))
    for name in given:
        if name not in known:
            # without the list of all 60
            hint = nearest(name, known)
            hint = hint.split("? ")[0] + "?" if hint.startswith("did you mean") else ""
            fail("generation_kwargs", "fields of GenerationConfig", repr(name), hint)
