"""OpenRLHF: its actor and its policy loss, fused."""

from .actor import install, uninstall

__all__ = ["install", "uninstall"]
