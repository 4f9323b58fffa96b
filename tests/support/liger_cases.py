"""Every option of Liger's GRPO losses on small batches, and the float64 truth of
`grpo_fast/reference.py` for them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from loss_cases import make_case

from grpo_fast import LossConfig, reference
from grpo_fast.integrations.names import owned

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
KINDS = [(name, level) for name in CLIPPED for level in ("token", "sequence")]
KINDS += [(name, "token") for name in ("cispo", "sapo", "vespo")]
# what multiplies the objective: no ratio, one per sequence in both shapes, one per token
RATIOS = (None, "B", "B1", "BT")
# no KL; KL; KL times the ratio
KLS = ((0.0, False), (0.3, False), (0.3, True))
LONGEST = 12


@dataclass(frozen=True)
class Options:
    """One choice of everything; names as in Liger, but for old, ref, bias and ratio."""

    loss_type: str
    level: str
    beta: float = 0.0
    weight_kl: bool = False
    delta: float | None = None
    old: bool = True
    ref: str = "logps"
    bias: bool = False
    ratio: str | None = None

    @property
    def keywords(self) -> dict:
        """Those that the class and the function of Liger call the same."""
        return {
            "beta": self.beta,
            "loss_type": self.loss_type,
            "max_completion_length": LONGEST,
            "importance_sampling_level": self.level,
            "temperature": 0.9,
            "delta": self.delta,
            "use_bias_correction_kl": self.weight_kl,
            "sapo_temperature_neg": 1.3,
            "vespo_k_pos": 1.5,
        }

    @property
    def epsilon_high(self) -> float:
        """cispo's is the raw bound."""
        return 1.2 if self.loss_type == "cispo" else 0.28

    @property
    def config(self) -> LossConfig:
        """What they mean."""
        keywords = owned(self.loss_type, self.keywords)
        if self.loss_type == "vespo":
            del keywords["importance_sampling_level"]
        return LossConfig(epsilon=0.2, epsilon_high=self.epsilon_high, **keywords)


def options(loss_type: str, level: str) -> list[Options]:
    """Every combination that exists; where a KL is, its reference comes both ways."""
    deltas = (None, 1.6) if loss_type in CLIPPED else (None,)
    out = []
    for (beta, weight_kl), delta, old, bias, ratio in product(
        KLS, deltas, (True, False), (False, True), RATIOS
    ):
        for ref in ("logps", "hidden") if beta else ("logps",):
            out.append(Options(loss_type, level, beta, weight_kl, delta, old, ref, bias, ratio))
    return out


