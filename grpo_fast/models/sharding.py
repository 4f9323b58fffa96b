"""A model whose parameters an engine keeps in shards: FSDP2's units, ZeRO-3's partitions, and the
rows of an lm_head that stay where they are.

What is left after a pass without a backward, what generation needs, and the state of a whole model.
Every function takes a model that nothing shards too, and then does nothing or the usual.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grpo_fast.engine.gathering import is_dtensor, is_zero3

# what DeepSpeed and torch put into the names of parameters, and take out again when they save
_CHECKPOINTED = "_checkpoint_wrapped_module."
# in `ds_active_sub_modules` it keeps ZeRO-3 from releasing a parameter between modules
_HELD = -1
# marks a head that is split by the vocabulary; a mark on a parameter would not outlive `.to()`
SPLIT = "_grpo_fast_split"
# root -> the units that it keeps whole after a forward; learned in the first one
_KEPT: WeakKeyDictionary[nn.Module, list[nn.Module]] = WeakKeyDictionary()


def plain_name(name: str) -> str:
    """The name of a parameter without that of a wrapper for activation checkpointing."""
    return name.replace(_CHECKPOINTED, "")


def is_unit(module: nn.Module | None) -> bool:
    """True for a unit of FSDP2; there is none before torch's module of it was imported."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def units(model: nn.Module) -> list[nn.Module]:
    """FSDP2 units of the model, the root first; none where it is whole."""
    return [m for m in model.modules() if is_unit(m)]


def as_forward_of(module: nn.Module, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """`function(hidden)` as the module's own forward, so that the hooks around it run: FSDP2
    gathers the unit before, and reduces its gradient after the backward."""
    previous = module.__dict__.get("forward")
    module.forward = function
    try:
        return module(hidden)
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous


def is_sharded(model: nn.Module) -> bool:
    """True when an engine shards parameters of the model, gathered at the moment or not."""
    return bool(units(model)) or any(is_dtensor(p) or is_zero3(p) for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give back what a forward without a backward left whole.

    accelerate's last unit, the final norm and the lm_head, keeps V x H whole after its forward, and
    `parameters()` then yields plain tensors, of which an optimizer must not be built.
    """
    for unit in units(model):
        unit.reshard()


def _own(unit: nn.Module) -> list[Tensor]:
    """Parameters that the unit itself gathers, and no unit inside of it."""
    inside = {id(p) for child in units(unit) if child is not unit for p in child.parameters()}
    return [p for p in unit.parameters() if id(p) not in inside]


def _kept_whole(model: nn.Module) -> list[nn.Module]:
    """Units that stay whole after a forward (`reshard_after_forward=False`).

    Learned from one forward of one token, which also makes the outermost module the root: a unit
    that runs or is gathered before it would become a root itself.
    """
    if model not in _KEPT:
        device = next(model.parameters()).device
        one = torch.zeros(1, 1, dtype=torch.int64, device=device)
        reshard(model)
        with torch.no_grad():
            model(input_ids=one, position_ids=one, use_cache=False, head_fn=lambda h, head: h)
        _KEPT[model] = [u for u in units(model) if any(not is_dtensor(p) for p in _own(u))]
    return _KEPT[model]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights, and a forward waits for no other rank.

    Every rank has to enter it. So completions of unequal length may be sampled; a backward pass
    inside is not possible. The memory is that of the model in its compute dtype.
    """
    partitioned = list(dict.fromkeys(p for p in model.parameters() if is_zero3(p)))
    with _gathered(partitioned), _whole_heads(model):
        gathered = [u for u in units(model) if u not in _kept_whole(model)]
        for unit in gathered:
            unit.set_reshard_after_forward(False, recurse=False)
        for unit in units(model):
            unit.unshard()
        try:
            yield
        finally:
            for unit in gathered:
                unit.set_reshard_after_forward(True, recurse=False)
            reshard(model)


@contextmanager
def by_layer(model: nn.Module) -> Iterator[None]:
    """Inside, a forward of a part of the model gathers each layer as it comes to it.

    All ranks have to make the same number of forwards (`generate(synced_gpus=True)`). What belongs
    to the root alone is whole meanwhile, since the hooks of an outer root (PEFT's) do not run.
    """
    with _whole_heads(model):
        if units(model):
            _kept_whole(model)
            units(model)[0].unshard()
        try:
            yield
        finally:
            reshard(model)


@contextmanager
def _gathered(partitioned: list[Tensor]) -> Iterator[None]:
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        for parameter in partitioned:
            parameter.ds_active_sub_modules.add(_HELD)
        try:
            yield
        finally:
            for parameter in partitioned:
                parameter.ds_active_sub_modules.discard(_HELD)


@contextmanager
def _whole_heads(model: nn.Module) -> Iterator[None]:
    """Inside, a parameter that is split by the vocabulary and outside of FSDP2's units is whole."""
    split = [
        (module, name, p)
        for module in model.modules()
        if getattr(module, SPLIT, False)
        for name, p in module.named_parameters(recurse=False)
    ]
    for module, name, p in split:
        module._parameters[name] = nn.Parameter(p.detach().full_tensor(), requires_grad=False)
    try:
        yield
    finally:
        for module, name, p in split:
            module._parameters[name] = p


def gathered_parameters(parameters: list[Tensor], modify: bool = False) -> Any:
    """A context in which ZeRO-3 parameters hold their data; with `modify` rank 0 may change it."""
    partitioned = [p for p in parameters if is_zero3(p)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, on the CPU: on rank 0, and empty on the others of a sharded model.

    Every rank calls it. Weights that are tied stand under all of their names.
    """
    if any(is_zero3(p) for p in model.parameters()):
        main = torch.distributed.get_rank() == 0
        state = {}
        for name, value in model.state_dict(keep_vars=True).items():
            with gathered_parameters([value]):
                if main:
                    state[name] = value.detach().cpu().clone()
        return state
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    reshard(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def load_full_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model, sharded or not, the whole state dict, which every rank has read."""
    if any(is_zero3(p) for p in model.parameters()):
        with torch.no_grad():
            for name, value in model.state_dict(keep_vars=True).items():
                with gathered_parameters([value], modify=True):
                    if not is_zero3(value) or torch.distributed.get_rank() == 0:
                        value.copy_(state[name])
        return
    if not is_sharded(model):
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    reshard(model)
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
