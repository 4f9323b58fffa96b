"""The head behind verl's use_fused_kernels against the model's own logits in float64."""

from __future__ import annotations

import copy
import importlib
import types

import pytest
import torch

pytest.importorskip("verl", reason="needs verl, which `make test-verl` lays over the environment")
from peft import LoraConfig, get_peft_model
from tensordict import TensorDict
from tiny_verl import FAMILIES, PROMPTS, RESPONSES, actor, batch, model, nested
from verl.models.transformers import dense_common, monkey_patch
from verl.utils import tensordict_utils
from verl.utils import torch_functional as verl_functional
from verl.utils.experimental import torch_functional
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss

from grpo_fast.integrations.verl import head as verl_head
from grpo_fast.integrations.verl import patch as adapter

TOLERANCE = 1e-5
TEMPERATURE = 0.7
kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")


@pytest.fixture(autouse=True)
def classes_as_they_were():
    """verl replaces the forward of a class for good."""
    import transformers

    kinds = [getattr(transformers, f"{name}ForCausalLM") for name in (*FAMILIES, "Mixtral")]
    before = {kind: kind.forward for kind in kinds}
    yield
    for kind, forward in before.items():
        kind.forward = forward
    adapter._BEFORE.clear()
    adapter.patch_verl()


def fuse(made, backend: str = "torch") -> None:
    monkey_patch.apply_monkey_patch(
        made, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend
    )


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def upstream(shape) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


def exact(made, ids, labels, dtype=torch.float64, **inputs) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies and the gradients of every parameter, from logits."""
    double = copy.deepcopy(made).to(dtype)
    log_p = (double(input_ids=ids, **inputs).logits / TEMPERATURE).log_softmax(-1)
    logp = log_p.gather(-1, labels[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    a, b = upstream(ids.shape)
    ((logp * a).sum() + (entropy * b).sum()).backward()
    return logp, entropy, {name: p.grad for name, p in double.named_parameters()}


def check(made, ids, labels, want, plain=None, **inputs) -> None:
    """plain: the same from logits in fp32, whose own error in the layers is allowed 1.5 times."""
    out = made(input_ids=ids, temperature=TEMPERATURE, return_dict=True, **inputs)
    a, b = upstream(ids.shape)
    ((out.log_probs * a).sum() + (out.entropy * b).sum()).backward()
    assert (out.log_probs - want[0]).abs().max() < TOLERANCE
    assert (out.entropy - want[1]).abs().max() < TOLERANCE
    for name, p in made.named_parameters():
        theirs = 0.0 if plain is None else distance(plain[2][name], want[2][name])
        assert distance(p.grad, want[2][name]) < max(TOLERANCE, 1.5 * theirs), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded(family, backend):
    made = model(family)
    ids = torch.randint(97, (3, 8))
    mask = torch.arange(8) < torch.tensor([8, 5, 7])[:, None]
    labels = ids.roll(-1, -1)
    inputs = {"attention_mask": mask.long(), "position_ids": torch.arange(8).expand(3, 8)}
    want, plain = (exact(made, ids, labels, d, **inputs) for d in (torch.float64, torch.float32))
    fuse(made, backend)
    check(made, ids, labels, want, plain, **inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed(family):
    """Labels come from the engine, which has rolled the whole row before it was cut."""
    made = model(family)
    ids, labels = torch.randint(97, (1, 11)), torch.randint(97, (1, 11))
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    want = exact(made, ids, labels, position_ids=positions, use_cache=False)
    fuse(made)
    check(made, ids, labels, want, position_ids=positions, use_cache=False, shift_labels=labels)


@pytest.mark.parametrize("family, off", [("Gemma2", 1.0), ("Granite", 1.0), ("Qwen3", 0.0)])
def test_where_the_head_of_verl_is_wrong(family, off):
    """Its own leaves out the soft cap and the scale: that is what ours is for."""
    made = model(family)
    ids = torch.randint(97, (2, 9))
    want = exact(made, ids, ids.roll(-1, -1))[0]
    adapter.unpatch_verl()
    fuse(made)
    theirs = made(input_ids=ids, temperature=TEMPERATURE, return_dict=True).log_probs
    error = (theirs - want).abs().max().item()
    assert error > off if off else error < TOLERANCE


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_lora(targets):
    made = model("Gemma2", tie_word_embeddings=False)
    peft = get_peft_model(made, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    ids = torch.randint(97, (2, 9))
    want = exact(peft, ids, ids.roll(-1, -1))
    fuse(peft.get_base_model())
    out = peft(input_ids=ids, temperature=TEMPERATURE, return_dict=True)
    a, b = upstream(ids.shape)
    ((out.log_probs * a).sum() + (out.entropy * b).sum()).backward()
    assert (out.log_probs - want[0]).abs().max() < TOLERANCE
    trained = [(name, p) for name, p in peft.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * (2 + (len(targets) > 1))
    for name, p in trained:
        assert distance(p.grad, want[2][name]) < TOLERANCE, name


@pytest.mark.parametrize("shape", [(13,), (2, 6)])
def test_the_two_functions(shape):
    """Which verl's vision-language forwards call."""
    hidden = torch.randn(*shape, 24, requires_grad=True)
    weight = torch.randn(77, 24, requires_grad=True)
    ids = torch.randint(77, shape)
    a, b = upstream(shape)
    results = []
    for call in (
        verl_head.FusedLinearForPPO(chunk_size=4, impl_backend="liger"),
        kernel.linear_cross_entropy,
        adapter._THEIRS[torch_functional.__name__, "FusedLinearForPPO"](chunk_size=4),
    ):
        logp, entropy = call(hidden, weight, ids, TEMPERATURE)
        assert logp.shape == entropy.shape == torch.Size(shape)
        grads = torch.autograd.grad((logp * a).sum() + (entropy * b).sum(), (hidden, weight))
        results.append((logp, entropy, *grads))
    for got in results[:2]:
        for mine, theirs in zip(got, results[2], strict=True):
            assert distance(mine.detach(), theirs.detach().double()) < TOLERANCE
    assert torch_functional.FusedLinearForPPO is verl_head.FusedLinearForPPO


