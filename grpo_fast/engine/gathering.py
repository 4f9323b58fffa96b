"""An lm_head that a call gathers, and gathers again in backward: FSDP2's DTensors and the
partitioned parameters of DeepSpeed's ZeRO-3."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.checks import fail, no_double_backward


def is_dtensor(value: object) -> bool:
    """True for a DTensor; there is none before its module was imported, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_zero3(value: object) -> bool:
    """True for a parameter that ZeRO-3 manages, gathered at the moment or not."""
    return hasattr(value, "ds_id") and hasattr(value, "ds_status")


class _Gather(torch.autograd.Function):
    """A DTensor's shards -> the whole; its gradient is averaged over the mesh, as FSDP2 does it."""

    @staticmethod
    def forward(ctx, shard):
        ctx.mesh, ctx.placements, ctx.dtype = shard.device_mesh, shard.placements, shard.dtype
        return shard.full_tensor()

    @staticmethod
    @no_double_backward
    def backward(ctx, grad):
        from torch.distributed.tensor import DTensor, Partial

        # summed in fp32 whatever the weight is stored in; every rank's part was rounded once before
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        part = DTensor.from_local(wide, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return part.redistribute(placements=ctx.placements).div(ctx.mesh.size()).to(ctx.dtype)


class _Whole(torch.autograd.Function):
    """A gathered ZeRO-3 parameter -> its data; the gradient goes to the parameter as it comes, and
    there to the hook with which DeepSpeed averages and partitions it."""

    @staticmethod
    def forward(ctx, parameter):
        # an alias: it keeps the memory that partitioning takes from the parameter
        return parameter.data

    @staticmethod
    @no_double_backward
    def backward(ctx, grad):
        return grad


def _available(parameter: Tensor) -> bool:
    """True while the parameter holds all of its data; a prefetched one has only its shape yet."""
    return parameter.ds_status.name == "AVAILABLE"


@contextmanager
def _whole(parameter: Tensor) -> Iterator[None]:
    """Inside, a ZeRO-3 parameter holds its data; it is partitioned again where it was before."""
    if parameter.ds_status.name == "INFLIGHT":
        _finish_prefetch(parameter)
    if _available(parameter):
        yield
        return
    # `deepspeed.zero` is an attribute and no module that could be imported from
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def _finish_prefetch(parameter: Tensor) -> None:
    """Wait for what DeepSpeed gathers ahead of its modules; `GatheredParameters` does not."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    for module in FWD_MODULE_STACK:
        handle = getattr(module, "ds_inflight_param_registry", {}).get(parameter)
        if handle is not None:
            # it stays in the registry, from where its module waits a second time, for nothing
            handle.wait()
    if not _available(parameter):
        raise RuntimeError(
            "DeepSpeed is gathering the lm_head ahead of its module, and no engine here knows of "
            "it; set stage3_prefetch_bucket_size to 0."
        )


def _lend_a_shape(node: torch.autograd.graph.Node, parameter: Tensor) -> None:
    """While `node` accumulates the gradient of a partitioned parameter, that has its whole shape.

    Autograd compares the strides of a gradient (V, H) with those of its parameter, which holds
    nothing (0,) outside of DeepSpeed's modules. One element expanded to (V, H) does for it.
    """
    lent = []

    def before(_) -> None:
        if parameter.shape != parameter.ds_shape:
            parameter.data = parameter.new_empty(()).detach().expand(parameter.ds_shape)
            lent.append(parameter.data_ptr())

    def after(*_) -> None:
        # unless a hook of DeepSpeed has gathered it
        if lent and parameter.data_ptr() == lent.pop():
            parameter.data = parameter.new_empty(0).detach()

    node.register_prehook(before)
    node.register_hook(after)


@dataclass
class Source:
    """What a backward pass gets a saved tensor from; a gathered one is gathered again."""

    parameter: Tensor
    version: int
    """What in-place changes of the parameter count up."""

    def unpack(self) -> Tensor:
        """The whole tensor, without a graph."""
        if self.parameter._version != self.version:
            raise RuntimeError(
                "the hidden states or the sharded lm_head were modified between the forward and "
                "the backward pass of linear_logprob; call backward before the optimizer steps."
            )
        if is_dtensor(self.parameter):
            return self.parameter.full_tensor()
        if is_zero3(self.parameter):
            with _whole(self.parameter):
                return self.parameter.data
        return self.parameter


def _from_zero3(name: str, parameter: Tensor) -> Tensor:
    """The whole of a ZeRO-3 parameter, whose gradient goes through DeepSpeed's hook on it."""
    wanted = parameter.requires_grad and torch.is_grad_enabled()
    if wanted and not parameter._post_accumulate_grad_hooks:
        if _available(parameter):
            return parameter
        expected = (
            "a frozen parameter, torch.no_grad(), or one that an engine of deepspeed.initialize() "
            "trains: without its reduce hook (a ZeRO-3 leaf module has none on its parameters) "
            "the gradient would be neither averaged nor partitioned"
        )
        fail(name, expected, "a partitioned parameter that requires a gradient and has no hook")
    with _whole(parameter):
        if not wanted:
            return parameter.data
        whole = _Whole.apply(parameter)
        # made while the parameter has its shape, by which autograd checks the gradient
        ((node, _),) = whole.grad_fn.next_functions
        _lend_a_shape(node, parameter)
        return whole


def gathered(name: str, value: Tensor | None) -> tuple[Tensor | None, Source | None]:
    """The whole of a sharded tensor and where it came from; anything else as it is."""
    if is_dtensor(value):
        from torch.distributed.tensor import Replicate, Shard

        if any(type(p) is not Replicate and p != Shard(0) for p in value.placements):
            fail(name, "a DTensor of placements Shard(0) or Replicate()", value.placements)
        return _Gather.apply(value), Source(value.detach(), value._version)
    if is_zero3(value):
        return _from_zero3(name, value), Source(value, value._version)
    return value, None
