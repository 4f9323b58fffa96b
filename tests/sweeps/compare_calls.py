"""The calls of the public functions that two checkouts must answer with the same bits: what they
are."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from compare_data import LOGIT_SCALE, RANK, SOFTCAP, TEMPERATURE, Shape

from grpo_fast import PRESETS

KL_ESTIMATORS = ("k1", "k2", "k3", "absolute")
CORRECTIONS = tuple(
    f"{level}_{mode}"
    for level in ("token", "sequence", "geometric")
    for mode in ("truncate", "mask")
)
HEADS = {"softcap": SOFTCAP, "logit_scale": LOGIT_SCALE}
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
TRAINED = ("hidden", "weight")


@dataclass(frozen=True)
class Call:
    """One call of a public function."""

    name: str
    function: str = "linear_policy_loss"
    config: dict[str, Any] = field(default_factory=dict)
    shape: Shape = Shape()
    given: tuple[str, ...] = ("mask", "old_logp")
    """Names of the tensors of `Data` that are passed, beside the positional ones."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other keywords, as they are."""
    trained: tuple[str, ...] = TRAINED
    """Which of hidden, weight, bias, A, B (and logits) need a gradient."""
    upstream: float = 1.0
    """What reaches the loss in backward."""
    how: str = "eager"
    """eager, compile, autocast, no_grad, strided: hidden or logits are a view, or tp: one rank."""
    outputs: tuple[str, ...] = ("logp",)
    """Of `logprob` and `linear_logprob`: what backward goes through."""

    @property
    def seed(self) -> int:
        """A number of its own for the data of each call."""
        return zlib.crc32(self.name.encode())


# fields with which some tokens leave the bounds and some do not; not read from the library, which
# may keep them in another place tomorrow
BOUNDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"), {"delta": 1.6}),
    **dict.fromkeys(("gspo", "gspo_token", "ppo"), {"delta": 1.6}),
    # the ratio of a whole sequence is seldom near 1
    "rloo": {"delta": 1.6, "epsilon": 0.3},
    "cispo": {"epsilon_high": 1.2, "cispo_ratio_min": 0.9},
    "gmpo": {},
    "dppo_tv": {"epsilon": 0.05, "epsilon_high": 0.07, "delta": 1.5},
    "dppo_kl": {"epsilon": 0.01, "epsilon_high": 0.04, "delta": 1.5},
}


def near_bounds(loss_type: str, **more: Any) -> dict[str, Any]:
    """Fields of a `LossConfig` whose bounds some tokens leave and some do not."""
    common = {"temperature": TEMPERATURE, "max_completion_length": 12, "epsilon_high": 0.28}
    return {"loss_type": loss_type, **common, **BOUNDS.get(loss_type, {}), **more}


def presets() -> Iterator[Call]:
    """Every row of the table at each of its levels, in seven forms."""
    packed = Shape("packed", BF16)
    for loss_type, preset in PRESETS.items():
        for level in preset.levels or (None,):
            name = f"preset/{loss_type}/{level}"
            config = near_bounds(loss_type, importance_sampling_level=level)
            kl = {**config, "beta": 0.3}
            old, ref = ("mask", "old_logp"), ("mask", "ref_logp")
            both = (*old, "ref_logp")
            yield Call(f"{name}/padded", config=config, given=old)
            yield Call(f"{name}/on_policy", config=kl, given=ref)
            yield Call(f"{name}/known", config=config, given=("mask",))
            yield Call(f"{name}/packed", config=kl, shape=packed, given=(*both, "cu_seqlens"))
            yield Call(f"{name}/logits", "policy_loss", kl, given=both)
            yield Call(f"{name}/logits_packed", "policy_loss", config, packed, (*old, "cu_seqlens"))
            yield Call(f"{name}/token_losses", "token_losses", kl, given=both)


def kl() -> Iterator[Call]:
    """Every estimator with every estimator's gradient, times the ratio and not."""
    given = ("mask", "old_logp", "ref_logp")
    for estimator in KL_ESTIMATORS:
        for weighted in (False, True):
            base = {"beta": 0.3, "kl_estimator": estimator, "use_bias_correction_kl": weighted}
            name = f"kl/{estimator}/{'weighted' if weighted else 'plain'}"
            for gradient in (None, *KL_ESTIMATORS):
                config = near_bounds("dapo", kl_gradient=gradient, **base)
                yield Call(f"{name}/{gradient}", config=config, given=given)
            config = near_bounds("gspo", **base)
            yield Call(f"{name}/gspo", config=config, given=given)
            yield Call(f"{name}/gspo_on_policy", config=config, given=("mask", "ref_logp"))
            yield Call(f"{name}/logits", "policy_loss", config, given=given)


