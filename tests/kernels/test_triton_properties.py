"""Random calls on both backends, the short form of `full_properties.py`."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import torch
from full_properties import sweep
from property_cases import Call
from property_checks import Mismatch, compare, disagreement

pytestmark = [pytest.mark.kernels, pytest.mark.triton]
CASES = 120
CONFIG = {"loss_type": "dapo", "temperature": 0.7}
# calls on which something was wrong once
FOUND = {
    "active_rows did not count the rows of an entropy bonus": Call(
        op="linear_policy_loss",
        lengths=(2,),
        packed=True,
        V=7,
        H=3,
        dtype="fp16",
        seed=0,
        zeros=1.0,
        config={**CONFIG, "entropy_coef": 0.01},
    ),
    "max_rows with no rows": Call(
        op="linear_policy_loss",
        lengths=(),
        packed=False,
        V=3,
        H=2,
        dtype="fp32",
        seed=0,
        max_rows=0.5,
        config=CONFIG,
    ),
    "a quantile of no entropies": Call(
        op="policy_loss",
        lengths=(0,),
        packed=True,
        V=3,
        H=1,
        dtype="fp32",
        seed=0,
        config={**CONFIG, "top_entropy_quantile": 0.5},
    ),
    "backward by slices of the vocabulary, which the torch rows cannot": Call(
        op="linear_logprob",
        lengths=(7, 7, 7),
        packed=False,
        V=50,
        H=7,
        dtype="fp32",
        seed=0,
        workspace="columns",
        entropy=True,
    ),
    "ratio_min of no tokens with max_rows": Call(
        op="policy_loss",
        lengths=(5,),
        packed=True,
        V=3,
        H=1,
        dtype="fp32",
        seed=0,
        mask="all_zero",
        max_rows=0.5,
        config=CONFIG,
    ),
}


def test_random_calls_agree():
    seen, failure = sweep(CASES, None)
    assert failure is None, failure
    assert seen["cases"] >= CASES
    # every route of the planner, or the draws are not what they were meant to be
    assert sum(name.startswith("route") for name in seen) >= 7


@pytest.mark.parametrize("call", FOUND.values(), ids=FOUND)
def test_what_was_wrong_once(call):
    compare(call)


def test_a_wrong_gradient_is_a_mismatch_and_prints_its_call(monkeypatch):
    call = FOUND["active_rows did not count the rows of an entropy bonus"]
    namespace = {}
    exec(f"from property_cases import Call\nagain = {call!r}", namespace)
    assert namespace["again"] == call
    exact = torch.randn(50)
    for dtype, factor in (("fp32", 1.0001), ("bf16", 1.05), ("fp16", 1.01)):
        odd = Call(**{**vars(call), "dtype": dtype})
        results = (factor * exact, exact, lambda **_: {"grad hidden": exact.double()})
        assert disagreement(odd, "grad hidden", *results)
    nan = exact.clone()
    nan[3] = torch.nan
    assert disagreement(call, "loss", nan, exact, None)
    assert disagreement(call, "loss", exact.half(), exact, None)
    monkeypatch.setattr("grpo_fast.kernels.policy.policy", lambda *args, **kw: None)
    monkeypatch.setattr("grpo_fast.kernels.logprob.logprob_fwd", lambda *args, **kw: None)
    with pytest.raises(Mismatch, match=r"compare\(Call\("):
        compare(call)
