"""The memory of a step: against counted bytes, by hand, and against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from plan_cases import QWEN3_8B, QWEN3_8B_PARAMETERS, kept_by_formula, written

from benchmarks.plan_memory import BASE, CASES, PAGE, RESULT, architecture, table
from grpo_fast.cli.measure import measure
from grpo_fast.cli.step import totals
from grpo_fast.plan.architecture import VERIFIED, of_config, read
from grpo_fast.plan.devices import GIB, devices
from grpo_fast.plan.setup import Setup
from grpo_fast.plan.step import estimate, summary
from grpo_fast.plan.trace import costs

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def config(family, **changes):
    own = {"head_dim": 16} if family in ("Qwen3", "Gemma3Text") else {}
    return getattr(transformers, f"{family}Config")(**{**SHAPE, **own, **changes})


@pytest.fixture(scope="module")
def qwen3_8b():
    return of_config(transformers.Qwen3Config(**QWEN3_8B), "Qwen3-8B")


def saved(model, tokens):
    """Bytes that backward of a real forward needs, parameters apart."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage, storage.nbytes())
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(size for _, size in seen.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", VERIFIED)
def test_a_layer_keeps_what_the_formula_says(family, dtype):
    for shape in ({}, {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6}):
        of = config(FAMILIES[family], **shape)
        assert costs(of_config(of), dtype=dtype).layer.slope == kept_by_formula(of, dtype)
        assert costs(of_config(of), dtype=dtype).layer.fixed == 0


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_layer_keeps_what_a_real_forward_does(dtype, rank):
    """Of the counted model and of a real one, sdpa on the CPU: the same bytes."""
    peft = pytest.importorskip("peft")
    real = []
    for layers in (2, 3):
        of = config("Qwen3", num_hidden_layers=layers)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        model = transformers.AutoModelForCausalLM.from_config(of, dtype=kind)
        if rank:
            adapter = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            peft.get_peft_model(model, adapter)
        real.append(saved(model.get_decoder().train(), 256))
    counted = costs(of_config(config("Qwen3")), dtype=dtype, rank=rank).layer.at(256)
    assert counted == pytest.approx(real[1] - real[0], rel=0.002)


def test_a_family_without_a_formula_is_counted_too():
    of = of_config(config("Gemma3Text"))
    assert not of.verified
    model = transformers.AutoModelForCausalLM.from_config(config("Gemma3Text"))
    more = transformers.AutoModelForCausalLM.from_config(config("Gemma3Text", num_hidden_layers=4))
    real = saved(more.model.train(), 256) - saved(model.model.train(), 256)
    assert costs(of).layer.at(256) == pytest.approx(real, rel=0.05)


def test_checkpointing_keeps_the_inputs_of_layers():
    of = of_config(config("Qwen3"))
    assert costs(of, checkpointing=True).layer.slope == 4 * of.H
    assert costs(of, dtype="bf16", checkpointing=True).layer.slope == 2 * of.H
    # a layer runs again within the transient
    again = costs(of, checkpointing=True).transient(20000) - costs(of).transient(20000)
    assert again == pytest.approx(costs(of).layer.at(20000), rel=0.1)


def test_a_tile_lowers_the_layer_that_runs_again():
    of = of_config(config("Llama", intermediate_size=512))
    whole, tiled = (costs(of, checkpointing=True, tile=t).transient(16384) for t in (None, 512))
    assert 0.5 * 16 * of.intermediate * 16384 < whole - tiled < 24 * of.intermediate * 16384


def test_weights_by_hand(qwen3_8b):
    assert qwen3_8b.counts.total == QWEN3_8B_PARAMETERS
    assert qwen3_8b.counts.head == qwen3_8b.counts.embeddings == 151936 * 4096
    assert qwen3_8b.counts.linear == 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    # r (in + out) of each product
    per_rank = 36 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    assert qwen3_8b.counts.adapter == per_rank
    setup = Setup(method="qlora", weights="bf16", autocast=True, rank=16, checkpointing=True)
    weights = estimate(qwen3_8b, setup).phases["scoring"]["weights"]
    by_hand = 0.516 * 36 * 192937984 + 2 * (QWEN3_8B_PARAMETERS - 36 * 192937984)
    assert weights == pytest.approx(by_hand + 4 * 16 * per_rank, rel=0.001)


def test_terms_by_hand(qwen3_8b):
    setup = Setup(
        method="lora", weights="bf16", autocast=True, checkpointing=True, prompt=96,
        completion=4000, batch=1, accumulation=64, workspace_bytes=1 << 30,
    )  # fmt: skip
    plan = estimate(qwen3_8b, setup)
    # 64 sequences of 4,096 tokens, and one layer of them twice
    cache = 2 * 1024 * 36 * 2 * 64 * 4096
    assert plan.phases["sampling"]["KV cache"] == cache + cache // 36
    assert plan.phases["sampling"]["optimizer"] == 8 * 16 * qwen3_8b.counts.adapter
    assert plan.phases["backward begins"]["gradients"] == 4 * 16 * qwen3_8b.counts.adapter
    full = replace(setup, method="full", weights="fp32", ranks=8, sharding="fsdp2")
    shards = estimate(qwen3_8b, full).phases["backward begins"]
    assert shards["weights"] == 4 * QWEN3_8B_PARAMETERS // 8
    assert shards["optimizer"] == QWEN3_8B_PARAMETERS
    masks = estimate(qwen3_8b, replace(setup, masks=True)).phases["scoring"]["masks"]
    assert masks == 4095 * 4095 * 3


@pytest.mark.parametrize(
    "change, term, phase",
    [
        ({"beta": 0.1}, "reference", "scoring"),
        ({"critic": "separate"}, "critic", "sampling"),
        ({"ranks": 2}, "gradients", "sampling"),
        ({"ranks": 2, "sharding": "fsdp2"}, "gathered", "sampling"),
        ({"autocast": True}, "copies", "sampling"),
        ({"masks": True}, "masks", "backward begins"),
        ({"completion": 1024}, "KV cache", "sampling"),
        ({"workspace_bytes": 1 << 30}, "head", "backward begins"),
    ],
)
def test_what_needs_more(change, term, phase):
    of, base = architecture(), Setup(**BASE)
    before, after = estimate(of, base), estimate(of, replace(base, **change))
    assert after.phases[phase].get(term, 0) > before.phases[phase].get(term, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpointing": True},
        {"method": "lora"},
        {"method": "qlora"},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "sgd"},
        {"completion": 64},
        {"batch": 1, "accumulation": 8},
    ],
)
def test_what_needs_less(change):
    of, base = architecture(), Setup(**BASE)
    assert estimate(of, replace(base, **change)).total < estimate(of, base).total


