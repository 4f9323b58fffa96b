"""Shapes as data, and batches of them with the entropies of real rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import LossConfig, linear_logprob

# Quantiles of a token's margin in nats: its logit above the log-sum-exp of all others. Entropy is
# near (margin + log V) exp(-margin), so half of the tokens are under 0.01 nat and a fifth above
# 0.67, as reported for reasoning models (Beyond the 80/20 Rule, 2025).
MARGIN_QUANTILES = ((0.0, -3.0), (0.2, 3.1), (0.5, 7.2), (1.0, 14.0))


@dataclass(frozen=True)
class Case:
    """B sequences of T completion positions through a head of H by V."""

    name: str
    B: int
    T: int
    H: int
    V: int
    lengths: str = "full"
    """full: all T; alternate: T and 94 / 256 of T in turn; rollout: log-normal, cut at T."""
    active: float = 1.0
    """Share of the sequences whose advantage is not 0."""
    trainable: bool = True
    """False: the lm_head is frozen, as under LoRA."""
    old: bool = False
    """Log-probs of the sampling policy are given, near the policy's; False: on-policy."""
    beta: float = 0.0
    """Coefficient of the KL against given reference log-probs."""
    dtype: torch.dtype = torch.float32
    flat: bool = False
    """Logits without a lead: every token near log V nats. Flatters filters of small numbers."""
    only: tuple[str, ...] = ()
    """Contestants of this case, where all of them would take too long; empty: all."""
    passes: tuple[str, ...] = ()
    """Those of its level that are measured; empty: all."""

    @property
    def config(self) -> LossConfig:
        return LossConfig(loss_type="dapo", beta=self.beta)


class Batch(NamedTuple):
    """What every contestant is given; masked places hold zeros."""

    hidden: Tensor
    """(B, T, H), a leaf that requires grad."""
    weight: Tensor
    """(V, H), a leaf; requires grad where the head is trainable."""
    ids: Tensor
    """(B, T) int64."""
    mask: Tensor
    """(B, T) bool, a prefix of each row."""
    advantages: Tensor
    """(B,) fp32."""
    old_logp: Tensor | None
    """(B, T) fp32."""
    ref_logp: Tensor | None
    """(B, T) fp32."""


