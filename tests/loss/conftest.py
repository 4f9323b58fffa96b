"""What several tests of the losses run under."""

import sys

import pytest
import torch
from device import kernels


@pytest.fixture
def no_kernels(monkeypatch):
    """Any row function that runs is a failure: the check came too late."""

    def refuse(*args, **kwargs):
        raise AssertionError("work began before the arguments were checked")

    for name in ("logprob_fwd", "logprob_bwd", "policy"):
        monkeypatch.setattr(f"grpo_fast.engine.torch_backend.{name}", refuse)
    monkeypatch.setattr("grpo_fast.engine.gemm.project", refuse)


@pytest.fixture
def accelerator(monkeypatch):
    """Calls with tensors of the device use kernels; the others do what they always do."""
    from grpo_fast.engine import backend

    def select(device):
        return kernels(device) if torch.device(device).type == "meta" else backend.select(device)

    for name in ("loss.linear", "loss.logits", "loss.attach", "engine.logprob"):
        monkeypatch.setattr(sys.modules[f"grpo_fast.{name}"], "select", select)
