"""FastGRPOTrainer trains what TRL's GRPOTrainer trains: the same text, losses, gradients, metrics.

Where trl is missing the file is skipped; `make test-trl` has it. GRPO_FAST_TRL=full (`make
test-full`) trains with every combination of the options instead of with a covering part.
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

pytest.importorskip("trl", reason="needs trl, which `make test-trl` lays over the environment")
from tiny_trainer import checkpoint
from tiny_trl import (
    both,
    differences,
    direct,
    fabricated,
    importance_ratio,
    metrics_of,
    steps,
    trainer,
)
from trl import GRPOConfig, GRPOTrainer

from grpo_fast.integrations.trl.options import loss_config
from grpo_fast.integrations.trl.trainer import FastGRPOTrainer

TOLERANCE = 1e-5
ROOT = Path(__file__).resolve().parents[3]
SUPPORT = ROOT / "tests" / "support"
FULL = os.environ.get("GRPO_FAST_TRL") == "full"
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
FACTORS = {
    "importance_sampling_level": ("token", "sequence"),
    "beta": (0.0, 0.1),
    "num_iterations": (1, 2),
    "gradient_accumulation_steps": (1, 3),
    "use_lora": (False, True),
}


def combinations() -> list[tuple]:
    """All of them, or 16 in which each value meets each other value of another factor."""
    binary = list(itertools.product((0, 1), repeat=len(FACTORS)))
    if FULL:
        return [(name, *bits) for name in LOSS_TYPES for bits in binary]
    chosen = []
    for i, name in enumerate(LOSS_TYPES):
        a, b, c = i & 1, i >> 1 & 1, i >> 2 & 1
        bits = (a, b, c, a ^ b ^ c, a ^ b)
        chosen += [(name, *bits), (name, *(1 - x for x in bits))]
    return chosen


def named(combination: tuple) -> dict[str, object]:
    """Options of a trainer. cispo's bound is raw, and vespo's KL takes no ratio of the sequence."""
    name, *bits = combination
    chosen = {k: v[bit] for (k, v), bit in zip(FACTORS.items(), bits, strict=True)}
    special = {"cispo": {"epsilon_high": 1.01}}
    if chosen["importance_sampling_level"] == "sequence":
        special["vespo"] = {"use_bias_correction_kl": False}
    return {"loss_type": name, **chosen, **special.get(name, {})}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.skipif(FULL, reason="all of them are there")
def test_the_part_covers_pairs():
    rows = combinations()
    for i, j in itertools.combinations(range(6), 2):
        pairs = {(row[i], row[j]) for row in rows}
        assert len(pairs) == len({row[i] for row in rows}) * 2


@pytest.mark.parametrize("combination", combinations(), ids=lambda c: "-".join(map(str, c)))
def test_curves(path, combination):
    """Eight optimizer steps; the options in the order of FACTORS, 1 for the second value."""
    options = named(combination)
    ours, theirs = both(path, **options)
    assert len(steps(ours)) == 8
    found = differences(ours, theirs)
    # vespo weights a sequence by a function of the product of its ratios, and of their rounding
    allowed = 3e-5 if options["loss_type"] == "vespo" else TOLERANCE
    assert {name: gap for name, gap in found.items() if not gap <= allowed} == {}
    second = steps(theirs)[1]
    assert ("kl" in second) == (options["beta"] > 0)
    clipped = second.get("clip_ratio/region_mean", second.get("cispo_clip_ratio"))
    if clipped is not None and options["num_iterations"] == 2:
        assert clipped > 0


def test_default_optimizer(path):
    """AdamW divides a gradient by its own size, so what is mostly rounding moves whole steps."""
    ours, theirs = both(path, optim="adamw_torch", learning_rate=1e-3, num_iterations=2, beta=0.1)
    found = differences(ours, theirs)
    assert {name: gap for name, gap in found.items() if not gap <= 1e-4} == {}


def test_generations_across_optimizer_steps(path):
    """steps_per_generation beyond the accumulation: old log-probs, and another normaliser."""
    ours, theirs = both(path, steps_per_generation=4, gradient_accumulation_steps=2, max_steps=4)
    found = differences(ours, theirs)
    assert {name: gap for name, gap in found.items() if not gap <= TOLERANCE} == {}
    assert steps(theirs)[1]["clip_ratio/region_mean"] > 0


def _length_reward(completions, **_):
    return [len(text) / 10 for text in completions]


@pytest.mark.skipif(not FULL, reason="minutes: part of `make test-full`")
@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "LoRA"])
def test_smollm2(use_lora):
    """SmolLM2-135M-Instruct and its own text, with TRL's default optimizer."""
    from benchmarks.step_cases import smollm2

    options = {"optim": "adamw_torch", "learning_rate": 1e-5, "beta": 0.04, "num_iterations": 2}
    options |= {
        "max_completion_length": 12,
        "temperature": 1.0,
        "epsilon": 0.2,
        "epsilon_high": 0.2,
    }
    asked = ("a cat", "the sea", "bread", "a train", "snow", "a garden", "an old clock", "the moon")
    rows = [{"prompt": f"Write one short sentence about {what}."} for what in asked]
    one = {"use_lora": use_lora, "rows": rows, "reward": _length_reward}
    found = differences(*both(str(smollm2()), **options, **one))
    assert {name: gap for name, gap in found.items() if not gap <= TOLERANCE} == {}