@dataclass
class Data:
    """A batch whose masked places hold `fill`."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logp: torch.Tensor
    ref_logp: torch.Tensor
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor
    ref_bias: torch.Tensor
    ratios: dict

    def leaves(self) -> tuple[torch.Tensor, ...]:
        """New leaves of hidden, weight and bias."""
        return tuple(t.clone().requires_grad_() for t in (self.hidden, self.weight, self.bias))


def data(fill: float = float("nan"), lengths=(9, 1, 0, 6), dtype=torch.float32) -> Data:
    """`make_case` with a second model and ratios around 1; the masked ratios are `fill`, or 1."""
    case = make_case(lengths=lengths, dtype=dtype)
    g = torch.Generator().manual_seed(5)
    (B, T), (V, H) = case.ids.shape, case.weight.shape
    out = ~case.mask
    by_token = (0.3 * torch.randn(B, T, generator=g)).exp()
    by_token[out] = fill if fill != fill else 1.0
    by_sequence = (0.3 * torch.randn(B, generator=g)).exp()
    near = case.hidden + 0.2 * torch.randn(B, T, H, generator=g, dtype=dtype)
    tensors = [t.clone() for t in (case.hidden, near, case.old_logp, case.ref_logp)]
    for tensor in tensors:
        tensor[out] = fill
    hidden, ref_hidden, old, ref = tensors
    ids = case.ids.clone()
    ids[out] = -100 if fill != fill else 0
    bias = torch.randn(V, generator=g, dtype=dtype) / 4
    return Data(
        hidden,
        case.weight,
        bias,
        ids,
        case.mask,
        case.advantages,
        old,
        ref,
        ref_hidden,
        case.weight + 0.05 * torch.randn(V, H, generator=g, dtype=dtype),
        bias + 0.05 * torch.randn(V, generator=g, dtype=dtype),
        {None: None, "B": by_sequence, "B1": by_sequence[:, None], "BT": by_token},
    )


def _ratio_of(o: Options, d: Data) -> torch.Tensor | None:
    """(B, T) in float64, finite."""
    ratio = d.ratios[o.ratio]
    if ratio is None:
        return None
    ratio = ratio.double()
    ratio = (ratio[:, None] if ratio.dim() == 1 else ratio).expand(d.mask.shape)
    return torch.where(d.mask, ratio, torch.ones_like(ratio))


@dataclass
class Exact:
    """What every truth starts from, in float64; leaves require grad."""

    leaves: tuple
    logits: torch.Tensor
    logp: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    advantages: torch.Tensor
    rollout: torch.Tensor | None


def exact(o: Options, d: Data) -> Exact:
    """The batch in float64, with the ratio where a reader of Liger's formula expects it."""
    keep = d.mask[..., None]
    hidden, weight, bias = (t.detach().double() for t in d.leaves())
    hidden = torch.where(keep, hidden, torch.zeros_like(hidden))
    leaves = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    logits = reference.head_logits(hidden, weight, bias if o.bias else None)
    ids = torch.where(d.mask, d.ids, torch.zeros_like(d.ids))
    logp = reference.logprob(logits, ids, 0.9)[0]
    ref = d.ref_logp.double()
    if o.ref == "hidden":
        clean = torch.where(keep, d.ref_hidden, torch.zeros_like(d.ref_hidden)).double()
        head = clean, d.ref_weight.double(), d.ref_bias.double() if o.bias else None
        ref = reference.logprob(reference.head_logits(*head), ids, 0.9)[0]
    old = d.old_logp.double() if o.old else logp.detach()
    advantages, rollout = d.advantages.double()[:, None].expand(d.mask.shape), None
    ratio = _ratio_of(o, d)
    if ratio is not None and o.loss_type != "vespo":
        advantages = advantages * ratio
    elif ratio is not None:
        by_token = ratio.log()
        if o.ratio != "BT":
            by_token = by_token / d.mask.sum(1, keepdim=True).clamp(min=1)
        rollout = old - by_token
    return Exact(leaves, logits, logp, old, ref, advantages, rollout)


def truth(o: Options, d: Data, denominator: float | None = None) -> dict[str, torch.Tensor]:
    """Loss, gradients and metrics of the reference in float64."""
    e = exact(o, d)
    loss = reference.policy_loss(
        e.logits,
        d.ids,
        e.advantages,
        o.config,
        mask=d.mask,
        old_logp=e.old,
        ref_logp=e.ref if o.beta else None,
        rollout_logp=e.rollout,
        denominator=denominator,
    )
    return {"loss": loss.detach(), **_gradients(loss, e), **_metrics(o, d, e)}


def token_truth(o: Options, d: Data) -> dict[str, torch.Tensor]:
    """The same of a sum of token losses, each with its `upstream` weight."""
    e = exact(o, d)
    objective = reference._objective
    old = torch.where(d.mask, e.old, torch.zeros_like(e.old))
    tokens, ratio = objective(o.config, e.logp, old, e.advantages, d.mask, e.rollout)
    if o.beta:
        ref = torch.where(d.mask, e.ref, e.logp.detach())
        kl = reference.kl_divergence(e.logp, ref, "k3")
        tokens = tokens + o.beta * (ratio * kl if o.weight_kl else kl)
    loss = torch.where(d.mask, tokens * upstream(d), torch.zeros_like(tokens)).sum()
    return {"loss": loss.detach(), **_gradients(loss, e), **_metrics(o, d, e)}


def _gradients(loss: torch.Tensor, e: Exact) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(loss, (*e.leaves, e.logits), allow_unused=True)
    return dict(zip(("hidden", "weight", "bias", "logits"), grads, strict=True))


