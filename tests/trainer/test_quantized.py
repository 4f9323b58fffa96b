"""Adapters over packed bases, and optimizers of bitsandbytes and torchao, on the CPU.

`make test-quantized` installs both beside the environment; without them every test is skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_trainer import checkpoint, model, spread_reward, trainer

peft = pytest.importorskip("peft")
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}
# an old policy and a reference, which at the first step are the policy
SETTINGS = {
    "reward": spread_reward,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "beta": 0.1,
    "max_steps": 4,
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """torchao compiles its optimizers, for a CPU for minutes; they compute the same without."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return checkpoint(tmp_path_factory.mktemp("base"))


def adapted(folder, base, **options):
    torch.manual_seed(5)
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer(folder, policy=base, peft_config=adapter, **{**SETTINGS, **options})


def trained(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_base_trains_and_is_its_own_reference(kind, dtype, base, tmp_path):
    pytest.importorskip(PACKAGES[kind])
    run = adapted(
        tmp_path, base, quantization=kind, model_init_kwargs={"dtype": dtype}, max_steps=3
    )
    kinds = {type(m).__name__ for m in run.model.modules()}
    packed = [p for p in run.model.parameters() if type(p).__name__ in ("Params4bit", "Int8Tensor")]
    assert ("Linear4bit" in kinds) == (kind == "nf4")
    # four projections of attention and three of the MLP, in two layers
    assert len(packed) == 14 or kind == "int8"
    before = trained(run)
    run.train()
    first, *_, last, _ = run.state.log_history
    assert first["ratio/min"] == first["ratio/mean"] == first["ratio/max"] == 1.0
    assert first["kl"] == 0.0
    assert last["kl"] > 0.0
    after = trained(run)
    assert all("lora" in name for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_resume_is_bit_identical(kind, base, tmp_path):
    pytest.importorskip(PACKAGES[kind])
    whole = adapted(
        tmp_path / "whole", base, quantization=kind, save_strategy="steps", save_steps=1
    )
    whole.train()
    # step 1 lies inside a window, step 3 too
    for step in (1, 3):
        resumed = adapted(tmp_path / f"from{step}", base, quantization=kind)
        resumed.train(str(Path(whole.args.output_dir) / f"checkpoint-{step}"))
        theirs = trained(resumed)
        for name, weight in trained(whole).items():
            assert torch.equal(weight, theirs[name]), (step, name)


def test_llm_int8_is_refused_by_name(base, tmp_path):
    """Its products on a CPU are int8 in eval mode and not in training, so that ratios are off 1 by
    1e-2; on a GPU outliers are looked for in all rows of a batch together."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="model: expected weights whose products .* LLM.int8"):
        adapted(
            tmp_path,
            base,
            model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        )


def test_weights_that_a_forward_has_repacked_are_refused(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from grpo_fast.models.quantized import quantization_config, settle_quantized

    packed = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization_config("nf4", torch.float32)
    )
    layer = next(m for m in packed.modules() if type(m).__name__ == "Linear4bit")
    layer.support_avx512bf16_for_cpu = True
    settle_quantized(packed, True)
    assert not layer.support_avx512bf16_for_cpu
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="model: expected 4-bit weights as they were loaded"):
        settle_quantized(packed, True)


def test_packed_weights_without_an_adapter_are_refused(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from grpo_fast.models.quantized import quantization_config

    packed = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization_config("nf4", torch.float32)
    )
    with pytest.raises(ValueError, match="model: expected an adapter over packed weights"):
        trainer(tmp_path, policy=packed)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"])
def test_8bit_optimizers_train_and_resume(optim, tmp_path):
    pytest.importorskip("torchao" if "torch" in optim else "bitsandbytes")
    options = {**SETTINGS, "optim": optim, "learning_rate": 1e-3}

    def build(folder, **more):
        return trainer(tmp_path / folder, policy=model(), **options, **more)

    whole = build("whole", save_strategy="steps", save_steps=1)
    whole.train()
    resumed = build("resumed")
    resumed.train(str(Path(whole.args.output_dir) / "checkpoint-2"))
    theirs = dict(resumed.model.named_parameters())
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, theirs[name]), name


def test_stochastic_rounding_moves_bf16_weights_and_resumes(tmp_path):
    pytest.importorskip("torchao")

    def build(folder, **more):
        options = {**SETTINGS, "learning_rate": 1e-6, "policy": model().to(torch.bfloat16)}
        return trainer(tmp_path / folder, **{**options, **more})

    def moved(run):
        start = dict(model().to(torch.bfloat16).named_parameters())
        named = run.model.named_parameters()
        return sum(int((weight != start[name]).sum()) for name, weight in named)

    rounded = build("nearest")
    rounded.train()
    whole = build("random", bf16_stochastic_rounding=True, save_strategy="steps", save_steps=1)
    whole.train()
    assert type(whole.optimizer.optimizer).__name__ == "_AdamW"
    # rounding to the nearest moves none but the smallest weights, 39 of 7,000 when this was written
    assert moved(whole) > 3 * moved(rounded)
    resumed = build("resumed", bf16_stochastic_rounding=True)
    resumed.train(str(Path(whole.args.output_dir) / "checkpoint-2"))
    theirs = dict(resumed.model.named_parameters())
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, theirs[name]), name
