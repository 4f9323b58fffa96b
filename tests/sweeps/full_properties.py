"""Random calls of the four loss and log-prob functions, torch backend against the kernels in
Triton's interpreter: `python tests/sweeps/full_properties.py [--cases N] [--numbers FILE]`, with
PYTHONPATH=.:tests/support.

`property_checks.py` says what has to agree, and how closely. The first call on which the backends
disagree is made as small as hypothesis can, and printed as a script that reproduces it.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from property_cases import Call, build
from property_checks import Mismatch, arguments, compare

from grpo_fast import PRESETS, linear_policy_loss
from grpo_fast.presets import AGGREGATIONS, KL_ESTIMATORS, OBJECTIVES, ROLLOUT_CORRECTIONS

CASES = 2000
# two loss functions for one log-prob function: most of the options are theirs
OPS = ("linear_policy_loss", "linear_policy_loss", "policy_loss", "policy_loss")
OPS += ("linear_logprob", "logprob")
MASKS = ("none", "random", "random", "random", "zero_row", "all_zero", "one_token")


def rarely(draw, strategy, share: int = 4, otherwise: Any = None) -> Any:
    """A draw from strategy once in `share` times."""
    return draw(strategy) if draw(st.integers(1, share)) == share else otherwise


@st.composite
def configs(draw, beta: bool) -> dict[str, Any]:
    """Fields of a `LossConfig` that its loss type has a use for."""
    loss_type = draw(st.sampled_from(sorted(PRESETS)))
    preset = PRESETS[loss_type]
    number = st.floats(0.05, 0.6).map(lambda x: round(x, 3))
    config = {
        "loss_type": loss_type,
        "max_completion_length": 12,
        "temperature": draw(st.sampled_from((0.7, 1.0, 1.3))),
        "epsilon": draw(number),
        "epsilon_high": draw(number) + (1.0 if loss_type == "cispo" else 0.0),
        "importance_sampling_level": rarely(draw, st.sampled_from((*preset.levels, None)), 2),
        "aggregation": rarely(draw, st.sampled_from(sorted(AGGREGATIONS))),
        "entropy_coef": rarely(draw, st.sampled_from((0.01, 0.5)), otherwise=0.0),
        "top_entropy_quantile": rarely(draw, st.sampled_from((0.2, 0.55)), 6, 1.0),
        "rollout_correction": draw(st.sampled_from(ROLLOUT_CORRECTIONS)),
        "rollout_ratio_min": rarely(draw, st.sampled_from((0.5, 0.9)), 2),
        "rollout_ratio_max": draw(st.sampled_from((None, 1.2, 3.0))),
        "off_policy_mask_threshold": rarely(draw, st.sampled_from((0.02, 0.1)), 6),
    }
    if "ratio_cap" in OBJECTIVES[preset.objective].parameters:
        config["delta"] = rarely(draw, st.sampled_from((1.7, 4.0)), 2)
    if loss_type == "cispo":
        config["cispo_ratio_min"] = rarely(draw, st.sampled_from((0.7, 0.95)), 2, 0.0)
    if beta:
        config |= {
            "beta": draw(st.sampled_from((0.04, 1.0))),
            "kl_estimator": draw(st.sampled_from(KL_ESTIMATORS)),
            "kl_gradient": rarely(draw, st.sampled_from(KL_ESTIMATORS)),
            "use_bias_correction_kl": draw(st.booleans()),
        }
    return config


def _loss_fields(draw, op: str, packed: bool) -> dict[str, Any]:
    linear = op == "linear_policy_loss"
    reference = draw(st.sampled_from(("none", "none", "log-probs", "hidden")))
    if reference == "hidden" and not linear:
        reference = "log-probs"
    # 30 nats: extreme ratios, clamped and counted
    drifts = st.sampled_from((0.1, 0.3, 0.3, 1.0, 30.0))
    fields = {
        "ref": draw(drifts) if reference == "log-probs" else None,
        "ref_hidden": reference == "hidden",
        "old": rarely(draw, st.one_of(st.just(0.0), drifts), 2),
        "rollout": rarely(draw, drifts, 3),
        "rollout_missing": draw(st.booleans()),
        "per_token": draw(st.booleans()),
        "denominator": rarely(draw, st.sampled_from((1.0, 7.5, 1e6))),
        "max_rows": rarely(draw, st.sampled_from((0.5, 1.0)), 6),
        "inplace": not linear and draw(st.booleans()),
        "config": draw(configs(reference != "none" and draw(st.integers(0, 3)) > 0)),
    }
    plain = fields["config"]["top_entropy_quantile"] == 1.0 and fields["max_rows"] is None
    return {**fields, "skip": plain and rarely(draw, st.just(True), 3, False)}


def _linear_fields(draw) -> dict[str, Any]:
    names = ("hidden", "weight", "bias", "lora_A", "lora_B")
    wanted = draw(
        st.one_of(st.just(names), st.sets(st.sampled_from(names)).map(sorted), st.just(("hidden",)))
    )
    return {
        "H": draw(st.integers(1, 20)),
        "weight_layout": draw(st.sampled_from(("plain", "swapped", "wide", "offset"))),
        "bias": draw(st.booleans()),
        "lora": rarely(draw, st.integers(1, 3), otherwise=0),
        "softcap": rarely(draw, st.sampled_from((3.0, 20.0)), 3),
        "logit_scale": rarely(draw, st.sampled_from((0.6, -1.5)), 3, 1.0),
        "wanted": tuple(wanted),
        "workspace": draw(st.sampled_from(("default", "small", "columns"))),
    }


@st.composite
def calls(draw) -> Call:
    """Shapes, strides, dtypes, masks and every option of a call."""
    op = draw(st.sampled_from(OPS))
    packed = draw(st.booleans())
    if packed:
        lengths = draw(st.lists(st.integers(0, 9), max_size=9))
        if sum(lengths) == len(lengths):
            # advantages (S,) and (N,) would be the same shape
            lengths.append(2)
    else:
        lengths = [draw(st.integers(0, 9))] * draw(st.integers(0, 9))
    fields: dict[str, Any] = {"H": 1}
    if op.startswith("linear"):
        fields |= _linear_fields(draw)
    if op.endswith("loss"):
        fields |= _loss_fields(draw, op, packed)
    banned = st.sampled_from(("others", "target") if fields.get("softcap") is None else ("none",))
    number = fields.get("config", {}).get("temperature")
    # the entropies of equal rows differ by their rounding alone, and so does what a quantile cuts
    expanded = not fields.get("inplace")
    expanded &= fields.get("config", {}).get("top_entropy_quantile", 1.0) == 1.0
    layouts = ("plain", "swapped", "sliced", "wide", "offset", *(["expanded"] if expanded else []))
    layout = draw(st.sampled_from(layouts))
    if layout == "swapped" and packed and not op.startswith("linear"):
        # logits have stride 1 over V
        layout = "wide"
    return Call(
        op=op,
        lengths=tuple(lengths),
        packed=packed,
        V=rarely(draw, st.integers(71, 600), 12, None) or draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from(("fp32", "fp32", "fp16", "bf16"))),
        seed=draw(st.integers(0, 2**31)),
        mask=draw(st.sampled_from(MASKS)),
        mask_dtype=draw(st.sampled_from(("bool", "int", "float", "uint8"))),
        layout=layout,
        spread=draw(st.sampled_from((0.3, 1.0, 3.0))),
        zeros=draw(st.sampled_from((0.0, 0.4, 1.0))),
        # a softcap of -inf is -softcap
        banned=rarely(draw, banned, 6, "none"),
        temperature=draw(st.sampled_from(("number", "number", "sequence", "token")))
        if number is None or draw(st.booleans())
        else "number",
        upstream=draw(st.sampled_from((1.0, -0.37, 256.0))),
        entropy=draw(st.booleans()),
        lse=draw(st.booleans()),
        **fields,
    )


def route(call: Call) -> str:
    """The planner's route of a linear loss, else the function."""
    if call.op != "linear_policy_loss":
        return call.op
    tensors = build(call)
    leaves = {k: v.requires_grad_(k in call.wanted) for k, v in tensors.leaves.items()}
    args, given_ = arguments(call, tensors, leaves)
    given_.pop("workspace_bytes", None)
    return linear_policy_loss(*args, **given_, explain=True).route