def _metrics(o: Options, d: Data, e: Exact) -> dict[str, torch.Tensor]:
    logp = e.logp.detach()
    gap = torch.where(d.mask, logp - e.old, torch.zeros_like(logp))
    if o.level == "sequence":
        gap = gap.sum(1, keepdim=True) / d.mask.sum(1, keepdim=True).clamp(min=1)
    ratio = gap.exp().expand_as(logp)
    low, high = o.config.ratio_bounds
    advantages = d.advantages[:, None]
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    if o.loss_type == "vespo":
        clipped = torch.zeros_like(clipped)
    kl = reference.kl_divergence(logp, e.ref, "k3")
    return {
        "clip_ratio": clipped[d.mask].double().mean(),
        "kl": kl[d.mask].mean(),
        "weighted_kl": (kl * ratio)[d.mask].mean(),
    }


def linear(function, o: Options, d: Data, **more) -> dict[str, torch.Tensor]:
    """Loss, gradients and metrics of a class with Liger's constructor."""
    hidden, weight, bias = d.leaves()
    loss_function = function(
        epsilon_low=0.2,
        epsilon_high=o.epsilon_high,
        use_ref_model=o.beta != 0,
        compiled=False,
        **o.keywords,
    )
    ref = {}
    if o.beta and o.ref == "logps":
        ref = {"ref_per_token_logps": d.ref_logp}
    elif o.beta:
        ref = {"ref_input": d.ref_hidden, "ref_weight": d.ref_weight}
        ref["ref_bias"] = d.ref_bias if o.bias else None
    loss, metrics = loss_function(
        hidden,
        weight,
        d.ids,
        d.mask,
        d.advantages,
        bias=bias if o.bias else None,
        old_per_token_logps=d.old_logp if o.old else None,
        vllm_is_ratio=d.ratios[o.ratio],
        **ref,
        **more,
    )
    loss.backward()
    out = {"loss": loss.detach(), "clip_ratio": metrics[-1]}
    if o.beta:
        assert len(metrics) == 2
        out["weighted_kl" if o.weight_kl else "kl"] = metrics[0]
    return out | {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}


def logits_of(o: Options, d: Data) -> torch.Tensor:
    """(B, L+1, V) of the head, the last row of which means nothing; finite."""
    hidden = torch.where(d.mask[..., None], d.hidden, torch.zeros_like(d.hidden))
    logits = reference.head_logits(hidden, d.weight, d.bias if o.bias else None).detach()
    return torch.cat([logits, torch.full_like(logits[:, :1], 0.5)], 1)


def from_logits(function, o: Options, d: Data, reduce: bool, **more) -> dict[str, torch.Tensor]:
    """Loss, gradient and metrics of a function with the signature of `triton_grpo_loss`; with
    reduce=False, of a token mean and a sum of its results, weighted."""
    leaf = logits_of(o, d).requires_grad_()
    keywords = {**o.keywords, "eps_low": 0.2, "eps_high": o.epsilon_high, "reduce": reduce}
    out = function(
        leaf + 0,
        d.old_logp if o.old else None,
        d.ref_logp if o.beta else None,
        d.ids,
        d.advantages,
        d.mask,
        vllm_is_ratio=d.ratios[o.ratio],
        **keywords,
        **more,
    )
    name = "weighted_kl" if o.weight_kl else "kl"
    if reduce:
        loss, metrics = out
        assert isinstance(metrics, list) and len(metrics) == 1 + (o.beta != 0)
        values = {"loss": loss.detach(), "clip_ratio": metrics[-1]}
        values |= {name: metrics[0]} if o.beta else {}
    else:
        tokens, kl, clipped = out
        assert tokens.shape == clipped.shape == d.ids.shape and (kl is None) == (o.beta == 0)
        loss = (tokens * upstream(d)).sum()
        values = {"loss": loss.detach(), "clip_ratio": clipped.sum() / d.mask.sum()}
        values |= {name: kl.sum() / d.mask.sum()} if o.beta else {}
    loss.backward()
    assert not leaf.grad[:, -1].any() and not leaf.grad[:, :-1][~d.mask].any()
    return values | {"logits": leaf.grad[:, :-1]}


def upstream(d: Data) -> torch.Tensor:
    """What a caller of reduce=False multiplies the token losses by."""
    g = torch.Generator().manual_seed(11)
    return torch.rand(d.mask.shape, generator=g) / d.mask.sum()
