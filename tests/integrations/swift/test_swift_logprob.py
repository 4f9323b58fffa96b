"""The functions that `patch_swift` replaces against swift's own on the same inputs, the refusals,
and swift's version."""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("swift", reason="needs ms-swift, which `make test-swift` lays over .venv")
from peft import LoraConfig, get_peft_model
from swift.rl_core.data import GRPOBatch
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.rlhf_trainers.utils import build_completion_mask_and_seq_lengths
from swift.utils import import_external_file
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_fast.integrations import swift as adapter
from grpo_fast.integrations.swift import patch_swift, unpatch_swift
from grpo_fast.models.head import find_head
from grpo_fast.models.policy import attach

TOLERANCE = 1e-5
SHAPE = {
    "vocab_size": 77,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
MODELS = {
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "Gemma-2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 3.0}),
    "Granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    "Cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
    "Phi": (PhiForCausalLM, PhiConfig, {}),
}
LAYOUTS = ("left", "right", "packed")


def model(name: str) -> torch.nn.Module:
    cls, config, more = MODELS[name]
    shape = {n: v for n, v in SHAPE.items() if name not in ("Cohere", "Phi") or n != "head_dim"}
    torch.manual_seed(0)
    out = cls(config(**{**shape, **more}, attn_implementation="sdpa")).train()
    for module in out.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if name == "Phi":
        torch.nn.init.normal_(out.lm_head.bias, std=2.0)
    return out


def trainer(padding_free: bool, temperature: float = 0.7) -> GRPOTrainer:
    """Swift's class with nothing but what its log-probs read."""
    one = object.__new__(GRPOTrainer)
    one.template = SimpleNamespace(padding_free=padding_free, sequence_parallel_size=1)
    one.temperature, one.model_kwarg_keys = temperature, {"use_cache", "logits_to_keep"}
    return one


def batch(layout: str) -> tuple[dict, GRPOBatch]:
    """Four sequences, one of them with a token in the middle that does not count."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prompt, completion in ((3, 8), (6, 2), (2, 5), (4, 1)):
        ids = torch.randint(2, 77, (prompt + completion,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append((ids, labels))
    rows[0][1][6] = -100
    position = [torch.arange(len(ids)) for ids, _ in rows]
    if layout == "packed":
        ids, labels = (torch.cat(parts)[None] for parts in zip(*rows, strict=True))
        inputs = {"input_ids": ids, "position_ids": torch.cat(position)[None]}
    else:
        given = {"batch_first": True, "padding_side": layout}
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([ids for ids, _ in rows], padding_value=0, **given)
        labels = pad([labels for _, labels in rows], padding_value=-100, **given)
        ones = [torch.ones_like(p) for p in position]
        inputs = {"input_ids": ids, "attention_mask": pad(ones, padding_value=0, **given)}
        inputs["position_ids"] = pad(position, padding_value=0, **given)
    keep = int((labels.shape[-1] - (labels != -100).int().argmax(-1)).max())
    mask, lengths, _ = build_completion_mask_and_seq_lengths(
        labels, 4, padding_free=layout == "packed", encoded_batch=inputs, logits_to_keep=keep
    )
    flags = torch.zeros(4, dtype=torch.bool)
    return inputs, GRPOBatch(mask, flags, seq_lengths=lengths, logits_to_keep=keep)


def measure(policy, layout: str, entropy: bool, temperature: float = 0.7):
    """Log-probs and entropies of the completion tokens, and the gradient of a random mixture."""
    inputs, grpo = batch(layout)
    one = trainer(layout == "packed", temperature)
    policy.zero_grad()
    both = one._get_per_token_logps_and_entropies_single(policy, inputs, grpo, entropy)
    assert both[0].shape == grpo.completion_mask.shape and (both[1] is not None) == entropy
    values = [each[grpo.completion_mask] for each in both if each is not None]
    generator = torch.Generator().manual_seed(2)
    total = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in values)
    total.backward()
    learned = [p for p in policy.parameters() if p.requires_grad]
    grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learned]
    return torch.stack(values), torch.cat(grads)


def distance(ours, theirs) -> float:
    gaps = [(a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(gaps).nan_to_num(nan=torch.inf).max().item()


@pytest.fixture(autouse=True)
def unpatched():
    yield
    for name, theirs in adapter._THEIRS.items():
        setattr(GRPOTrainer, name, theirs)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name, layout, entropy):
    policy = model(name)
    theirs = measure(policy, layout, entropy)
    with patch_swift():
        attach(policy)
        ours = measure(policy, layout, entropy)
    assert distance(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", ["Gemma-2", "Granite", "Cohere", "Phi"])
def test_heads_matter(name, monkeypatch):
    """What the test above would see of a head whose transform is forgotten."""
    policy = model(name)
    theirs = measure(policy, "packed", True)
    attach(policy)
    function = adapter.linear_logprob
    forgotten = {"softcap": None, "logit_scale": 1.0, "bias": None}
    monkeypatch.setattr(
        adapter,
        "linear_logprob",
        lambda rows, head, *a, **k: function(rows, replace(head, **forgotten), *a, **k),
    )
    with patch_swift():
        assert distance(measure(policy, "packed", True), theirs) > 1e-2


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "other"])
@pytest.mark.parametrize("layout", ["left", "packed"])
@pytest.mark.parametrize("head", ["frozen", "adapted", "saved"])
def test_peft(head, layout, checkpointing):
    options = {"adapted": {"target_modules": ["q_proj", "lm_head"]}, "saved": {}}
    options["saved"] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    config = LoraConfig(r=4, **options.get(head, {"target_modules": ["q_proj", "down_proj"]}))
    policy = get_peft_model(model("Qwen3"), config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    if checkpointing is not None:
        policy.enable_input_require_grads()
        policy.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    theirs = measure(policy, layout, True)
    with patch_swift():
        attach(policy)
        ours = measure(policy, layout, True)
        assert distance(ours, theirs) <= TOLERANCE
        with policy.disable_adapter(), torch.no_grad():
            inputs, grpo = batch(layout)
            off = trainer(layout == "packed")._get_per_token_logps_and_entropies_single
            base = off(policy, inputs, grpo)[0][grpo.completion_mask]
    assert (base - ours[0][0]).abs().max() > 1e-2


def test_bf16_is_nearer_to_float64_than_swift():
    policy = model("Qwen3").bfloat16()
    exact = measure(copy.deepcopy(policy).double(), "packed", True)
    theirs = measure(policy, "packed", True)
    with patch_swift():
        attach(policy)
        ours = measure(policy, "packed", True)
    assert ours[0].dtype == torch.float32
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        error = [distance([each.double()], [truth]) for each in (mine, other)]
        assert error[0] <= error[1] <= 0.1, error


def build(policy=None, **given):
    """As far as the refusals, which come before swift's own constructor."""
    policy = model("Qwen3") if policy is None else policy
    policy.model_meta = SimpleNamespace(is_multimodal=given.get("multimodal", False))
    template = SimpleNamespace(sequence_parallel_size=given.get("sp", 1))
    args = SimpleNamespace(use_liger_kernel=given.get("liger", False))
    GRPOTrainer(policy, args=args, template=template)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"sp": 2}, r"patch_swift cannot honour sequence_parallel_size > 1\."),
        ({"multimodal": True}, r"patch_swift cannot honour a multimodal model\."),
        ({"sp": 2, "multimodal": True}, r"sequence_parallel_size > 1, nor a multimodal model\."),
    ],
)
def test_refusals(given, message):
    patch_swift()
    with pytest.raises(ValueError, match=message):
        build(**given)