def test_offload_and_tiles_need_less_than_checkpointing(qwen3_8b):
    base = Setup(
        method="lora", weights="bf16", autocast=True, checkpointing=True, completion=32000,
        accumulation=1, generations=1,
    )  # fmt: skip
    whole, offloaded, tiled = (
        estimate(qwen3_8b, replace(base, **change)).totals()["backward begins"]
        for change in ({}, {"offload": True}, {"tile": 2048})
    )
    # 34 of 36 checkpoints go
    assert whole - offloaded == pytest.approx(34 * 2 * 4096 * base.tokens, rel=0.02)
    assert tiled < 0.9 * whole


@pytest.mark.parametrize("case", json.loads(RESULT.read_text())["cases"])
def test_within_ten_percent_of_what_was_measured(case):
    """Peak resident memory above the interpreter, of `python -m benchmarks.plan_memory --write`."""
    measured = json.loads(RESULT.read_text())["cases"][case]["measured"]["step"]
    planned = totals(estimate(architecture(), Setup(**{**BASE, **CASES[case]})))["step"]
    assert planned == pytest.approx(measured, rel=0.1)


def test_the_page_has_the_figures():
    assert table(json.loads(RESULT.read_text())["cases"]) in PAGE.read_text()


@pytest.mark.slow
def test_within_ten_percent_of_what_is_measured_here():
    setup = Setup(**{**BASE, "method": "lora", "checkpointing": True})
    measured = measure(architecture(), setup, timeout=500)
    planned = totals(estimate(architecture(), setup))
    assert planned["step"] == pytest.approx(measured["step"], rel=0.1)
    assert set(measured) >= {"sampling", "training", "step"}


def test_fsdp2_keeps_no_copies_of_weights(qwen3_8b):
    sharded = Setup(autocast=True, ranks=8, sharding="fsdp2", batch=1, accumulation=1)
    phases = estimate(qwen3_8b, sharded).phases
    assert all(not terms.get("copies") for terms in phases.values())
    whole = estimate(qwen3_8b, replace(sharded, ranks=1, sharding="none")).phases
    kept = [p["backward begins"]["activations"] for p in (whole, phases)]
    # 2 bytes of each linear weight of 36 layers
    assert kept[0] - kept[1] == pytest.approx(2 * qwen3_8b.counts.linear, rel=0.02)


def test_summary(qwen3_8b):
    setup = Setup(method="lora", weights="bf16", autocast=True, checkpointing=True)
    plan = estimate(qwen3_8b, setup)
    text = summary(plan, devices("H100-80"))
    assert f"{plan.total / GIB:.1f} GiB of 74.0 GiB usable" in text and plan.phase in text
    assert "weights 15.4" in text and "not measured" in text


def test_reads_a_folder_a_file_and_says_what_is_wrong(tmp_path):
    folder = written(tmp_path / "model", QWEN3_8B)
    assert read(folder).counts == read(f"{folder}/config.json").counts
    unknown = written(tmp_path / "unknown", {**QWEN3_8B, "model_type": "nobody_knows"})
    encoder = written(tmp_path / "t5", {"model_type": "t5", "architectures": ["T5Model"]})
    (tmp_path / "empty").mkdir()
    for path, sentence in (
        (unknown, "MODEL: expected a folder or hub name with a config.json of a family"),
        (encoder, "MODEL: expected a decoder-only model, got t5"),
        (str(tmp_path / "empty"), "MODEL: expected a folder with a config.json"),
        (str(tmp_path / "no.json"), "MODEL: expected a config.json"),
        (str(tmp_path / "nowhere"), "MODEL: expected a folder or hub name"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read(path)


def test_a_family_that_cannot_be_counted_is_refused():
    of = of_config(
        transformers.MixtralConfig(**{**SHAPE, "num_local_experts": 4}, max_position_embeddings=64)
    )
    with pytest.raises(ValueError, match="MODEL: expected a family whose layers can be counted"):
        costs(of)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"method": "dora"}, "method: expected one of full, lora, qlora"),
        ({"batch": 0}, "batch: expected an integer >= 1, got 0"),
        ({"offload": True}, "offload: expected False without checkpointing"),
        ({"method": "qlora", "sharding": "fsdp2"}, "sharding: expected 'none' with qlora"),
        ({"beta": -1.0}, "beta: expected a number >= 0"),
    ],
)
def test_setup_refuses(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Setup(**change)
