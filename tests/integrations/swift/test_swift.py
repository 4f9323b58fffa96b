"""ms-swift's own GRPO run with and without the adapter: the same text, losses, gradients, metrics.

Where swift is missing the file is skipped; `make test-swift` has it. GRPO_FAST_SWIFT=full trains
with every combination of the options instead of with a covering part.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("swift", reason="needs ms-swift, which `make test-swift` lays over .venv")
from tiny_swift import LIGER, LORA, checkpoint, compare, differences, run, settings, steps

from grpo_fast.integrations import swift as adapter
from grpo_fast.integrations.swift import patch_swift

TOLERANCE = 1e-5
SUPPORT = Path(__file__).resolve().parents[2] / "support"
FULL = os.environ.get("GRPO_FAST_SWIFT") == "full"
# swift 4.6 refuses its other two, real and fipo, in every run without a teacher
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
FACTORS = {
    "importance_sampling_level": ("token", "sequence"),
    "beta": (0.0, 0.1),
    "num_iterations": (1, 2),
    "padding_free": (False, True),
    "lora": (False, True),
}


def combinations() -> list[tuple]:
    """All of them, or 8 in which each value meets each value of every other factor."""
    binary = list(itertools.product((0, 1), repeat=len(FACTORS)))
    if FULL:
        return [(name, *bits) for name in LOSS_TYPES for bits in binary]
    chosen = []
    for i, name in enumerate((*LOSS_TYPES, "grpo", "dapo")):
        a, b, c = i & 1, i >> 1 & 1, i >> 2 & 1
        chosen.append((name, a, b, c, a ^ b ^ c, a ^ b))
    return chosen


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The masks of the rows that went through ours."""
    seen = []
    linear_logprob = adapter.linear_logprob

    def counted(*args, **kwargs):
        seen.append(kwargs["mask"])
        return linear_logprob(*args, **kwargs)

    monkeypatch.setattr(adapter, "linear_logprob", counted)
    return seen


def both(path, **overrides):
    with patch_swift():
        ours = run(path, **overrides)
    return ours, run(path, **overrides)


def same(ours, theirs, count=4):
    gaps = differences(ours, theirs)
    assert len(steps(ours)) == count and {"loss", "grad_norm", "text"} <= gaps.keys()
    assert max(gaps.values()) <= TOLERANCE, {n: g for n, g in gaps.items() if g > TOLERANCE}
    return gaps


@pytest.mark.parametrize("combination", combinations(), ids=lambda c: "-".join(map(str, c)))
def test_training(path, calls, combination):
    loss_type, *bits = combination
    options = {n: v[b] for (n, v), b in zip(FACTORS.items(), bits, strict=True)}
    lora = LORA if options.pop("lora") else {}
    ours, theirs = both(path, loss_type=loss_type, **options, **lora)
    gaps = same(ours, theirs)
    assert len(calls) >= 6 and {"entropy/mean", "entropy/max"} <= gaps.keys()
    assert ("kl" in gaps) == (options["beta"] > 0)
    if options["num_iterations"] == 2 and "clip_ratio/region_mean" in gaps:
        assert any(log["clip_ratio/region_mean"] for log in steps(theirs))


