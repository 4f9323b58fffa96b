"""`integrations/liger.py` against float64 for every option, and against Liger-Kernel itself where
that is installed. The tests of its Triton function are in `test_liger_function.py`."""

import inspect
import re
from pathlib import Path

import pytest
from fresh import run_python
from liger_cases import (
    KINDS,
    data,
    from_logits,
    linear,
    options,
    token_truth,
    truth,
)
from liger_parity import BOUND, FORWARD, REQUIRED, agree, compare, liger

from grpo_fast.integrations.liger.linear import LigerFusedLinearGRPOLoss
from grpo_fast.integrations.liger.logits import triton_grpo_loss

# (name, default) in the order of Liger 0.8.5
CONSTRUCTOR = (
    ("beta", 0.04),
    ("compiled", True),
    ("use_ref_model", True),
    ("chunk_size", 1),
    ("epsilon_low", 0.2),
    ("epsilon_high", 0.2),
    ("loss_type", "dapo"),
    ("max_completion_length", None),
    ("importance_sampling_level", "token"),
    ("sapo_temperature_pos", 1.0),
    ("sapo_temperature_neg", 1.05),
    ("temperature", 1.0),
    ("delta", None),
    ("use_bias_correction_kl", False),
    ("vespo_k_pos", 2.0),
    ("vespo_lambda_pos", 3.0),
    ("vespo_k_neg", 3.0),
    ("vespo_lambda_neg", 2.0),
)
FUNCTION = (
    *((n, REQUIRED) for n in ("logits", "old_logp", "ref_logp", "completion_ids", "advantages")),
    ("completion_mask", None),
    ("temperature", 0.9),
    ("beta", 0.04),
    ("eps_low", 0.2),
    ("eps_high", 0.4),
    ("inplace", True),
    ("loss_type", "dapo"),
    ("max_completion_length", None),
    ("importance_sampling_level", "token"),
    ("reduce", False),
    ("sapo_temperature_pos", 1.0),
    ("sapo_temperature_neg", 1.05),
    ("vllm_is_ratio", None),
    ("delta", None),
    ("use_bias_correction_kl", False),
    ("num_items_in_batch", None),
    *CONSTRUCTOR[-4:],
)


def signature(function) -> tuple:
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return tuple((p.name, p.default) for p in parameters if p.name != "self")


def test_signatures_are_the_recorded_ones():
    assert signature(LigerFusedLinearGRPOLoss) == CONSTRUCTOR
    assert signature(LigerFusedLinearGRPOLoss.forward) == FORWARD
    assert signature(triton_grpo_loss) == FUNCTION


def test_signatures_are_those_of_liger():
    theirs = liger("LigerFusedLinearGRPOLoss")
    assert signature(theirs) == CONSTRUCTOR
    assert signature(theirs.forward) == FORWARD
    assert signature(liger("triton_grpo_loss")) == FUNCTION


@pytest.mark.parametrize("loss_type, level", KINDS)
def test_class_equals_float64(loss_type, level):
    d, clipped = data(), set()
    for o in options(loss_type, level):
        got = linear(LigerFusedLinearGRPOLoss, o, d)
        want = truth(o, d)
        plain = {("kl" if n == "weighted_kl" else n): value for n, value in got.items()}
        agree(plain, want, o)
        if o.old:
            clipped.add(got["clip_ratio"].item())
    bounded = loss_type not in ("sapo", "vespo")
    assert all(0 < share < 1 for share in clipped) if bounded else clipped == {0.0}


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("loss_type, level", KINDS)
def test_function_equals_float64(loss_type, level, reduce):
    d = data()
    for o in options(loss_type, level):
        if o.ref == "hidden":
            continue
        got = from_logits(triton_grpo_loss, o, d, reduce)
        if reduce and "weighted_kl" in got:
            got["kl"] = got.pop("weighted_kl")
        agree(got, (truth if reduce else token_truth)(o, d), o)


@pytest.mark.parametrize("loss_type, level", KINDS)
def test_class_equals_liger(loss_type, level):
    for name, row in compare(loss_type, level).items():
        assert max(row.values()) <= BOUND, (name, row)


def test_importing_loads_nothing_of_liger():
    code = "import sys, grpo_fast.integrations.liger; print('liger_kernel' in sys.modules)"
    assert run_python(code) == "False"


def test_snippets_of_the_page_run():
    page = Path(__file__).resolve().parents[3] / "docs" / "liger.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 3
    scope: dict = {}
    exec("\n".join(code[:2]), scope)
    assert scope["hidden"].grad.any() and scope["logits"].grad.any()
    import_name = "import liger_kernel.chunked_loss\n"
    assert import_name in code[2]
    liger("LigerFusedLinearGRPOLoss")
    import liger_kernel.chunked_loss as module

    theirs = module.LigerFusedLinearGRPOLoss
    exec(code[2], {})
    assert module.LigerFusedLinearGRPOLoss is LigerFusedLinearGRPOLoss
    module.LigerFusedLinearGRPOLoss = theirs