@pytest.mark.parametrize("name", ["Gemma-2", "Granite"])
def test_liger_with_a_transform_is_refused(name):
    patch_swift()
    with pytest.raises(ValueError, match="use_liger_kernel with a soft cap, a logit scale or a"):
        build(model(name), liger=True)


def test_liger_with_an_adapted_head_is_refused():
    patch_swift()
    policy = get_peft_model(model("Qwen3"), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="use_liger_kernel with .* a LoRA adapter of lm_head"):
        build(policy, liger=True)


def test_unknown_heads_are_refused():
    patch_swift()
    policy = model("Qwen3")
    forward = policy.lm_head.forward
    policy.lm_head.forward = lambda hidden: forward(hidden).sin()
    with pytest.raises(ValueError, match="its head does something unknown"):
        build(policy)
    policy = model("Qwen3")
    policy.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        build(policy)
    policy = model("Qwen3")
    policy.lm_head.weight.ds_id = 3
    with pytest.raises(ValueError, match="one that ZeRO-3 partitions"):
        build(policy)


def test_temperature_0_is_refused():
    patch_swift()
    policy = model("Qwen3")
    attach(policy)
    with pytest.raises(ValueError, match="temperature"):
        measure(policy, "left", False, temperature=0.0)


def test_trainer_of_before_is_refused():
    patch_swift()
    with pytest.raises(ValueError, match="call patch_swift before the trainer is built"):
        measure(model("Qwen3"), "left", False)


