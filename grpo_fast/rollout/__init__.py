"""Prompts -> completions."""

from .continuous import ContinuousSampler
from .engines import SGLangSampler, VLLMSampler
from .failure import SamplerFailed
from .hf import HFSampler, generate
from .rollouts import Rollouts, Sampler, joined

__all__ = [
    "ContinuousSampler",
    "HFSampler",
    "Rollouts",
    "SGLangSampler",
    "Sampler",
    "SamplerFailed",
    "VLLMSampler",
    "generate",
    "joined",
]
