"""One seeded batch for the calls of `compare_calls.py`, made without the library that is
compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = (9, 1, 4, 0, 7, 5)
H_REF, RANK, LORA_SCALE = 12, 3, 0.5
SOFTCAP, LOGIT_SCALE, TEMPERATURE = 8.0, 0.8, 0.9


@dataclass
class Data:
    """Arguments of a call by their names in the public functions, for the layout that was asked."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    logits: Tensor
    ids: Tensor
    mask: Tensor
    advantages: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    rollout_logp: Tensor
    temperature: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    main_grad: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class Shape:
    """What a batch looks like."""

    layout: str = "padded"
    """padded: (B, T); packed: (N,), with the boundaries in cu_seqlens; empty: packed, N = 0."""
    dtype: torch.dtype = torch.float32
    V: int = 67
    H: int = 16
    times: int = 1
    """Factor of the lengths."""
    mask: str = "holes"
    """holes: lengths and holes, with NaN behind them; whole: every token counts; none: no token."""
    advantages: str = "sequence"
    """sequence: one each; token: one for each token; zero: all 0; some_zero: every second one 0."""
    drift: float = 1.0
    """Scale of the distance between the policy and its old log-probs."""
    head: tuple[str, ...] = ()
    """Which of bias, lora, softcap and logit_scale the policy has."""
    poison: str = ""
    """nan: the first token's hidden state and logits are NaN; banned: logits of -inf."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, before there are holes."""
        return tuple(n * self.times * (self.layout != "empty") for n in LENGTHS)


def draw(seed: int, shape: Shape) -> Data:
    """Peaked logits, and old, reference and rollout log-probs near those of the policy.

    Old log-probs lie 0.25 nats around the policy's and drift with their sequence, so that at every
    level a clip of 0.2 holds on both sides, and elsewhere does not.
    """
    g = torch.Generator().manual_seed(seed)
    B, T, V, H = len(LENGTHS), max(LENGTHS) * shape.times, shape.V, shape.H

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    weight = normal(V, H) / H**0.5
    ids = torch.randint(V, (B, T), generator=g)
    direction = weight[ids] / weight[ids].square().sum(-1, keepdim=True)
    strength = 10 * torch.rand(B, T, 1, generator=g, dtype=torch.float64)
    hidden = (strength * direction + normal(B, T, H)).to(shape.dtype)
    weight, bias = weight.to(shape.dtype), (0.3 * normal(V)).to(shape.dtype)
    A, B_ = normal(RANK, H).to(shape.dtype), (0.1 * normal(V, RANK)).to(shape.dtype)
    z = _logits(hidden, weight, bias, A, B_, shape.head)
    logp = torch.log_softmax(z / TEMPERATURE, -1).gather(-1, ids[..., None])[..., 0]
    drift = torch.tensor([-0.45, 0.3, 0.05, 0.0, 0.3, 0.5])[:, None]
    # at most nearly certain, as probabilities are
    old = (logp + shape.drift * (0.25 * normal(B, T) + drift)).clamp(max=-1e-3)
    ref = logp + 0.3 * normal(B, T)
    rollout = old + 0.15 * normal(B, T) + 0.2 * drift
    # the engine gave none for these
    rollout[:, 2] = torch.nan
    temperature = 0.7 + 0.6 * torch.rand(B, T, generator=g)
    counted, inside = _masks(shape, g, B, T)
    if shape.poison == "nan":
        hidden[1, 0], z[1, 0] = torch.nan, torch.nan
    if shape.poison == "banned":
        z[..., ::3] = torch.where(ids[..., None] % 3 == 0, z[..., ::3], -torch.inf)
    tokens = {
        "hidden": hidden,
        "logits": z.to(shape.dtype),
        "ids": ids,
        "mask": counted,
        "old_logp": old.float(),
        "ref_logp": ref.float(),
        "rollout_logp": rollout.float(),
        "temperature": temperature,
        "ref_hidden": normal(B, T, H_REF).to(shape.dtype),
    }
    advantages = _advantages(shape.advantages, normal(B, T))
    if advantages.dim() == 2:
        tokens["advantages"] = advantages
    tokens = {name: _hidden_behind(value, counted) for name, value in tokens.items()}
    if shape.layout != "padded":
        tokens = {name: value[inside] for name, value in tokens.items()}
    lengths = inside.sum(1)
    return Data(
        **{"advantages": advantages, **tokens},
        weight=weight,
        bias=bias,
        A=A,
        B=B_,
        ref_weight=(normal(V, H_REF) / H_REF**0.5).to(shape.dtype),
        main_grad=normal(V, H).to(torch.promote_types(shape.dtype, torch.float32)),
        cu_seqlens=torch.cat((lengths.new_zeros(1), lengths.cumsum(0))),
    )


def _logits(hidden, weight, bias, A, B, head: tuple[str, ...]) -> Tensor:
    """The policy's logits in float64."""
    whole = weight.double()
    if "lora" in head:
        whole = whole + LORA_SCALE * B.double() @ A.double()
    z = hidden.double() @ whole.T
    if "bias" in head:
        z = z + bias.double()
    if "logit_scale" in head:
        z = z * LOGIT_SCALE
    return SOFTCAP * torch.tanh(z / SOFTCAP) if "softcap" in head else z


def _advantages(kind: str, noise: Tensor) -> Tensor:
    """(B,) of both signs, or (B, T) near them."""
    advantages = torch.tensor([1.3, -0.7, -1.1, 0.4, 0.9, -0.5])
    if kind == "some_zero":
        advantages[::2] = 0.0
    if kind == "zero":
        return torch.zeros_like(advantages)
    return (advantages[:, None] + 0.5 * noise).float() if kind == "token" else advantages


def _hidden_behind(value: Tensor, counted: Tensor) -> Tensor:
    """NaN, or an id outside every vocabulary, where a token does not count."""
    if value.dtype == torch.bool:
        return value
    value[~counted] = torch.nan if value.is_floating_point() else -100
    return value


def _masks(shape: Shape, g: torch.Generator, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Which tokens count, and which are inside their sequence, both (B, T)."""
    if shape.mask == "whole":
        return torch.ones(B, T, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    inside = torch.arange(T) < torch.tensor(shape.lengths)[:, None]
    if shape.mask == "none":
        return torch.zeros(B, T, dtype=torch.bool), inside
    hole = torch.rand(B, T, generator=g) < 0.15
    # the sequence of one token keeps it
    hole[1] = False
    return inside & ~hole, inside