def sweep(cases: int, start: int | None) -> tuple[collections.Counter, str | None]:
    """Compare so many calls; what they were, and the smallest one that failed."""
    seen: collections.Counter = collections.Counter()
    clock = time.monotonic()

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=start is None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def one(call: Call) -> None:
        seen["cases"] += 1
        if seen["cases"] % 100 == 0:
            print(f"{seen['cases']} calls, {time.monotonic() - clock:.0f} s", flush=True)
        compare(call)
        seen[f"dtype {call.dtype}"] += 1
        seen[f"mask {call.mask}"] += 1
        seen[f"layout {call.layout}"] += 1
        seen[f"route {route(call)}"] += 1
        if call.loss:
            seen[f"loss_type {call.config['loss_type']}"] += 1

    try:
        (one if start is None else seed(start)(one))()
    except Mismatch as error:
        return seen, str(error)
    return seen, None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--numbers", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(argv)
    from interpreter import install

    install()
    seen, failure = sweep(args.cases, args.seed)
    if failure is not None:
        print(failure)
    figures = {"mismatches": 0 if failure is None else 1, **dict(sorted(seen.items()))}
    if args.numbers:
        args.numbers.write_text(json.dumps(figures), encoding="utf-8")
    print(json.dumps(figures))
    return 0 if failure is None and seen["cases"] >= args.cases else 1


if __name__ == "__main__":
    sys.exit(main())