def corrections() -> Iterator[Call]:
    """Every rollout correction, with old log-probs and without, and the off-policy mask."""
    packed = Shape("packed", BF16)
    for correction in CORRECTIONS:
        more = {"rollout_correction": correction, "rollout_ratio_min": 0.8}
        more["rollout_ratio_max"] = 1.2
        for loss_type in ("dapo", "gspo", "gmpo", "vespo"):
            config = near_bounds(loss_type, **more)
            name = f"rollout/{correction}/{loss_type}"
            both = ("mask", "old_logp", "rollout_logp")
            yield Call(f"{name}/old", config=config, given=both)
            yield Call(f"{name}/on_policy", config=config, given=("mask", "rollout_logp"))
        config = near_bounds("dapo", **more)
        yield Call(f"rollout/{correction}/logits", "policy_loss", config, given=both)
        config = near_bounds("dapo", off_policy_mask_threshold=0.1, **more)
        given = (*both, "cu_seqlens")
        yield Call(f"rollout/{correction}/off_policy", config=config, shape=packed, given=given)


def _fields(
    shape: Shape,
    loss_type: str = "dapo",
    more: tuple[str, ...] = (),
    *,
    config: dict[str, Any] | None = None,
    head: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Fields of a `Call` of `linear_policy_loss`: more tensors, a head, other data."""
    packed = () if shape.layout == "padded" else ("cu_seqlens",)
    tensors = tuple(name for name in head if name not in HEADS)
    numbers = {name: HEADS[name] for name in head if name in HEADS}
    return {
        "config": near_bounds(loss_type, **(config or {})),
        "shape": replace(shape, head=head, **(data or {})),
        "given": ("mask", "old_logp", *packed, *more, *tensors),
        "options": {**(options or {}), **numbers},
        **fields,
    }


def _small(shape: Shape) -> dict[str, int]:
    """Room for 16 rows, which are three chunks, beside the 48 MiB that the library counts in."""
    logit = max(4, shape.dtype.itemsize)
    return {"workspace_bytes": (48 << 20) + 16 * logit * (shape.V + 3 * (shape.H + RANK))}


def _every_level(shape: Shape) -> Iterator[tuple[str, dict[str, Any]]]:
    """Features that take another route at token and at sequence level."""
    of, some_zero = partial(_fields, shape), {"advantages": "some_zero"}
    kl = {"beta": 0.2}
    for loss_type in ("dapo", "gspo", "gmpo"):
        for name, fields in {
            "small_workspace": of(loss_type, options=_small(shape)),
            "frozen_weight": of(loss_type, trained=("hidden",)),
            "frozen_hidden": of(loss_type, trained=("weight",)),
            "bias_alone": of(loss_type, head=("bias",), trained=("bias",)),
            "lora": of(loss_type, head=("lora",), trained=("hidden", "A", "B")),
            "no_grad": of(loss_type, how="no_grad"),
            "entropy_bonus": of(loss_type, config={"entropy_coef": 0.02}),
            "skip_inactive": of(loss_type, options={"skip_inactive_forward": True}, data=some_zero),
            "some_zero_advantages": of(loss_type, data=some_zero),
            "zero_advantages": of(loss_type, data={"advantages": "zero"}),
            "zero_advantages_kl": of(
                loss_type, ("ref_logp",), config=kl, data={"advantages": "zero"}
            ),
            "max_rows": of(loss_type, options={"max_rows": sum(shape.lengths)}),
            "all_masked": of(loss_type, data={"mask": "none"}),
            "per_token": of(loss_type, ("ref_logp",), config=kl, options={"per_token": True}),
            "token_advantages": of(loss_type, data={"advantages": "token"}),
            "upstream": of(loss_type, upstream=0.37),
            "nan": of(loss_type, data={"poison": "nan"}),
            "beyond_the_clamp": of(loss_type, data={"drift": 100.0}),
        }.items():
            yield f"{name}/{loss_type}", fields


def _single(shape: Shape) -> Iterator[tuple[str, dict[str, Any]]]:
    """Features of the head, the reference, the top-entropy set and the denominator."""
    of, kl = partial(_fields, shape), {"beta": 0.2}
    frozen_small = {"options": _small(shape), "trained": ("hidden",)}
    yield "frozen_small/gspo", of("gspo", **frozen_small)
    yield "lora_constant/gspo", of("gspo", head=("lora",), **frozen_small)
    yield "lora_everything", of(head=("lora", "bias"), trained=(*TRAINED, "bias", "A", "B"))
    yield "head", of(head=("bias", "softcap", "logit_scale"), trained=(*TRAINED, "bias"))
    yield "softcap", of(head=("softcap",))
    yield "logit_scale", of("gspo", head=("logit_scale",))
    yield "temperature", of(more=("temperature",))
    yield "temperature_gspo", of("gspo", ("temperature",), trained=("hidden",))
    yield "whole", of(data={"mask": "whole"})
    yield "strided", of(how="strided")
    yield "strided_gspo", of("gspo", how="strided")
    yield "too_few_rows", of(options={"max_rows": 3})
    for share in (0.2, 0.7):
        top = {"top_entropy_quantile": share}
        yield f"top_entropy/{share}", of(config=top)
        yield f"top_entropy_frozen/{share}", of(config=top, trained=("hidden",))
        bonus = {**top, "entropy_coef": 0.02}
        for kind, threshold in {"number": 1.0, "tensor": torch.tensor(1.0)}.items():
            options = {"entropy_threshold": threshold}
            yield f"top_entropy_{kind}/{share}", of(config=bonus, options=options)
    for kind, count in {"number": 40, "tensor": torch.tensor(37.0)}.items():
        for loss_type in ("dapo", "grpo", "dr_grpo", "bnpo"):
            yield f"denominator_{kind}/{loss_type}", of(loss_type, options={"denominator": count})
    for aggregation in ("sequence_mean", "sequence_sum", "token_mean", "constant_length"):
        yield f"aggregation/{aggregation}", of(config={"aggregation": aggregation})
    yield "off_policy_mask", of(config={"off_policy_mask_threshold": 0.1})
    for delta in (None, 1.3, 4.0):
        yield f"delta/{delta}", of("grpo", config={"delta": delta})
    reference = ("ref_hidden", "ref_weight")
    yield "ref_hidden", of(more=reference, config=kl)
    yield "ref_hidden_small", of("dapo", reference, config=kl, **frozen_small)
    yield "main_grad", of(more=("main_grad",))
    for loss_type in ("dapo", "gspo"):
        options = {"grad_scale": 4.0, **_small(shape)}
        fields = of(loss_type, ("main_grad",), options=options, upstream=4.0)
        yield f"grad_scale/{loss_type}", fields


def features() -> Iterator[Call]:
    """Every option of `linear_policy_loss` in each dtype, padded and packed, small and large."""
    large = Shape("packed", V=1031, H=48, times=8)
    for shape in (Shape(), Shape("packed", BF16), Shape(dtype=FP16), Shape(dtype=FP64), large):
        form = f"{shape.layout}_{str(shape.dtype)[6:]}_{shape.V}"
        for name, fields in (*_every_level(shape), *_single(shape)):
            yield Call(f"option/{name}/{form}", **fields)
    for loss_type in ("dapo", "gspo"):
        base = Call("", config=near_bounds(loss_type))
        empty = replace(base, shape=Shape("empty"), given=("mask", "old_logp", "cu_seqlens"))
        small = replace(base, shape=Shape("packed"), given=empty.given, options=_small(Shape()))
        for name, call in {
            "autocast": replace(base, how="autocast"),
            "empty": empty,
            "empty_logits": replace(empty, function="policy_loss"),
            "tp": replace(base, how="tp"),
            "tp_frozen": replace(small, how="tp", trained=("hidden",)),
            "tp_small": replace(small, how="tp"),
        }.items():
            yield replace(call, name=f"option/{name}/{loss_type}")


def logits() -> Iterator[Call]:
    """Every option of `policy_loss`."""
    for shape in (Shape(), Shape("packed", BF16), Shape(dtype=FP16)):
        form = f"{shape.layout}_{str(shape.dtype)[6:]}"
        usual = ("mask", "old_logp") + (() if shape.layout == "padded" else ("cu_seqlens",))
        for loss_type in ("dapo", "gspo"):
            config = near_bounds(loss_type)
            base = Call("", "policy_loss", config, shape, usual)
            some_zero = replace(shape, advantages="some_zero")
            skip = {"skip_inactive_forward": True}
            for name, call in {
                "plain": base,
                "inplace": replace(base, options={"inplace": True}),
                "no_grad": replace(base, how="no_grad"),
                "per_token": replace(base, options={"per_token": True}),
                "upstream": replace(base, upstream=0.37),
                "max_rows": replace(base, options={"max_rows": 26}),
                "strided": replace(base, how="strided"),
                "skip_inactive": replace(base, options=skip, shape=some_zero),
                "temperature": replace(base, given=(*usual, "temperature")),
                "all_masked": replace(base, shape=replace(shape, mask="none")),
                "entropy_bonus": replace(base, config={**config, "entropy_coef": 0.02}),
                "top_entropy": replace(base, config={**config, "top_entropy_quantile": 0.4}),
                "denominator": replace(base, options={"denominator": 40}),
                "nan": replace(base, shape=replace(shape, poison="nan")),
                "banned": replace(base, shape=replace(shape, poison="banned")),
            }.items():
                yield replace(call, name=f"logits/{name}/{loss_type}/{form}")


def logprobs() -> Iterator[Call]:
    """Every option of `logprob` and `linear_logprob`, and backward through each output."""
    everything = ("logp", "entropy", "lse")
    for dtype in (torch.float32, BF16, FP16):
        for layout in ("padded", "packed"):
            shape = Shape(layout, dtype)
            form = f"{layout}_{str(dtype)[6:]}"
            base = Call("", "linear_logprob", shape=shape, given=("mask",))
            head = (*TRAINED, "bias")
            bent = replace(shape, head=("bias", "softcap", "logit_scale"))
            ask = {"entropy": True}
            common = {
                "plain": base,
                "outputs": replace(base, outputs=everything, options=ask),
                "entropy": replace(base, outputs=("entropy",), options=ask),
                "lse": replace(base, outputs=("lse",)),
                "no_grad": replace(base, how="no_grad", options=ask),
                "whole": replace(base, given=(), shape=replace(shape, mask="whole")),
                "all_masked": replace(base, shape=replace(shape, mask="none")),
                "temperature": replace(base, options={"temperature": 0.7}),
                "nan": replace(base, shape=replace(shape, poison="nan")),
                "temperatures": replace(base, given=("mask", "temperature")),
            }
            own = {
                "head": replace(
                    base, shape=bent, given=("mask", "bias"), options=HEADS, trained=head
                ),
                "frozen_weight": replace(base, trained=("hidden",)),
                "frozen_weight_entropy": replace(
                    base, trained=("hidden",), outputs=everything, options=ask
                ),
                "frozen_hidden": replace(base, trained=("weight",)),
                "small_workspace": replace(
                    base, outputs=everything, options={**ask, **_small(shape)}
                ),
                "tp": replace(base, how="tp", outputs=everything, options=ask),
                "lora": replace(base, given=("mask", "lora"), trained=("hidden", "A", "B")),
            }
            for name, call in {**common, **own}.items():
                yield replace(call, name=f"linear_logprob/{name}/{form}")
            for name, call in common.items():
                yield replace(call, name=f"logprob/{name}/{form}", function="logprob")


def compiled() -> Iterator[Call]:
    """The four functions inside a graph of torch.compile."""
    base = Call("", config=near_bounds("dapo"), how="compile")
    gspo = near_bounds("gspo", beta=0.3)
    lora = {"given": ("mask", "old_logp", "lora"), "trained": ("hidden", "A", "B")}
    for name, call in {
        "linear_policy_loss": base,
        "gspo": replace(base, config=gspo, given=("mask", "old_logp", "ref_logp"), upstream=0.37),
        "lora": replace(base, **lora),
        "policy_loss": replace(base, function="policy_loss"),
        "linear_logprob": replace(base, function="linear_logprob", config={}, given=("mask",)),
        "logprob": replace(base, function="logprob", config={}, given=("mask",)),
    }.items():
        yield replace(call, name=f"compile/{name}")


def all_calls() -> list[Call]:
    """Every call, each under its own name."""
    makers = (presets, kl, corrections, features, logits, logprobs, compiled)
    calls = [call for maker in makers for call in maker()]
    assert len({call.name for call in calls}) == len(calls)
    return calls