def test_logits_are_never_computed(monkeypatch):
    policy = model("Qwen3")
    with patch_swift():
        attach(policy)
        assert find_head(policy).weight is policy.lm_head.weight
        monkeypatch.setattr(policy.lm_head, "forward", None)
        measure(policy, "packed", True)


def names() -> dict:
    return {name: vars(GRPOTrainer)[name] for name in adapter._NAMES}


def test_reversible_and_idempotent():
    assert names() == adapter._THEIRS
    with patch_swift():
        assert names() == adapter._OURS
        with patch_swift():
            pass
        # the inner one was not the first
        assert names() == adapter._OURS
    assert names() == adapter._THEIRS
    patch_swift()
    patch_swift()
    unpatch_swift()
    unpatch_swift()
    assert names() == adapter._THEIRS


def test_does_not_undo_somebody_else():
    patch_swift()
    GRPOTrainer._get_logps_via_local_forward = other = lambda self: None
    with pytest.raises(ValueError, match="_get_logps_via_local_forward has been replaced since"):
        unpatch_swift()
    assert GRPOTrainer._get_logps_via_local_forward is other


def test_the_plugin_hides_no_package(monkeypatch):
    """swift puts the folder of a plug-in first on sys.path, and the file has to install."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    plugin = Path(adapter.__file__).parent / "swift_plugin" / "grpo_fast_plugin.py"
    module = import_external_file(str(plugin))
    monkeypatch.delitem(sys.modules, module.__name__)
    assert sys.path[0] == str(plugin.parent) and names() == adapter._OURS
    beside = {path.stem for path in plugin.parent.glob("*.py")}
    assert beside == {"__init__", "__main__", "grpo_fast_plugin"}


def again(patch: pytest.MonkeyPatch):
    """Import the module anew; the one that others hold stays."""
    patch.delitem(sys.modules, "grpo_fast.integrations.swift")
    return importlib.import_module("grpo_fast.integrations.swift")


def test_without_swift(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "swift"]:
        monkeypatch.setitem(sys.modules, name, None)
    message = r"works with ms-swift 4\.6\.0 \(pip install ms-swift==4\.6\.0\)"
    with pytest.raises(ImportError, match=message):
        again(monkeypatch)


def test_with_another_swift(monkeypatch):
    import swift

    monkeypatch.setattr(swift, "__version__", "4.7.0")
    with pytest.warns(UserWarning, match=r"ms-swift 4\.6\.0; 4\.7\.0 is installed and untested"):
        again(monkeypatch)


@pytest.mark.parametrize("name", adapter._NAMES[1:])
def test_with_a_swift_without_the_function(monkeypatch, name):
    monkeypatch.delattr(GRPOTrainer, name)
    with pytest.raises(ImportError, match=r"works with ms-swift 4\.6\.0.*" + name):
        again(monkeypatch)
