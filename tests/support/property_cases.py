"""A call of one of the four loss and log-prob functions as a handful of plain values, and its
tensors. The printed form of a `Call` is the call: a failure is reproduced from it alone."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_fast import LossConfig
from grpo_fast.engine import chunks

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MASK_DTYPES = {"bool": torch.bool, "int": torch.int64, "float": torch.float32, "uint8": torch.uint8}


@dataclass(frozen=True, repr=False)
class Call:
    """Everything that decides a call; every random number comes from the seed."""

    op: str
    """linear_policy_loss, policy_loss, linear_logprob or logprob."""
    lengths: tuple[int, ...]
    """Of the sequences; padded batches are (len(lengths), max(lengths))."""
    packed: bool
    V: int
    H: int
    dtype: str
    seed: int
    mask: str = "none"
    """none, random, zero_row, all_zero or one_token."""
    mask_dtype: str = "bool"
    layout: str = "plain"
    """Of hidden or logits: plain, swapped, sliced, wide, expanded or offset."""
    weight_layout: str = "plain"
    """plain, swapped, wide or offset."""
    spread: float = 1.0
    """Standard deviation of the logits, about."""
    old: float | None = None
    """Standard deviation of old - logp (nats); None: on-policy."""
    ref: float | None = None
    ref_hidden: bool = False
    rollout: float | None = None
    rollout_missing: bool = False
    per_token: bool = False
    """Advantages of tokens, not of sequences."""
    zeros: float = 0.0
    """Share of the advantages that are 0."""
    banned: str = "none"
    """none, others (-inf logits beside the target) or target (at some targets too)."""
    bias: bool = False
    lora: int = 0
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: str = "number"
    """number, sequence or token."""
    wanted: tuple[str, ...] = ("hidden", "weight", "bias", "lora_A", "lora_B", "logits")
    """Which tensors want a gradient, of those there are."""
    workspace: str = "default"
    """default, small (16 rows in a chunk) or columns (16 rows, backward by slices of V)."""
    denominator: float | None = None
    skip: bool = False
    max_rows: float | None = None
    """Room, as a share of all rows."""
    inplace: bool = False
    upstream: float = 1.0
    entropy: bool = False
    lse: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        for f in fields(self):
            if f.default is not MISSING and said[f.name] == f.default:
                del said[f.name]
        return f"Call({', '.join(f'{k}={v!r}' for k, v in said.items())})"

    @property
    def linear(self) -> bool:
        return self.op.startswith("linear")

    @property
    def loss(self) -> bool:
        return self.op.endswith("loss")

    @property
    def shape(self) -> tuple[int, ...]:
        if self.packed:
            return (sum(self.lengths),)
        return len(self.lengths), max(self.lengths, default=0)

    @property
    def number(self) -> float:
        """The one temperature."""
        return self.config.get("temperature", 0.9)


@dataclass
class Tensors:
    """What a call is given; `given` holds its keyword arguments."""

    leaves: dict[str, Tensor]
    ids: Tensor
    advantages: Tensor
    mask: Tensor
    """Bool, whatever the call gets."""
    given: dict[str, Any]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x (..., n, k) with the same values in another place of memory."""
    if layout == "swapped":
        dims = (0, 1) if x.dim() == 3 else (-2, -1)
        return x.transpose(*dims).contiguous().transpose(*dims)
    if layout == "sliced":
        # a row more between batches; logits[:, :-1] of a causal model
        wide = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1]), torch.nan, dtype=x.dtype)
        wide[..., :-1, :] = x
        return wide[..., :-1, :]
    if layout == "wide":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., :-3] = x
        return wide[..., :-3]
    if layout == "expanded":
        return x[:1].expand(x.shape) if x.shape[0] else x
    if layout == "offset":
        flat = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    return x


def _mask(call: Call, g: torch.Generator) -> Tensor:
    mask = torch.rand(call.shape, generator=g) < 0.7
    if call.mask == "none":
        mask.fill_(True)
    elif call.mask == "all_zero":
        mask.fill_(False)
    elif call.mask == "zero_row" and not call.packed:
        mask[::2] = False
    elif call.mask == "zero_row":
        mask[: sum(call.lengths[:2])] = False
    elif call.mask == "one_token":
        mask = torch.arange(mask.numel()).view(call.shape) == mask.numel() // 2
    return mask


def _logits(call: Call, leaves: dict[str, Tensor], inverse: Tensor) -> Tensor:
    """z (..., V) in float64."""
    if not call.linear:
        return leaves["logits"].double() * inverse[..., None]
    exact = {k: v.double() for k, v in leaves.items()}
    weight = exact["weight"]
    if call.lora:
        weight = weight + 0.5 * exact["lora_B"] @ exact["lora_A"]
    z = exact["hidden"] @ weight.T + exact.get("bias", 0.0)
    z = z * call.logit_scale
    if call.softcap is not None:
        z = call.softcap * torch.tanh(z / call.softcap)
    return z * inverse[..., None]


def _ban(call: Call, ids: Tensor, g: torch.Generator) -> Tensor | None:
    """(V,) bool: tokens of logit -inf."""
    if call.banned == "none" or call.V < 2:
        return None
    banned = torch.rand(call.V, generator=g) < 0.3
    if call.banned == "others" and ids.numel():
        banned[ids] = False
    return banned


