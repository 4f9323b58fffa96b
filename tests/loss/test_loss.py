"""The policy losses on the torch backend against the float64 reference."""

import pytest
import torch
from checks import (
    check_beyond_the_clamp,
    check_everything_together,
    check_linear,
    check_logits,
    check_many_chunks,
    check_skipped_rows,
    check_zero_advantages_leave_the_backward,
)
from loss_cases import configurations
from op_checks import check_half_precision_logits, check_steep_ratios_in_fp16


def name(value):
    if hasattr(value, "loss_type"):
        kl = (
            f"{value.kl_estimator}{'r' if value.use_bias_correction_kl else ''}"
            if value.beta
            else "nokl"
        )
        return f"{value.loss_type}-{value.level}-{value.weights}-{kl}"
    return None


@pytest.mark.parametrize("config, old, ref", configurations(), ids=name)
def test_linear_policy_loss_equals_reference(config, old, ref):
    check_linear(config, old, ref, packed=False)
    check_linear(config, old, ref, packed=True)


@pytest.mark.parametrize("config, old, ref", configurations(), ids=name)
def test_policy_loss_equals_reference(config, old, ref):
    check_logits(config, old, ref, inplace=False)
    check_logits(config, old, ref, inplace=True)


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
