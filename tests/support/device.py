"""A device that is not the CPU, on a machine that has none: tensors of device "meta" that do hold
values, and a count of what makes the host wait for them."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from grpo_fast.engine import torch_backend
from grpo_fast.engine.backend import Backend

aten = torch.ops.aten
DEVICE = torch.device("meta")
# results whose value, or whose number of elements, the host has to know
WAITING = (
    aten._local_scalar_dense,
    aten.item,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class OnDevice(torch.Tensor):
    """A tensor that says it is elsewhere."""

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
        )

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    @property
    def is_meta(self) -> bool:
        """It does hold numbers."""
        return False

    def tolist(self) -> list:
        """One copy to the host."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, [])


class Device(TorchDispatchMode):
    """While active, factories know the device, and `waits` lists what the host waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, self.waits)


def to_device(value: torch.Tensor | None) -> torch.Tensor | None:
    """A copy on the device."""
    return None if value is None else OnDevice(value.detach().clone())


def _raw(value):
    return tree_map(lambda x: x.value if isinstance(x, OnDevice) else x, value)


def _flat(args, kwargs) -> list[torch.Tensor]:
    out = []
    tree_map(lambda x: out.append(x) if isinstance(x, torch.Tensor) else None, (args, kwargs))
    return out


def _waits(func, args, kwargs, tensors) -> bool:
    packet = func.overloadpacket
    here = [isinstance(t, OnDevice) for t in tensors]
    if packet in WAITING:
        return any(here)
    if packet is aten.repeat_interleave:
        return any(here) and kwargs.get("output_size") is None
    if packet in INDEXING:
        return any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None)
    if packet is aten.copy_:
        return here[0] != here[1] and not (args[2:] and args[2])
    if packet is aten._to_copy and kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == DEVICE
        # from pageable memory a copy that need not block does not
        return there != here[0] and not (there and kwargs.get("non_blocking"))
    return False


def _call(func, args, kwargs, waits: list[str]):
    tensors = _flat(args, kwargs)
    elsewhere = any(isinstance(t, OnDevice) for t in tensors)
    if _waits(func, args, kwargs, tensors):
        waits.append(str(func))
    device = kwargs.get("device")
    moved = device is not None and func.overloadpacket is aten._to_copy
    if device is not None:
        elsewhere = torch.device(device) == DEVICE
        kwargs = {**kwargs, "device": "cpu"}
    copies = moved or func.overloadpacket is aten.copy_
    if elsewhere and not copies:
        mixed = [t for t in tensors if not isinstance(t, OnDevice) and t.dim()]
        assert not mixed, f"{func} mixes devices"
    out = func(*_raw(args), **_raw(kwargs))
    # what was written to, or handed through, stays the tensor it was
    known = {id(t.value): t for t in tensors if isinstance(t, OnDevice)}

    def wrap(x):
        if not isinstance(x, torch.Tensor) or not elsewhere:
            return x
        return known[id(x)] if id(x) in known else OnDevice(x)

    return tree_map(wrap, out)


def launched(function):
    """A row function as a kernel: it gets memory, and no operation of torch sees it run."""

    def wrapper(*args, **kwargs):
        for value in _flat(args, kwargs):
            assert isinstance(value, OnDevice), "a kernel got memory of the host"
        with torch.utils._python_dispatch._disable_current_modes():
            function(*_raw(args), **_raw(kwargs))

    return wrapper


def kernels(device) -> Backend:
    """What `backend.select` gives for an accelerator, with the torch functions as its kernels."""
    names = ("logprob_fwd", "logprob_bwd", "policy", "scale")
    return Backend("kernels", "a test", *(launched(getattr(torch_backend, n)) for n in names))