def test_evaluation(path):
    logs = []
    for cls in (FastGRPOTrainer, GRPOTrainer):
        one = trainer(cls, path, beta=0.1, loss_type="dapo", max_steps=1)
        one.ref_model.lm_head.weight.data.mul_(1.1)
        torch.manual_seed(0)
        logs.append(one.evaluate())
    timed = ("runtime", "per_second", "step_time")
    assert logs[0].keys() == logs[1].keys() and logs[0]["eval_kl"] > 1e-3
    for name, value in logs[1].items():
        if not name.endswith(timed) and value is not None:
            assert logs[0][name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), name


OPTIONS = {
    "all loss types": [{"loss_type": name, "epsilon_high": 0.3} for name in LOSS_TYPES],
    "old, reference": [
        {"loss_type": name, "beta": 0.3, "importance_sampling_level": level}
        for name in LOSS_TYPES[:-1]
        for level in ("token", "sequence")
    ],
    "plain kl": [
        {"loss_type": n, "beta": 0.3, "use_bias_correction_kl": False} for n in LOSS_TYPES
    ],
    "delta": [{"delta": 1.3, "loss_type": n} for n in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")],
    "top entropy": [
        {"top_entropy_quantile": 0.4, "beta": b, "loss_type": "grpo"} for b in (0, 0.2)
    ],
    "entropy bonus": [
        {"entropy_coef": 0.1, "loss_type": name, "epsilon_high": 0.3}
        for name in ("bnpo", "dr_grpo", "dapo", "cispo", "luspo", "vespo")
    ],
    "off-policy mask": [
        {"off_policy_mask_threshold": 0.05, "loss_type": n} for n in ("grpo", "dapo", "sapo")
    ],
    "rollout": [
        {
            "vllm_importance_sampling_mode": f"{level}_{mode}",
            "vllm_importance_sampling_clip_max": 1.3,
            "vllm_importance_sampling_clip_min": low,
            "loss_type": name,
            "beta": 0.2,
        }
        for level, mode, low, name in (
            ("token", "truncate", None, "dapo"),
            ("token", "mask", 0.8, "cispo"),
            ("sequence", "truncate", 0.5, "grpo"),
            ("sequence", "mask", None, "sapo"),
        )
    ],
    "rollout and off-policy mask": [
        {"off_policy_mask_threshold": 0.05, "vllm_importance_sampling_clip_max": 5.0}
    ],
    # accelerate keeps the precision of a process, hence two groups
    "head in fp32": [{"cast_lm_head_to_fp32": True}],
    "head in fp32 under autocast": [{"cast_lm_head_to_fp32": True, "bf16": True}],
    "no checkpointing": [{"gradient_checkpointing": False}],
}


@pytest.mark.parametrize("per_token", [False, True], ids=["A (B,)", "A (B, T)"])
@pytest.mark.parametrize("group", OPTIONS)
def test_options(path, group, per_token):
    """One micro-batch off-policy, with tool tokens and a sequence that is masked whole."""
    for options in OPTIONS[group]:
        pair = [trainer(cls, path, **options) for cls in (FastGRPOTrainer, GRPOTrainer)]
        inputs = fabricated(pair[1], per_token)
        if group.startswith("rollout"):
            for one in pair:
                one.use_vllm = True
            inputs["importance_sampling_ratio"] = importance_ratio(pair[1], inputs)
        else:
            del inputs["sampling_per_token_logps"]
        (loss, grads), (want, want_grads) = (direct(one, inputs) for one in pair)
        assert loss == pytest.approx(want, rel=TOLERANCE, abs=1e-6), options
        gap = (grads - want_grads).norm() / want_grads.norm()
        assert want_grads.norm() > 1e-3 and gap < TOLERANCE, options
        metrics, expected = (metrics_of(one) for one in pair)
        assert metrics.keys() == expected.keys(), options
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), (name, options)


