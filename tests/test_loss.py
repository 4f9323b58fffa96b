"""The policy losses on the torch backend against the float64 reference."""

import pytest
from checks import check_linear, check_logits
from loss_cases import configurations


def name(value):
    if hasattr(value, "loss_type"):
        kl = (
            f"{value.kl_estimator}{'r' if value.use_bias_correction_kl else ''}"
            if value.beta
            else "nokl"
        )
        return f"{value.loss_type}-{value.importance_sampling_level}-{kl}"
    return None


@pytest.mark.parametrize("config, old, ref", configurations(), ids=name)
def test_linear_policy_loss_equals_reference(config, old, ref):
    check_linear(config, old, ref, packed=False)
    check_linear(config, old, ref, packed=True)


@pytest.mark.parametrize("config, old, ref", configurations(), ids=name)
def test_policy_loss_equals_reference(config, old, ref):
    check_logits(config, old, ref, inplace=False)
    check_logits(config, old, ref, inplace=True)
