"""All contestants, one library a file.

Nothing of another library is imported before its contestant is built. One that cannot run stays in
`PEERS`, and `reason` says in a sentence why.
"""

from __future__ import annotations

import importlib.metadata

import torch

from benchmarks.cases import Case
from benchmarks.peers import cce, fla, helion, liger, ours, plain_torch, trl, verl
from benchmarks.peers.peer import LogitsBatch, Peer, torch_loss
from grpo_fast import __version__

__all__ = ["PEERS", "LogitsBatch", "Peer", "reason", "torch_loss", "version"]

# ours is the first: it alone has to pass the gate
PEERS: tuple[Peer, ...] = (
    *ours.CONTESTANTS,
    *plain_torch.CONTESTANTS,
    *trl.CONTESTANTS,
    *liger.CONTESTANTS,
    *cce.CONTESTANTS,
    *verl.CONTESTANTS,
    *fla.CONTESTANTS,
    *helion.CONTESTANTS,
)


def reason(peer: Peer, case: Case, level: str, device: torch.device | str) -> str | None:
    """Why `peer` cannot run this, in a sentence; None when it can."""
    if level not in peer.build:
        return f"{peer.name} offers nothing for the level {level!r}."
    refusal = peer.refuses(case, level, torch.device(device))
    if refusal is not None:
        return refusal
    try:
        peer.build[level](case)
    # The boundary to packages that are optional: a missing one is a line in a table, no failure.
    except ImportError as error:
        return f"{peer.package} cannot be imported: {str(error).rstrip('.')}."
    return None


def version(peer: Peer) -> str | None:
    """The installed version of the contestant's package, None when there is none."""
    # A checkout on the path has no metadata.
    if peer.package == "grpo_fast":
        return __version__
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return None
