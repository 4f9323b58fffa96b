"""Prompts -> completions."""

from .hf import generate
from .rollouts import Rollouts

__all__ = ["Rollouts", "generate"]
