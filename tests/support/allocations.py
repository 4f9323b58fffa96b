"""A dispatch hook that knows how many bytes of tensors are alive, and how large the largest was."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts what is allocated inside the `with`; what was there before counts nothing."""

    def __init__(self, *before: torch.Tensor):
        super().__init__()
        self.before = {t.untyped_storage()._cdata for t in before}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
                storage = t.untyped_storage()
                if storage._cdata not in self.before:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out
