"""Prompts -> completions."""

from .hf import HFSampler, generate
from .rollouts import Rollouts, Sampler

__all__ = ["HFSampler", "Rollouts", "Sampler", "generate"]
