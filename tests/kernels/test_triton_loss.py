"""The policy losses on the Triton kernels, in Triton's interpreter, against the float64
reference."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from checks import (
    check_beyond_the_clamp,
    check_everything_together,
    check_linear,
    check_logits,
    check_many_chunks,
    check_skipped_rows,
    check_zero_advantages_leave_the_backward,
)
from correction_checks import CORRECTIONS, FULL, check_corrections
from loss_cases import configurations
from op_checks import check_half_precision_logits, check_steep_ratios_in_fp16
from option_checks import check_frozen_head, check_lora, check_max_rows, check_routes


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")


@pytest.mark.parametrize("config, old, ref", configurations())
def test_linear_policy_loss_equals_reference(config, old, ref):
    check_linear(config, old, ref, packed=old)


@pytest.mark.parametrize("config, old, ref", configurations())
def test_policy_loss_equals_reference(config, old, ref):
    check_logits(config, old, ref, inplace=old)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("objective", ["dapo", "grpo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_everything_together(level, objective, frozen):
    check_everything_together(level, objective, frozen)


@pytest.mark.parametrize("use_old", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_many_chunks(level, use_old):
    check_many_chunks(level, use_old)


def test_zero_advantages_leave_the_backward():
    check_zero_advantages_leave_the_backward()


@pytest.mark.parametrize("objective", ["grpo", "cispo"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_skipped_rows(level, per_token, objective):
    check_skipped_rows(level, per_token, objective)


@pytest.mark.parametrize("beta, weighted", [(0.0, False), (1e-9, False), (1e-9, True)])
def test_beyond_the_clamp(beta, weighted):
    check_beyond_the_clamp(beta, weighted)


@pytest.mark.parametrize("upstream", [1 / 7, 32768.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype, upstream):
    check_half_precision_logits(dtype, upstream)


def test_steep_ratios_in_fp16():
    check_steep_ratios_in_fp16()


IN_THE_PASS = ("token_mask_both", "token_truncate_high", "entropy_bonus", "temperature_token")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", CORRECTIONS if FULL else (*IN_THE_PASS, "together"))
def test_corrections(name, old):
    """At token level the one-pass rows apply what needs no sequence themselves."""
    check_corrections("dapo", name, old=old)
    if FULL or name == "together":
        check_corrections("gmpo", name, old=old)


def test_adapters_frozen_heads_capacities_and_routes():
    check_lora(("hidden", "weight", "bias", "A", "B"), "dapo", {"rollout", "temperature"}, True)
    check_frozen_head("gspo", None, {"old", "ref", "temperature", "rollout"})
    check_max_rows("dapo", "together_without_top", True, ("hidden", "weight", "bias", "A", "B"))
    check_routes()
