"""The command line, `grpo-fast`: train, plan and doctor."""

from .main import main

__all__ = ["main"]
