"""grpo-fast doctor: what it prints, and that a wrong kernel fails it."""

from __future__ import annotations

import platform

import pytest
import torch

from grpo_fast import __version__, linear_policy_loss
from grpo_fast.cli import doctor
from grpo_fast.cli.main import main
from grpo_fast.engine import backend


def test_report(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for text in (
        f"grpo_fast {__version__}, Python {platform.python_version()}",
        f"torch          {torch.__version__}",
        backend.explain("cpu"),
        "PASS: the largest is",
    ):
        assert text in out
    assert "FAIL" not in out


@pytest.mark.parametrize("part", ["loss", "dhidden", "dweight", "nan"])
def test_wrong_numbers_fail(part, capsys, monkeypatch):
    """Errors of 1e-4, and NaN, in one output alone."""

    def wrong(hidden, weight, *args, **kwargs):
        if part == "dhidden":
            hidden.register_hook(lambda grad: grad * (1 + 1e-4))
        if part == "dweight":
            weight.register_hook(lambda grad: grad * (1 + 1e-4))
        loss, metrics = linear_policy_loss(hidden, weight, *args, **kwargs)
        off = {"loss": loss.detach() * 1e-4, "nan": torch.nan}.get(part, 0.0)
        return loss + off, metrics

    monkeypatch.setattr(doctor, "linear_policy_loss", wrong)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "FAIL: the largest is" in capsys.readouterr().out


def test_backend_that_cannot_run_fails_with_the_rest_printed(capsys, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "tritan")
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL: ArgumentError: GRPO_FAST_BACKEND: expected" in out and torch.__version__ in out


def test_old_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(doctor._PACKAGES, "torch", ("everything", (99, 0)))
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "too old: expected at least 99.0" in capsys.readouterr().out


def test_unknown_device(capsys):
    assert main(["doctor", "--device", "cpuu"]) == 2
    assert "--device cpuu" in capsys.readouterr().err


@pytest.mark.gpu
def test_gpu():
    assert main(["doctor", "--device", "cuda"]) == 0