def test_shapes_of_megatron_are_flat():
    """Hidden states (S, 1, H) with labels (1, S), as verl's own function returns them."""
    hidden, weight = torch.randn(7, 1, 24), torch.randn(77, 24)
    labels = torch.randint(77, (1, 7))
    logp, entropy = kernel.linear_cross_entropy(hidden, weight, labels, TEMPERATURE)
    assert logp.shape == entropy.shape == (7,)
    want = (hidden[:, 0] @ weight.T / TEMPERATURE).log_softmax(-1).gather(-1, labels.T)[:, 0]
    torch.testing.assert_close(logp, want)


def engine(made) -> types.SimpleNamespace:
    """What the methods of verl's FSDP engine need of it; the engine itself wants a GPU."""
    config = types.SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False
    )
    return types.SimpleNamespace(
        module=made,
        pad_to_length=False,
        use_ulysses_sp=False,
        engine_config=config,
        compute_entropy_from_logits=verl_functional.entropy_from_logits,
        _get_packed_pad_size=lambda length: 0,
        _gather_and_unpad_packed=lambda tensor, pad: tensor[:-pad] if pad else tensor,
    )


def engine_step(made, data: TensorDict, config, **flags) -> tuple[torch.Tensor, dict, dict]:
    data = data.clone()
    window = {"dp_size": 1, "batch_num_tokens": 30, "global_batch_size": 5}
    for name, value in {**window, **flags, "temperature": TEMPERATURE}.items():
        tensordict_utils.assign_non_tensor_data(data, name, value)
    inputs, more = FSDPEngineWithLMHead.prepare_model_inputs(engine(made), data)
    raw = made(**inputs, use_cache=False)
    output = FSDPEngineWithLMHead.prepare_model_outputs(engine(made), raw, more, data, None)
    loss, metrics = ppo_loss(config, output, data)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in made.named_parameters()}, metrics


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Granite"])
def test_through_the_engine(family, packed):
    """Inputs and outputs by verl's FSDP engine, its loss, and backward: fused head and our loss
    against logits and vanilla."""
    made = model(family)
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    case = batch(token_advantages=True)
    case.data["input_ids"] = nested([torch.randint(97, (n,)) for n in lengths])
    case.data["position_ids"] = nested([torch.arange(n) for n in lengths])
    # near what the model says, so that ratios lie on both sides of their bounds
    row = case.data["input_ids"].to_padded_tensor(0)
    with torch.no_grad():
        log_p = (made(input_ids=row).logits / TEMPERATURE).log_softmax(-1)
    logp = log_p[:, :-1].gather(-1, row[:, 1:, None])[..., 0]
    old = [
        logp[i, p - 1 : p + r - 1] + 0.3 * torch.randn(r)
        for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
    ]
    case.data["old_log_probs"] = nested(old)
    flags = {"use_remove_padding": packed, "calculate_entropy": True}
    options = {"entropy_coeff": 0.02, "clip_ratio_high": 0.28}
    stock, fused = made, copy.deepcopy(made)
    want = engine_step(stock, case.data, actor("vanilla", **options), **flags)
    fuse(fused)
    flags["use_fused_kernels"] = True
    got = engine_step(fused, case.data, actor("fast_dapo", **options), **flags)
    assert 0 < want[2]["actor/pg_clipfrac"].aggregate() < 1
    assert abs(got[0] - want[0]) < TOLERANCE * max(abs(want[0].item()), 0.1)
    for name, grad in want[1].items():
        assert distance(got[1][name], grad.double()) < 2 * TOLERANCE, name


