"""prime-rl needs CUDA and is on no index, so where it is missing these modules stand in for it: the
two dataclasses of a custom loss and the chunked head, by their documented interface."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types

import torch
from torch import Tensor, nn


@dataclasses.dataclass
class LossInputs:
    """What a custom loss gets for one sample; each (T,)."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclasses.dataclass
class LossOutputs:
    """What it returns."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Logits(torch.autograd.Function):
    """The function behind the head, by logits; its entropy has no gradient, as in prime-rl."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, inv_temperature, chunk_size):
        with torch.enable_grad():
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            logits = leaves[0] @ leaves[1].T * inv_temperature[:, None]
            log_p = logits.float().log_softmax(-1)
            logp = log_p.gather(-1, labels[:, None])[:, 0]
        ctx.graph = logp, leaves
        p = log_p.detach().exp()
        return logp.detach(), -(p * log_p.detach()).sum(-1)

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        assert dentropy is None or not dentropy.any()
        logp, leaves = ctx.graph
        return (*torch.autograd.grad(logp, leaves, dlogp), None, None, None)


class FusedOutputLinear(nn.Linear):
    """lm_head that returns log-probs and entropies of labels."""

    def __init__(self, in_features: int, out_features: int, chunk_size: int):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(self, hidden_states, labels, temperature):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        given = (flat, self.weight, labels.reshape(-1), 1.0 / temperature.reshape(-1))
        function = sys.modules[_HEAD]._SequenceChunkedLogProbEntropyFn
        found = function.apply(*given, self.chunk_size)
        return {
            n: t.view(labels.shape) for n, t in zip(("logprobs", "entropy"), found, strict=True)
        }


_HEAD = "prime_rl.trainer.models.layers.lm_head"
_CONTENTS = {
    "prime_rl.trainer.rl.loss": {"LossInputs": LossInputs, "LossOutputs": LossOutputs},
    _HEAD: {"FusedOutputLinear": FusedOutputLinear, "_SequenceChunkedLogProbEntropyFn": Logits},
}


def install() -> None:
    """Put the stand-ins where prime-rl is missing."""
    if "prime_rl" in sys.modules or importlib.util.find_spec("prime_rl") is not None:
        return
    for path, contents in _CONTENTS.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            module = sys.modules.setdefault(name, types.ModuleType(name))
            module.__path__ = []
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
        vars(sys.modules[path]).update(contents)
