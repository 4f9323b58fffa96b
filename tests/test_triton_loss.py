"""The policy losses on the Triton kernels, in Triton's interpreter, against the float64
reference."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from checks import check_linear, check_logits
from loss_cases import configurations


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")


@pytest.mark.parametrize("config, old, ref", configurations())
def test_linear_policy_loss_equals_reference(config, old, ref):
    check_linear(config, old, ref, packed=old)


@pytest.mark.parametrize("config, old, ref", configurations())
def test_policy_loss_equals_reference(config, old, ref):
    check_logits(config, old, ref, inplace=old)
