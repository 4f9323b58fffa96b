"""The policy that the KL is against: a frozen copy, or the model without its adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.checks import fail
from grpo_fast.models.critic import without_critic
from grpo_fast.models.head import evaluating, innermost
from grpo_fast.models.sharding import (
    full_state,
    gathered_parameters,
    load_full_state,
    plain_name,
    reshard,
)


class ReferencePolicy:
    """The policy that the KL term compares with.

    A full model is copied once, frozen and in eval mode. Of a PEFT model nothing is copied: the
    reference is the same model with its adapter switched off.

    Args:
        model: the policy, before an engine shards it.
        peft: whether it is a PEFT model.
        shard: gives a copy to the engine that shards the policy, and returns what to call; None:
            the copy stays whole. Every rank then takes part in every method here.
    """

    # a checkpoint holds it once for all ranks
    shared = True

    def __init__(
        self, model: nn.Module, peft: bool, shard: Callable[[nn.Module], nn.Module] | None = None
    ) -> None:
        self.peft = peft
        if peft:
            while not hasattr(model, "disable_adapter"):
                if not isinstance(getattr(model, "module", None), nn.Module):
                    fail("model", "a PeftModel", type(model).__name__)
                model = model.module
            self.model = model
        else:
            self.model = copy.deepcopy(model).requires_grad_(False).eval()
            if shard is not None:
                self.model = shard(self.model)

    def logprobs(self, fn: Callable[[nn.Module], Any]) -> Any:
        """Return `fn(reference)`, without gradients, in eval mode and without the adapter."""
        if not self.peft:
            with torch.no_grad():
                out = fn(self.model)
        else:
            with torch.no_grad(), evaluating(self.model), self.model.disable_adapter():
                out = fn(self.model)
        reshard(self.model)
        return out

    @torch.no_grad()
    def sync(self, model: nn.Module, alpha: float) -> None:
        """`reference = (1 - alpha) * reference + alpha * model`, parameter by parameter.

        The moving reference of "Learn Your Reference Model for Real Good Alignment" (TR-DPO, 2024).

        Raises:
            ValueError: alpha is not in (0, 1]; the reference is an adapter switched off; or the
                parameters of `model` have other names or shapes.
        """
        if self.peft:
            expected = "a full model, whose reference can move"
            fail("model", expected, "a PEFT model, whose reference is its base")
        if not 0 < alpha <= 1:
            fail("alpha", "a number in (0, 1]", alpha)
        # what a forward left whole is no shard, and an engine would not see its change
        reshard(model)
        ours = _named(self.model)
        theirs = without_critic(_named(model))
        if [(n, _shape(p)) for n, p in ours.items()] != [(n, _shape(p)) for n, p in theirs.items()]:
            fail("model", "the parameters that the reference was made from", "others")
        for name, reference in ours.items():
            with gathered_parameters([theirs[name]]), gathered_parameters([reference], modify=True):
                reference.lerp_(theirs[name].to(reference), alpha)

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the weights of the reference, or None when it is an adapter switched off.

        Every rank asks; of a sharded one rank 0 gets them, and the others get an empty dict.
        """
        return None if self.peft else full_state(innermost(self.model))

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: a PEFT reference is given weights, or a full one is given None.
        """
        if (state is None) != self.peft:
            kind = "None" if self.peft else "a state dict"
            fail("state", f"{kind} for this reference", "the other")
        if state is not None:
            load_full_state(innermost(self.model), state)


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(n): p for n, p in innermost(model).named_parameters()}


def _shape(parameter: Tensor) -> torch.Size:
    """(V, H) also of a parameter that ZeRO-3 has partitioned, whose own is (0,)."""
    return getattr(parameter, "ds_shape", parameter.shape)
