"""patch_trl: TRL's trainers with the log-probs of linear_logprob, and TRL's version."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile

import pytest
import torch

pytest.importorskip("trl", reason="needs trl, which `make test-trl` lays over the environment")
from datasets import Dataset
from tiny_trainer import checkpoint, dataset, spread_reward, tokenizer
from tiny_trl import lora, settings, steps
from transformers import PrinterCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from grpo_fast.integrations.trl import logprob as trl_logprob
from grpo_fast.integrations.trl.logprob import patch_trl, unpatch_trl

TOLERANCE = 1e-5
ONLINE = ("num_generations", "max_completion_length", "temperature", "epsilon", "epsilon_high")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    utils._ChunkedLogProbFunction = ChunkedLogProbFunction


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


def _texts() -> list[dict[str, object]]:
    rows = dataset(8)
    return [
        {"prompt": r["prompt"], "chosen": f" {r['target']} w7", "rejected": " w9 w3 w4"}
        for r in rows
    ]


def _online(cls: type, config: type, folder: str, path: str, **own: object):
    return cls(
        path,
        reward_funcs=spread_reward,
        args=config(output_dir=folder, **settings(max_steps=3, **own)),
        train_dataset=Dataset.from_list(dataset(16)),
        processing_class=tokenizer(),
    )


def _offline(cls: type, config: type, folder: str, path: str, rows: list, peft=None, **own: object):
    given = {k: v for k, v in settings(max_steps=3, **own).items() if k not in ONLINE}
    return cls(
        path,
        args=config(output_dir=folder, **given),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=peft,
    )


def _kto() -> list[dict[str, object]]:
    rows = _texts()
    return [
        {"prompt": r["prompt"], "completion": r[("chosen", "rejected")[i % 2]], "label": i % 2 == 0}
        for i, r in enumerate(rows)
    ]


BUILD = {
    "GRPO": lambda f, p: _online(GRPOTrainer, GRPOConfig, f, p, beta=0.1, num_iterations=2),
    "RLOO": lambda f, p: _online(RLOOTrainer, RLOOConfig, f, p, beta=0.1, num_iterations=2),
    "DPO": lambda f, p: _offline(DPOTrainer, DPOConfig, f, p, _texts()),
    "DPO, WPO": lambda f, p: _offline(DPOTrainer, DPOConfig, f, p, _texts(), use_weighting=True),
    "DPO, LoRA": lambda f, p: _offline(DPOTrainer, DPOConfig, f, p, _texts(), lora()),
    "KTO": lambda f, p: _offline(KTOTrainer, KTOConfig, f, p, _kto()),
    "SFT": lambda f, p: _offline(
        SFTTrainer, SFTConfig, f, p, [{"text": r["prompt"] + r["chosen"]} for r in _texts()]
    ),
}


def _train(name: str, path: str) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        one = BUILD[name](folder, path)
        one.remove_callback(PrinterCallback)
        one.train()
    return steps(one)


@pytest.mark.parametrize("name", BUILD)
def test_every_trainer(path, name):
    """Three steps, with every metric that TRL logs."""
    theirs = _train(name, path)
    calls = []
    apply = trl_logprob._FastLogProb.apply
    with pytest.MonkeyPatch.context() as patch, patch_trl():
        patch.setattr(
            trl_logprob._FastLogProb, "apply", lambda *args: calls.append(args[-1]) or apply(*args)
        )
        ours = _train(name, path)
    assert calls and len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys() and "grad_norm" in mine
        for key, value in other.items():
            if value is not None and not key.endswith(("time", "per_second")):
                # transformers rounds the loss
                rounding = 2e-6 if key == "loss" else 1e-6
                # KTO's is a mean of differences of sums over a sequence, some 100 nats each
                rounding = 5e-6 if key == "kl" else rounding
                assert mine[key] == pytest.approx(value, rel=TOLERANCE, abs=rounding), key


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "temperature": {"temperature": 0.7},
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_function(head, frozen):
    """All outputs, and the gradients of log-prob and entropy, of TRL's function."""
    options = HEADS[head]
    results = []
    for function in (ChunkedLogProbFunction, trl_logprob._FastLogProb):
        torch.manual_seed(0)
        hidden = torch.randn(50, 16, requires_grad=True)
        weight = torch.randn(77, 16).requires_grad_(not frozen)
        bias = torch.randn(77, requires_grad=True) if "bias" in options else None
        ids = torch.randint(77, (50,))
        # half of them are top 1
        ids[::2] = (hidden @ weight.T).argmax(-1)[::2] if bias is None else ids[::2]
        given = (options.get("temperature", 1.0), 32, options.get("softcap"))
        out = function.apply(hidden, weight, bias, ids, *given, options.get("scale", 1.0))
        (out[0] * torch.randn(50) + out[1] * torch.randn(50)).sum().backward()
        leaves = [t.grad for t in (hidden, weight, bias) if t is not None and t.requires_grad]
        results.append((out, leaves))
    (want, want_grads), (got, grads) = results
    for a, b in zip(got[:4], want[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[4], want[4]) and (head == "bias" or want[4].any())
    for a, b in zip(grads, want_grads, strict=True):
        assert (a - b).norm() <= TOLERANCE * b.norm()


def test_function_of_nothing():
    """No valid label: TRL calls it with no rows, and goes back through it."""
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.long)
    out = trl_logprob._FastLogProb.apply(hidden, weight, None, ids, 1.0, 32)
    assert [t.shape for t in out] == [(0,)] * 5
    out[0].sum().backward()
    assert not weight.grad.any()