def test_all_masked(path):
    """A micro-batch without a token adds nothing, and can be gone back through."""
    pair = [trainer(cls, path) for cls in (FastGRPOTrainer, GRPOTrainer)]
    inputs = fabricated(pair[1], False)
    del inputs["sampling_per_token_logps"]
    inputs["tool_mask"] = torch.zeros_like(inputs["tool_mask"])
    for one in pair:
        loss, grads = direct(one, inputs)
        assert loss == 0 and not grads.any()
    assert metrics_of(pair[0]).keys() == metrics_of(pair[1]).keys()


REFUSED = {
    "use_adaptive_entropy": {"use_adaptive_entropy": True},
    "entropy_coef with loss_type='grpo'": {"entropy_coef": 0.1, "loss_type": "grpo"},
    "entropy_coef with loss_type='sapo'": {"entropy_coef": 0.1, "loss_type": "sapo"},
    "entropy_coef with top_entropy_quantile": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    "router_aux_loss_coef": {"router_aux_loss_coef": 0.01},
    "delta: expected None: cispo": {"loss_type": "cispo", "delta": 3.0},
    "delta: expected": {"delta": 1.01},
    "entropy_coef: expected": {"entropy_coef": -0.1},
    "top_entropy_quantile: expected": {"top_entropy_quantile": 0.0},
    "beta: expected": {"beta": -0.1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(tmp_path, message):
    """Before a model is loaded: there is none of this name."""
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **REFUSED[message])
    with pytest.raises(ValueError, match=message):
        FastGRPOTrainer("no/model", lambda **_: [0.0], args)


def test_refused_with_a_rollout_engine(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, loss_type="vespo")
    args.use_vllm = True
    with pytest.raises(ValueError, match="vllm_importance_sampling_correction with loss_type"):
        loss_config(args)
    args.vllm_importance_sampling_correction = False
    assert loss_config(args).loss_type == "vespo"


def test_refused_quantile_of_several_ranks(tmp_path, monkeypatch):
    args = GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, top_entropy_quantile=0.5)
    assert loss_config(args).top_entropy_quantile == 0.5
    monkeypatch.setattr(GRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="top_entropy_quantile < 1 on several processes"):
        loss_config(args)


def test_refused_sampler_without_correction(path):
    one = trainer(FastGRPOTrainer, path, off_policy_mask_threshold=0.1)
    inputs = fabricated(one, False)
    with pytest.raises(ValueError, match="off_policy_mask_threshold with log-probs of the sampler"):
        direct(one, inputs)


def test_refused_mixture_of_experts(path, tmp_path):
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        trainer(FastGRPOTrainer, str(tmp_path))
    assert trainer(FastGRPOTrainer, str(tmp_path), router_aux_loss_coef=0.0)


RANKS = """
import json, sys, torch
torch.set_num_threads(1)
from tiny_trl import both, differences, steps
path, out, runs = sys.argv[1:]
said = []
for options in json.loads(runs):
    ours, theirs = both(path, **options)
    found = differences(ours, theirs)
    said.append({"found": found, "logged": steps(theirs), "ranks": ours.accelerator.num_processes})
if ours.accelerator.process_index == 0:
    json.dump(said, open(out, "w"))
torch.distributed.destroy_process_group()
"""


def test_two_ranks(path, tmp_path):
    """DDP over gloo: the curves of `test_curves`, with ranks that hold unequal numbers of
    tokens."""
    (tmp_path / "ranks.py").write_text(RANKS)
    # one of each loss type where not all are asked for
    runs = [named(combination) for combination in combinations()[:: 1 if FULL else 2]]
    folders = [str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        + ["--master-addr", "127.0.0.1", "--master-port", str(port), str(tmp_path / "ranks.py")]
        + [path, str(tmp_path / "out.json"), json.dumps(runs)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(folders),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=3600 if FULL else 400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads((tmp_path / "out.json").read_text())
    assert len(said) == len(runs)
    clipped = 0
    for options, one in zip(runs, said, strict=True):
        assert one["ranks"] == 2 and len(one["logged"]) == 8
        allowed = 3e-5 if options["loss_type"] == "vespo" else TOLERANCE
        far = {name: gap for name, gap in one["found"].items() if not gap <= allowed}
        assert far == {}, (options, far)
        second = one["logged"][1]
        assert ("kl" in second) == (options["beta"] > 0)
        share = second.get("clip_ratio/region_mean", second.get("cispo_clip_ratio"))
        clipped += share is not None and share > 0
    assert clipped >= 2