def lengths(case: Case) -> Tensor:
    """Unmasked positions of each sequence, (B,) int64."""
    generator = torch.Generator().manual_seed(0)
    if case.lengths == "full":
        return torch.full((case.B,), case.T)
    if case.lengths == "alternate":
        return torch.tensor([case.T, case.T * 94 // 256]).repeat(case.B)[: case.B]
    # median a quarter of the limit, a long tail, one in nine or so cut off at the limit
    drawn = case.T * 0.25 * torch.exp(1.1 * torch.randn(case.B, generator=generator))
    return drawn.long().clamp(1, case.T)


def advantages(case: Case, seed: int = 0) -> Tensor:
    """(B,) fp32; exactly 0 for the sequences that are not active."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(case.B, generator=generator)
    if case.lengths == "alternate":
        # pairs of a long and a short sequence, so that the share of the tokens is exact
        out[round(case.active * case.B / 2) * 2 :] = 0.0
    else:
        out[torch.randperm(case.B, generator=generator)[round(case.active * case.B) :]] = 0.0
    return out


def tokens(case: Case) -> tuple[int, int]:
    """Unmasked tokens, and those among them whose advantage is not 0; makes no large tensor."""
    counts = lengths(case)
    return int(counts.sum()), int(counts[advantages(case) != 0].sum())


def _margins(n: int, generator: torch.Generator) -> Tensor:
    u = torch.rand(n, generator=generator)
    out = torch.empty(n)
    for (u0, m0), (u1, m1) in zip(MARGIN_QUANTILES, MARGIN_QUANTILES[1:], strict=False):
        part = (u >= u0) & (u < u1)
        out[part] = m0 + (u[part] - u0) / (u1 - u0) * (m1 - m0)
    return out


def make(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Batch:
    """The tensors of a case; another seed gives other tensors of the same shape and lengths."""
    device = torch.device(device)
    host = torch.Generator().manual_seed(seed)
    g = torch.Generator(device).manual_seed(seed)
    B, T, H, V = case.B, case.T, case.H, case.V
    mask = torch.arange(T) < lengths(case)[:, None]
    ids = torch.randint(V, (B, T), generator=host)
    weight = torch.randn(V, H, generator=g, device=device) / H**0.5
    hidden = torch.randn(B, T, H, generator=g, device=device)
    if not case.flat:
        peak = _margins(B * T, host).view(B, T, 1) + math.log(V)
        # the noise and the lead itself spread the other logits by 1 + peak^2 / H
        lead = (peak + 0.5 * (1 + peak.square() / H)).to(device)
        # rows of the weight have norm 1, give or take 1 / sqrt(2 H)
        hidden += lead * torch.nn.functional.normalize(weight[ids.to(device)], dim=-1)
    hidden[~mask.to(device)] = 0.0
    batch = Batch(
        hidden.to(case.dtype),
        weight.to(case.dtype),
        ids.to(device),
        mask.to(device),
        advantages(case, seed).to(device),
        None,
        None,
    )
    if case.old or case.beta:
        with torch.no_grad():
            logp = linear_logprob(batch.hidden, batch.weight, batch.ids, mask=batch.mask).logp
        near = [logp + 0.2 * torch.randn(B, T, generator=g, device=device) for _ in range(2)]
        near = [torch.where(batch.mask, value, 0.0) for value in near]
        batch = batch._replace(
            old_logp=near[0] if case.old else None, ref_logp=near[1] if case.beta else None
        )
    batch.hidden.requires_grad_()
    batch.weight.requires_grad_(case.trainable)
    return batch


_SMOL, _QWEN = {"H": 576, "V": 49152}, {"H": 1024, "V": 151936}
_RL_LOSSES = ("grpo_fast", "grpo_fast, active rows", "torch", "TRL", "Liger")
_FEW = (*_RL_LOSSES, "torch.compile", "CCE torch")
_TINY = {"H": 32, "V": 515, "only": _RL_LOSSES}

_BOTH = "forward+backward"

# name of a set -> level -> cases
CASES: dict[str, dict[str, tuple[Case, ...]]] = {
    # `make bench` on a CPU: under 15 minutes on 2 cores
    "cpu": {
        "linear": (
            Case("smollm2-rollout", 8, 256, **_SMOL, lengths="alternate", active=0.5),
            Case(
                "smollm2-half-size",
                4,
                256,
                **_SMOL,
                lengths="alternate",
                active=0.5,
                only=_FEW,
                passes=(_BOTH,),
            ),
            Case("smollm2-all-active", 4, 256, **_SMOL, only=_FEW, passes=(_BOTH,)),
            Case(
                "smollm2-old-kl",
                4,
                256,
                **_SMOL,
                lengths="rollout",
                old=True,
                beta=0.04,
                only=_FEW,
                passes=(_BOTH,),
            ),
            Case("smollm2-frozen", 4, 256, **_SMOL, trainable=False, only=_FEW, passes=(_BOTH,)),
        ),
        "logits": (Case("smollm2-logits", 4, 256, **_SMOL, lengths="rollout"),),
        "logprob": (Case("smollm2-logprob", 2, 256, **_SMOL, lengths="alternate", only=_FEW),),
    },
    # `make bench-large`: 2,048 positions at two vocabularies, some 20 minutes on 2 cores
    "cpu-large": {
        "linear": tuple(
            Case(
                f"{name}-{kind}",
                8,
                256,
                **shape,
                only=_RL_LOSSES,
                passes=(_BOTH,),
                **({"lengths": "alternate", "active": 0.5} if kind == "rollout" else {}),
            )
            for kind in ("rollout", "all-active")
            for name, shape in (("smollm2", _SMOL), ("qwen3-0.6b", _QWEN))
        ),
        "logits": (),
        "logprob": (),
    },
    # seconds: that the driver itself works
    "tiny": {
        "linear": (
            Case("tiny", 4, 24, **_TINY, lengths="alternate", active=0.5),
            Case("tiny-old-kl", 3, 20, **_TINY, lengths="rollout", old=True, beta=0.1),
            Case("tiny-frozen", 2, 16, **_TINY, trainable=False, flat=True),
        ),
        "logits": (Case("tiny-logits", 3, 20, **_TINY, lengths="rollout"),),
        "logprob": (Case("tiny-logprob", 2, 24, **_TINY, lengths="alternate"),),
    },
}


def _gpu(name: str, H: int, V: int, N: int, **options) -> Case:
    """N completion positions as sequences of 1,024, bf16."""
    label = f"{name}-{N // 1024}k" + "".join(
        f"-{key}" if value is True else f"-{key}-{value}" for key, value in options.items()
    )
    return Case(label, N // 1024, 1024, H, V, dtype=torch.bfloat16, **options)


# (H, V) as others measure them: Qwen2.5, Qwen3, Qwen3.5, Gemma, Llama-3, and the largest of each
_GPU_HEADS = {
    "qwen2.5-0.5b": (896, 151936),
    "qwen3-1.7b": (2048, 151936),
    "qwen3.5": (2048, 248320),
    "gemma-2-2b": (2304, 256000),
    "qwen2.5-7b": (3584, 152064),
    "llama-3-8b": (4096, 128256),
    "qwen3-8b": (4096, 151936),
    "qwen2.5-14b": (5120, 152064),
}
# The order is that of importance: the run stops at its time limit and says what it left out.
CASES["gpu"] = {
    "linear": (
        *(_gpu(name, *_GPU_HEADS[name], N=8192) for name in ("qwen3-8b", "llama-3-8b")),
        _gpu("qwen3-8b", *_GPU_HEADS["qwen3-8b"], N=8192, lengths="rollout", active=0.5),
        _gpu("qwen3-8b", *_GPU_HEADS["qwen3-8b"], N=8192, trainable=False),
        _gpu("qwen3-8b", *_GPU_HEADS["qwen3-8b"], N=8192, old=True, beta=0.04),
        _gpu("qwen3-8b", *_GPU_HEADS["qwen3-8b"], N=8192, flat=True),
        *(
            _gpu("qwen3-8b", *_GPU_HEADS["qwen3-8b"], N=8192, active=share)
            for share in (0.5, 0.25, 0.125)
        ),
        *(_gpu("qwen3-8b", *_GPU_HEADS["qwen3-8b"], N=n) for n in (2048, 32768)),
        *(
            _gpu(name, *head, N=8192)
            for name, head in _GPU_HEADS.items()
            if name not in ("qwen3-8b", "llama-3-8b")
        ),
        _gpu("qwen3-8b", *_GPU_HEADS["qwen3-8b"], N=131072),
        Case("qwen3-8b-fp32", 4, 1024, 4096, 151936),
    ),
    "logits": (
        _gpu("qwen3", 256, 151936, N=8192),
        _gpu("llama-3", 256, 128256, N=8192),
        _gpu("qwen3", 256, 151936, N=8192, lengths="rollout", active=0.5),
        _gpu("gemma", 256, 262144, N=4096),
    ),
    "logprob": (
        _gpu("qwen3-8b", *_GPU_HEADS["qwen3-8b"], N=8192),
        _gpu("qwen3-0.6b", 1024, 151936, N=8192, lengths="rollout"),
    ),
}