def test_function_under_autocast():
    hidden, weight = torch.randn(20, 8, dtype=torch.bfloat16), torch.randn(9, 8)
    ids = torch.randint(9, (20,))
    for on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            got, want = (
                f.apply(hidden, weight, None, ids, 1.0, 32, None, 1.0, ("entropy",))
                for f in (trl_logprob._FastLogProb, ChunkedLogProbFunction)
            )
        assert got[2:] == (None,) * 3 and got[0].dtype == torch.float32
        # theirs rounds the logits to bf16, ours does not
        torch.testing.assert_close(got[0], want[0], rtol=3e-2, atol=3e-2)


def test_zero3_is_refused():
    weight = torch.randn(9, 8)
    weight.ds_id = 3
    ids = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        trl_logprob._FastLogProb.apply(torch.randn(2, 8), weight, None, ids, 1.0, 32)


def test_reversible_and_idempotent():
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with patch_trl():
        assert utils._ChunkedLogProbFunction is trl_logprob._FastLogProb
        with patch_trl():
            pass
        # the inner one was not the first
        assert utils._ChunkedLogProbFunction is trl_logprob._FastLogProb
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    patch_trl()
    patch_trl()
    unpatch_trl()
    unpatch_trl()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_does_not_undo_somebody_else():
    patch_trl()
    utils._ChunkedLogProbFunction = other = object()
    with pytest.raises(ValueError, match="replaced since patch_trl"):
        unpatch_trl()
    assert utils._ChunkedLogProbFunction is other


def _again(patch: pytest.MonkeyPatch):
    """Import the module anew; the one that others hold stays."""
    patch.delitem(sys.modules, "grpo_fast.integrations.trl.logprob")
    return importlib.import_module("grpo_fast.integrations.trl.logprob")


def test_without_trl(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "trl"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"works with trl 1\.16\.0 \(pip install trl==1\.16\.0\)"):
        _again(monkeypatch)


def test_with_another_trl(monkeypatch):
    import trl

    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match=r"trl 1\.16\.0; 1\.17\.0 is installed and untested"):
        _again(monkeypatch)


def test_with_a_trl_without_the_function(monkeypatch):
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(ImportError, match=r"works with trl 1\.16\.0"):
        _again(monkeypatch)
