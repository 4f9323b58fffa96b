"""OpenRLHF: its actor and its policy loss, fused."""

from .actor import TESTED, install, uninstall

__all__ = ["TESTED", "install", "uninstall"]
