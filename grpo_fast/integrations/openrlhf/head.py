"""The head of a causal language model: checked once, and left to a function for a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from grpo_fast.checks import fail
from grpo_fast.engine.gathering import Source, is_zero3
from grpo_fast.models.head import Head, backbone, check_head, find_head, innermost

__all__ = ["check_engine", "headless"]

_CHECKED = "_grpo_fast_checked"


def check_engine(model: nn.Module) -> None:
    """Check the head of a model at its first call: see `check_head`.

    Raises:
        ValueError: the head, or what DeepSpeed was told to do with the model, cannot be honoured.
    """
    if getattr(model, "autotp_size", int)() > 1:
        fail("ds.tensor_parallel_size", "1", model.autotp_size())
    if getattr(model, "is_deepcompile_enabled", bool)():
        fail("ds.deepcompile", "False: the forward would be compiled with its logits", True)
    lm = innermost(model)
    if not lm.__dict__.get(_CHECKED):
        head = find_head(lm, partitioned=True)
        if head.lora is not None and is_zero3(head.lora[0]):
            fail("ds.zero_stage", "2 with a LoRA adapter on lm_head, or none on it", 3)
        check_head(lm, _gathered(head))
        setattr(lm, _CHECKED, True)


def _gathered(head: Head) -> Head:
    """The head with the data of what ZeRO-3 has partitioned of it, which all ranks gather."""
    parts = {"weight": head.weight, "bias": head.bias}
    parts = {n: Source(p, p._version).unpack() for n, p in parts.items() if is_zero3(p)}
    return replace(head, **parts)


@contextmanager
def headless(model: nn.Module, fn: Callable[[Tensor, Head], Tensor]) -> Iterator[None]:
    """Inside, `model(...)["logits"]` is `fn(hidden, head)` and no logits are computed.

    All else of the forward stays the model's own, a router loss among it, and the result takes the
    way of the logits through every wrapper: DeepSpeed scales gradients by hooks on the output.

    Args:
        model: the model, wrapped or not; one thread at a time.
        fn: hidden (R, L, H) in the dtype of the head weight -> a tensor (R, L, ...).

    Raises:
        ValueError: the head is not one `find_head` knows, or the model does not call it once.
    """
    lm = innermost(model)
    module, inner = lm.get_output_embeddings(), lm.forward
    # here: a weight that is taken from its module in a forward becomes one of the model's own for
    # ZeRO-3, which then gathers it first and finds another order than it has recorded
    head = find_head(lm, partitioned=True)
    seen: list[Tensor] = []
    calls: list[int] = []

    def below(_: nn.Module, __: Any, output: Any) -> None:
        # not what the head is given: some families scale it in between, which Head knows of
        seen.append(output[0])

    def one_column(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        # what the family does to its logits is done to this, for nothing
        calls.append(1)
        return hidden[..., :1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.clear(), calls.clear()
        output = inner(*args, **kwargs)
        if len(calls) != 1 or len(seen) != 1:
            got = f"{len(calls)} calls of it in the forward of {type(lm).__name__}"
            raise ValueError(f"model: expected one call of the output embedding, got {got}.")
        output["logits"] = fn(seen.pop().to(head.weight.dtype), head)
        return output

    handle = backbone(lm).register_forward_hook(below)
    try:
        with _instead(module, one_column), _instead(lm, forward):
            yield
    finally:
        handle.remove()


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in the place of the module's own; its hooks run as before."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
