"""Memory options of the trainer, and what it says before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from tiny_trainer import checkpoint, config, model, trainer

from grpo_fast.trainer import memory
from grpo_fast.trainer.memory import (
    MemoryNotices,
    loading_of,
    memory_summary,
    plan_of,
    still_weights,
)

peft = pytest.importorskip("peft")
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapter():
    return peft.LoraConfig(**LORA)


@pytest.fixture
def said(monkeypatch):
    """Warnings of the trainer's memory module."""
    lines = []
    monkeypatch.setattr(memory.logger, "warning", lambda text, *_: lines.append(text))
    monkeypatch.setattr(memory.logger, "warning_once", lambda text, *_: lines.append(text))
    return lines


def test_a_base_under_an_adapter_loads_as_bf16_where_bf16_is_on(tmp_path):
    mixed, plain = config(tmp_path, bf16=True), config(tmp_path)
    assert loading_of(mixed, adapter())["dtype"] is torch.bfloat16
    assert "dtype" not in loading_of(plain, adapter()) and "dtype" not in loading_of(mixed, None)
    own = config(tmp_path, bf16=True, model_init_kwargs={"dtype": "float32"})
    assert loading_of(own, adapter())["dtype"] == "float32"
    run = trainer(tmp_path, policy=checkpoint(tmp_path / "base"), bf16=True, peft_config=adapter())
    kinds = {p.dtype for p in run.model.parameters() if not p.requires_grad}
    trained = {p.dtype for p in run.model.parameters() if p.requires_grad}
    assert kinds == {torch.bfloat16} and trained == {torch.float32}


def test_bf16_weights_that_would_not_move_are_said_before_the_first_step(tmp_path, said):
    policy = model().to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    run = trainer(tmp_path, policy=policy, learning_rate=1e-6, max_steps=1)
    run.train()
    moved = sum(int((p != before[n]).sum()) for n, p in run.model.named_parameters())
    count = sum(p.numel() for p in run.model.parameters())
    assert len(said) == 1
    assert "will not move" in said[0] and "bf16_stochastic_rounding=True" in said[0]
    # it says how many, and so it is
    share = still_weights(policy, 1e-6)
    assert 0.9 < share < 1 and moved / count < 1.5 * (1 - share) + 0.01


@pytest.mark.parametrize("lr, dtype", [(1e-1, torch.bfloat16), (1e-6, torch.float32)])
def test_nothing_is_said_of_weights_that_move(tmp_path, said, lr, dtype):
    trainer(tmp_path, policy=model().to(dtype), learning_rate=lr, max_steps=1).train()
    assert said == []


def test_the_spacing_of_both_16_bit_types():
    layer = torch.nn.Linear(4, 1, bias=False)
    # half of the spacing in [1/2, 1) is 2^-9 in bf16 and 2^-12 in fp16
    for dtype, half in ((torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)):
        layer.weight.data = torch.tensor([[0.5, 0.75, 0.99, 0.0]]).to(dtype)
        some = still_weights(layer, half * 0.99)
        # 0.99 becomes 1 in bf16
        assert some == 1 and still_weights(layer, half * 2.01) == 0
        assert still_weights(layer.float(), 1e-9) == 0


def test_a_plan_that_exceeds_the_device_is_said(tmp_path, said):
    run = trainer(tmp_path)
    notices = MemoryNotices(run)
    # the prompts of tiny_trainer have two to five words
    assert notices.longest_prompt() == 5
    plan = plan_of(run.args, run.model, 5)
    assert plan.total > 1 << 20
    notices._compare(run.args, run.model, plan.total * 2)
    assert said == []
    notices._compare(run.args, run.model, plan.total)
    assert "about to exceed the device" in said[0]


def test_a_summary_for_the_start_of_a_run(tmp_path):
    run = trainer(tmp_path, gradient_accumulation_steps=2, sampling_batch_size=4)
    setup = plan_of(run.args, run.model, 5).setup
    assert (setup.method, setup.weights, setup.device) == ("full", "fp32", "cpu")
    assert (setup.batch, setup.accumulation, setup.at_once) == (4, 2, 4)
    text = memory_summary(run)
    assert text.startswith("memory   0.") and "(full, 4 x 12 tokens)" in text


def test_options_resume_bit_identically(tmp_path):
    settings = {
        "policy": checkpoint(tmp_path / "base"),
        "mlp_tile": 5,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": True,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "steps_per_generation": 4,
        "beta": 0.1,
        "max_steps": 4,
    }
    whole = trainer(
        tmp_path / "whole", peft_config=adapter(), save_strategy="steps", save_steps=1, **settings
    )
    whole.train()
    for step in (1, 3):
        resumed = trainer(tmp_path / f"resumed{step}", peft_config=adapter(), **settings)
        resumed.train(str(Path(whole.args.output_dir) / f"checkpoint-{step}"))
        theirs = dict(resumed.model.named_parameters())
        for name, parameter in whole.model.named_parameters():
            assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"mlp_tile": 0}, "mlp_tile: expected None or an integer >= 1, got 0"),
        ({"quantization": "int4"}, "quantization: expected None, nf4 or int8, got 'int4'"),
        (
            {"parallelism_config": ParallelismConfig(cp_size=2)},
            "parallelism_config.cp_size: expected 1, got 2; ring attention",
        ),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "parallelism_config.tp_size: exp"),
        (
            {"quantization": "nf4", "model_init_kwargs": {"quantization_config": {}}},
            "model_init_kwargs: expected no quantization_config",
        ),
    ],
)
def test_config_refuses(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence.split(";")[0].replace("(", r"\(")):
        config(tmp_path, **options)


def test_packed_weights_need_an_adapter_and_a_name(tmp_path):
    with pytest.raises(ValueError, match="quantization: expected None without an adapter"):
        trainer(tmp_path, policy=checkpoint(tmp_path / "base"), quantization="nf4")
    with pytest.raises(ValueError, match="quantization: expected None with a model that is built"):
        trainer(tmp_path, quantization="nf4", peft_config=adapter())


def test_stochastic_rounding_wants_the_default_optimizer(tmp_path):
    with pytest.raises(ValueError, match="optim: expected the default with bf16_stochastic"):
        trainer(tmp_path, bf16_stochastic_rounding=True, optim="sgd")