MORE = {
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "beta": 0.1},
    "off-policy steps": {"gradient_accumulation_steps": 1, "steps_per_generation": 4},
    "no checkpointing": {"gradient_checkpointing": False, "beta": 0.1},
    "top entropy": {"top_entropy_quantile": 0.5, "num_iterations": 2},
    "overlong": {"overlong_filter": True, "beta": 0.1},
    "KL in reward": {"kl_in_reward": True, "advantage_estimator": "rloo", "beta": 0.1},
    "sync": {"sync_ref_model": True, "ref_model_sync_steps": 2, "beta": 0.1},
    "two-sided": {"delta": 1.04, "num_iterations": 2},
    "LoRA with the head": {**LORA, "target_modules": ["q_proj", "lm_head"], "beta": 0.1},
    "head saved": {**LORA, "modules_to_save": ["lm_head"], "beta": 0.1},
    "batches of one and two": {"num_generations": 2, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize("name", MORE)
def test_options(path, calls, name):
    ours, theirs = both(path, **MORE[name])
    if "kl_in_reward" in MORE[name]:
        # a sum over a whole sequence of differences of log-probs, some 3 nats each
        for one in (ours, theirs):
            for log in steps(one):
                log["kl"] /= 10
    same(ours, theirs)
    assert len(calls) >= 6


def test_evaluation(path, calls):
    rows = {"val_dataset": [str(path / "prompts.jsonl")], "eval_strategy": "steps", "eval_steps": 3}
    ours, theirs = both(path, max_steps=3, per_device_eval_batch_size=4, **rows)
    same(ours, theirs, 3)
    logs = [one.state.log_history for one in (ours, theirs)]
    evaluated = [[log for log in history if "eval_loss" in log] for history in logs]
    assert len(evaluated[0]) == 1
    assert max(compare(*evaluated).values()) <= TOLERANCE


def test_mixed_precision(path, monkeypatch):
    """The head is inside Accelerate's autocast, of the reference too; one step, whose text is that
    of the same weights."""
    inside, function = [], adapter.linear_logprob

    def watched(*args, **kwargs):
        inside.append(torch.is_autocast_enabled("cpu"))
        return function(*args, **kwargs)

    monkeypatch.setattr(adapter, "linear_logprob", watched)
    ours, theirs = both(path, bf16=True, beta=0.1, max_steps=1)
    assert inside == [True, True, True]
    gaps = differences(ours, theirs)
    # swift rounds logits to bf16
    assert gaps.pop("text") == 0.0 and max(gaps.values()) <= 1e-3, gaps
    assert steps(ours)[0]["kl"] == 0.0


def test_only_completion_tokens_are_read(path, calls):
    """Rows of prompts and padding never reach the head, in either layout."""
    for padding_free in (False, True):
        calls.clear()
        with patch_swift():
            one = run(path, max_steps=2, padding_free=padding_free, beta=0.0)
        lengths = sum(log["completions/mean_length"] * 4 for log in steps(one))
        kept = sum(int(mask.sum()) for mask in calls)
        # by the old policy, then by the new one
        assert kept == 2 * lengths and kept < sum(mask.numel() for mask in calls)


def test_reference_of_lora_is_the_base(path, calls):
    """The KL of the second step is not 0: the adapter is off in the reference alone."""
    with patch_swift():
        one = run(path, beta=0.1, max_steps=2, **LORA)
    assert all(log["kl"] > 0 for log in steps(one)[1:])


LIGER_RUNS = [("grpo", "token", 0.1), ("bnpo", "sequence", 0.1), ("dr_grpo", "token", 0.0)]
LIGER_RUNS += [("dapo", "sequence", 0.0), ("cispo", "token", 0.1), ("sapo", "token", 0.1)]


@pytest.mark.parametrize("loss_type, level, beta", LIGER_RUNS)
def test_liger_slot(path, loss_type, level, beta):
    """Liger's own loss in swift's slot, and ours."""
    liger_kernel = pytest.importorskip("liger_kernel.chunked_loss")
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, **LIGER}
    stock = liger_kernel.LigerFusedLinearGRPOLoss
    ours, theirs = both(path, num_iterations=2, **options)
    assert type(ours.liger_grpo_loss) is adapter.LigerFusedLinearGRPOLoss
    assert type(theirs.liger_grpo_loss) is stock is liger_kernel.LigerFusedLinearGRPOLoss
    gaps = same(ours, theirs)
    assert "clip_ratio" in gaps and ("kl" in gaps) == (beta > 0)


def test_liger_slot_of_lora(path):
    pytest.importorskip("liger_kernel")
    same(*both(path, beta=0.1, num_iterations=2, **LIGER, **LORA))


def _command(path, folder, plugins):
    given = settings(path, output_dir=folder, beta=0.1, max_steps=3, ddp_backend="gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    out += ["--master_addr", "127.0.0.1", "--master_port", port]
    out += ["-m", "swift.cli.rlhf", "--external_plugins", *plugins]
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        out += [f"--{name}", *map(str, values or ["none"])]
    return out


def _logs(path, folder, plugins):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = {"env": env, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(_command(path, folder, plugins), **given)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (Path(folder) / "logging.jsonl").read_text().splitlines())
    return [{**line, "global_step/max_steps": 0} for line in lines if "grad_norm" in line]


def test_flag_on_two_processes(path, tmp_path):
    """`--external_plugins` as in docs/swift.md, under DDP, against the same run without it."""
    module = [sys.executable, "-m", "grpo_fast.integrations.swift_plugin"]
    plugin = subprocess.run(module, capture_output=True, text=True, check=True).stdout.strip()
    reward = str(SUPPORT / "swift_reward.py")
    ours = _logs(path, tmp_path / "ours", [reward, plugin])
    theirs = _logs(path, tmp_path / "theirs", [reward])
    gaps = compare(ours, theirs)
    assert len(ours) == 3 and max(gaps.values()) <= TOLERANCE, gaps
    # the roundings are others
    assert [log["grad_norm"] for log in ours] != [log["grad_norm"] for log in theirs]
    assert any(log["kl"] for log in ours)
