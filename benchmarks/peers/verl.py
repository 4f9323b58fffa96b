"""verl: its fused heads, over a loss in torch."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.peers.peer import Peer, cuda_only, on_logp


def _verl(module: str) -> ModuleType:
    """verl.<module> without running verl/__init__.py, which needs ray and tensordict."""
    spec = importlib.machinery.PathFinder.find_spec("verl")
    if spec is None:
        raise ImportError("No module named 'verl'")
    folder = Path(spec.submodule_search_locations[0])
    for name, path in (("verl", folder), ("verl.utils", folder / "utils")):
        if name not in sys.modules:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    return importlib.import_module(f"verl.{module}")


def _packed(batch: Batch) -> tuple[Tensor, Tensor]:
    """(N, H) hidden states and (N,) ids of the unmasked tokens, as verl runs without padding."""
    index = batch.mask.view(-1).nonzero()[:, 0]
    flat = batch.hidden.view(-1, batch.hidden.shape[-1])
    return flat.index_select(0, index), batch.ids.view(-1)[index]


def _verl_torch(case: Case) -> Callable[[Batch], Tensor]:
    fused = _verl("utils.experimental.torch_functional").FusedLinearForPPO()

    def run(batch: Batch) -> Tensor:
        hidden, ids = _packed(batch)
        return fused(hidden, batch.weight, ids, temperature=1.0)[0]

    return run


def _verl_triton(case: Case) -> Callable[[Batch], Tensor]:
    linear_cross_entropy = _verl("utils.kernel.linear_cross_entropy").linear_cross_entropy

    def run(batch: Batch) -> Tensor:
        hidden, ids = _packed(batch)
        return linear_cross_entropy(hidden, batch.weight, ids, 1.0, "none")[0]

    return run


def _verl_shapes(case: Case, level: str, device: torch.device) -> str | None:
    if device.type == "cuda" and case.H % 128:
        return f"Its kernels need a hidden size that 128 divides, and H is {case.H}."
    return cuda_only(case, level, device)


CONTESTANTS: tuple[Peer, ...] = (
    Peer(
        "verl",
        "verl",
        "FusedLinearForPPO(chunk_size=512, impl_backend='torch') without padding; loss in torch",
        on_logp(_verl_torch),
    ),
    Peer(
        "verl Triton",
        "verl",
        "linear_cross_entropy(reduction='none') without padding; loss in torch",
        on_logp(_verl_triton),
        _verl_shapes,
    ),
)