def test_an_unknown_head_is_refused():
    made = model("Qwen3")
    made.lm_head.register_forward_hook(lambda module, args, out: out.clamp(-3.0, 3.0))
    stock = type(made).forward
    with pytest.raises(ValueError, match="its head does something unknown"):
        fuse(made)
    assert type(made).forward is stock


def test_a_second_model_of_the_class_is_checked_too():
    fuse(model("Gemma2"))
    made = model("Gemma2")
    made.lm_head.register_forward_hook(lambda module, args, out: 2.0 * out)
    with pytest.raises(ValueError, match="its head does something unknown"):
        fuse(made)


def test_a_subclass_of_a_fused_class():
    base = model("Qwen3")
    ids = torch.randint(97, (2, 5))
    want = exact(base, ids, ids.roll(-1, -1))
    fuse(base)

    class Mine(type(base)):
        pass

    made = Mine(base.config)
    made.load_state_dict(base.state_dict())
    fuse(made)
    check(made, ids, ids.roll(-1, -1), want)


def test_a_class_that_verl_has_fused_before_is_refused():
    adapter.unpatch_verl()
    fuse(model("Qwen3"))
    adapter.patch_verl()
    with pytest.raises(ValueError, match="verl has replaced the forward of Qwen3ForCausalLM alr"):
        fuse(model("Qwen3"))


def test_a_model_without_fused_kernels_is_not_checked():
    fuse(model("Qwen3"))
    made = model("Qwen3")
    made.lm_head.register_forward_hook(lambda module, args, out: 2.0 * out)
    monkey_patch.apply_monkey_patch(made, use_remove_padding=False, use_fused_kernels=False)


def test_a_vision_language_model_outside_the_list_of_verl():
    import transformers

    text = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    made = transformers.Gemma3ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 97, (2, 5))
    want = (made(input_ids=ids).logits / TEMPERATURE).log_softmax(-1)
    before = type(made).forward
    try:
        fuse(made)
        got = made(input_ids=ids, temperature=TEMPERATURE, return_dict=True).log_probs
    finally:
        type(made).forward = before
    want = want.gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
    assert (got - want).abs().max() < TOLERANCE


def test_the_check_runs_no_layer():
    """flash-attn has no kernel for the CPU, where the model is built."""
    made = model("Gemma2")

    def layer(*args, **kwargs):
        raise RuntimeError("a layer ran")

    made.model.forward = layer
    fuse(made)
    assert made.model.forward is layer


def test_weights_that_are_not_there_yet_are_not_checked():
    with torch.device("meta"):
        made = model("Qwen3")
    fuse(made)
    assert type(made).forward is verl_head.fused_forward


def test_a_mixture_of_experts():
    made = model_of_experts(output_router_logits=False)
    ids = torch.randint(97, (2, 5))
    # the experts have no product in float64
    want = exact(made, ids, ids.roll(-1, -1), torch.float32)
    fuse(made)
    check(made, ids, ids.roll(-1, -1), want)
    with pytest.raises(ValueError, match="expected output_router_logits=False, got True"):
        fuse(model_of_experts(output_router_logits=True))


def model_of_experts(**options):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=0.5, **options))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"return_dict": False}, "return_dict: expected True"),
        ({"logits_to_keep": 1}, "logits_to_keep: expected 0, since there are no logits"),
        ({"input_ids": None}, "shift_labels: expected shift_labels, labels or input_ids"),
        ({"temperature": 0.0}, "temperature"),
        ({"shift_labels": torch.full((1, 4), 97)}, "input_ids: "),
    ],
)
def test_wrong_calls(inputs, words):
    made = model("Qwen3")
    fuse(made)
    given = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "return_dict": True}
    with pytest.raises(ValueError, match=words):
        made(**{**given, **inputs})


def test_both_ways():
    stock = dict(adapter._THEIRS)
    with adapter.patch_verl():
        assert dense_common.forward_with_torch_backend is verl_head.fused_forward
        assert monkey_patch.patch_forward_with_backends is adapter._patch_forward_with_backends
    for (module, name), theirs in stock.items():
        assert getattr(importlib.import_module(module), name) is theirs
    torch_functional.FusedLinearForPPO = torch.nn.Linear
    try:
        with pytest.raises(ValueError, match="FusedLinearForPPO of verl has been replaced"):
            adapter.unpatch_verl()
    finally:
        torch_functional.FusedLinearForPPO = stock[torch_functional.__name__, "FusedLinearForPPO"]