def _leaves(call: Call, ids: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    dtype, V, H = DTYPES[call.dtype], call.V, call.H
    banned = _ban(call, ids, g)
    lead = torch.randn(*call.shape, 1, generator=g)
    if not call.linear:
        logits = call.spread * torch.randn(*call.shape, V, generator=g)
        logits.scatter_add_(-1, ids[..., None], 3 * lead)
        if banned is not None:
            logits[..., banned] = -torch.inf
        return {"logits": lay_out(logits.to(dtype), call.layout)}
    weight = torch.randn(V, H, generator=g) / H**0.5
    hidden = call.spread * torch.randn(*call.shape, H, generator=g) + lead * weight[ids]
    leaves = {
        "hidden": lay_out(hidden.to(dtype), call.layout),
        "weight": lay_out(weight.to(dtype), call.weight_layout),
    }
    if call.bias or banned is not None:
        bias = torch.randn(V, generator=g)
        if banned is not None:
            bias[banned] = -torch.inf
        leaves["bias"] = bias.to(dtype)
    if call.lora:
        leaves["lora_A"] = (torch.randn(call.lora, H, generator=g) / H**0.5).to(dtype)
        leaves["lora_B"] = torch.randn(V, call.lora, generator=g).to(dtype)
    return leaves


def _log_probs(call: Call, tensors: Tensors, logp: Tensor, g: torch.Generator) -> None:
    """Old, reference and rollout log-probs near the policy's."""
    given, mask = tensors.given, tensors.mask
    logp = torch.where(torch.isfinite(logp), logp, -5.0)
    for name, drift in (("old", call.old), ("ref", call.ref), ("rollout", call.rollout)):
        noise = torch.randn(call.shape, generator=g, dtype=torch.float64)
        missing = torch.rand(call.shape, generator=g) < 0.3
        if drift is None:
            continue
        value = (logp + drift * noise).clamp(max=-1e-4).float()
        value = torch.where(mask, value, torch.nan)
        if name == "rollout" and call.rollout_missing:
            value = torch.where(missing, torch.nan, value)
        given[f"{name}_logp"] = value
    if call.ref_hidden:
        hidden = tensors.leaves["hidden"]
        noise = torch.randn(hidden.shape, generator=g).to(hidden.dtype)
        given["ref_hidden"] = hidden.detach() + 0.3 * noise
        given["ref_weight"] = tensors.leaves["weight"].detach().clone()


def _temperatures(call: Call, g: torch.Generator) -> Tensor:
    """(B,) or shaped like ids where the call gives a tensor, else 0-d."""
    own = torch.rand(call.shape, generator=g) + 0.5
    if call.temperature == "token":
        return own
    if call.temperature == "sequence" and not call.packed:
        return own[:, 0] if own.shape[1] else torch.ones(own.shape[0])
    return torch.tensor(call.number)


def _advantages(call: Call, g: torch.Generator) -> Tensor:
    shape = call.shape if call.per_token else (len(call.lengths),)
    if call.packed and "cu_seqlens" not in _packed(call):
        shape = call.shape
    advantages = torch.randn(shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < call.zeros, 0.0, advantages)


def _packed(call: Call) -> dict[str, Tensor]:
    if not (call.packed and call.loss):
        return {}
    return {"cu_seqlens": torch.tensor([0, *call.lengths]).cumsum(0)}


def build(call: Call) -> Tensors:
    """The tensors of a call, with NaN and ids of -100 in the masked places."""
    g = torch.Generator().manual_seed(call.seed)
    mask = _mask(call, g)
    ids = torch.randint(call.V, call.shape, generator=g)
    if call.layout == "expanded" and call.shape[0]:
        mask = mask[:1].expand(call.shape).clone() if not call.packed else mask
    leaves = _leaves(call, ids, g)
    temperature = _temperatures(call, g)
    tensors = Tensors(leaves, ids, _advantages(call, g), mask, _packed(call))
    given = tensors.given
    by_row = temperature
    if len(call.shape) == 2 and temperature.dim() == 1:
        by_row = temperature[:, None]
    z = _logits(call, leaves, (1.0 / by_row.double()).expand(call.shape))
    logp = z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    if call.loss:
        _log_probs(call, tensors, logp, g)
    source = leaves["hidden" if call.linear else "logits"]
    if call.layout != "expanded":
        source.masked_fill_(~mask[..., None], torch.nan)
    tensors.ids = torch.where(mask, ids, -100)
    if call.mask != "none":
        given["mask"] = mask.to(MASK_DTYPES[call.mask_dtype])
    if temperature.dim() or not call.loss:
        given["temperature"] = temperature if temperature.dim() else call.number
    _options(call, given)
    return tensors


def _options(call: Call, given: dict[str, Any]) -> None:
    if call.linear:
        given |= {"softcap": call.softcap, "logit_scale": call.logit_scale}
        if call.workspace != "default":
            per_row = 4 * (call.V + call.lora + 3 * (call.H + call.lora))
            fixed = 0 if call.workspace == "columns" else chunks.FIXED_BYTES
            given["workspace_bytes"] = fixed + 16 * 2 * per_row
    if call.loss:
        given["config"] = LossConfig(**call.config)
        given["denominator"] = call.denominator
        given["skip_inactive_forward"] = call.skip
        if call.max_rows is not None:
            total = 1
            for n in call.shape:
                total *= n
            given["max_rows"] = min(max(1, round(call.max_rows * total)), max(total, 1))
    else:
        given["entropy"] = call.entropy


@contextmanager
def small_accelerator(call: Call):
    """Backward by slices of the vocabulary, which no CPU would choose."""
    if call.workspace != "columns":
        yield
        return
    with (
        mock.patch.object(chunks, "FIXED_BYTES", 0),
        mock.patch.dict(chunks.COLUMNS_FIRST, {"cpu": 1024}),
    ):
        yield
