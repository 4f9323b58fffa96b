"""All contestants."""

from benchmarks.peers.peer import LogitsBatch, Peer, torch_loss
from benchmarks.peers.plain_torch import PEERS, reason, version

__all__ = ["PEERS", "LogitsBatch", "Peer", "reason", "torch_loss", "version"]
