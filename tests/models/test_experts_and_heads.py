"""The router loss of experts beside a fused head, and a head in float32 under a half model."""

import copy

import pytest
import torch
from tiny_trainer import model, tokenizer, trainer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from grpo_fast.models.head_precision import cast_head_to_fp32
from grpo_fast.models.packing import pack
from grpo_fast.models.policy import attach
from grpo_fast.models.router import router_coefficient, router_loss_of


def experts(**more):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
        **more,
    )
    return Qwen3MoeForCausalLM(config)


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
COMPLETIONS = [[3, 4, 5, 6, 7], [9, 9], [14, 3, 2]]


def test_the_router_loss_is_the_models_own():
    """Packed rows with padding at their end, against the model's padded forward."""
    policy = experts()
    attach(policy)
    packed = pack(PROMPTS, COMPLETIONS, pad_id=0, row_length=12, device="cpu", multiple=8)
    assert packed.input_ids.numel() > sum(map(len, PROMPTS + COMPLETIONS))
    router_fn = router_loss_of(policy, packed)
    _, loss = policy(**packed.inputs(), head_fn=lambda h, head: h.sum(), router_fn=router_fn)
    fed = [p + c[:-1] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    width = max(map(len, fed))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in fed])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in fed])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = policy(
        input_ids=ids, attention_mask=mask, position_ids=positions, output_router_logits=True
    )
    torch.testing.assert_close(loss, out.aux_loss, rtol=1e-5, atol=1e-6)
    gate = policy.model.layers[0].mlp.gate.weight
    ours = torch.autograd.grad(loss, gate)[0]
    torch.testing.assert_close(
        ours, torch.autograd.grad(out.aux_loss, gate)[0], rtol=1e-4, atol=1e-7
    )


def test_the_coefficient_is_the_configs_unless_given():
    assert router_coefficient(experts(router_aux_loss_coef=0.25), None) == 0.25
    assert router_coefficient(experts(), 0.5) == 0.5
    assert router_coefficient(experts(), 0) == 0.0
    assert router_coefficient(model(), None) == 0.0
    with pytest.raises(ValueError, match="^router_aux_loss_coef: expected None or 0"):
        router_coefficient(model(), 0.1)


def test_a_run_has_the_router_loss_in_its_gradient(tmp_path):
    gates = []
    for coef in (0.0, 10.0):
        options = {"max_steps": 1, "router_aux_loss_coef": coef, "learning_rate": 0.0}
        # every reward alike: all that is left is the router loss
        run = trainer(
            tmp_path / str(coef),
            experts(),
            reward=lambda completions, **_: [0.0] * len(completions),
            processing_class=tokenizer(),
            **options,
        )
        run.train()
        logs = run.state.log_history[0]
        assert ("aux_loss" in logs) == (coef > 0)
        gates.append(logs["grad_norm"])
        if coef:
            assert logs["loss"] == pytest.approx(coef * logs["aux_loss"], rel=1e-4)
    assert gates[0] == 0.0
    assert gates[1] > 0.0


@pytest.mark.parametrize("tied", (False, True))
def test_a_float32_head_under_a_bfloat16_model(tied):
    policy = model(tie_word_embeddings=tied).to(torch.bfloat16)
    before = copy.deepcopy(policy)
    cast_head_to_fp32(policy)
    assert policy.lm_head.weight.dtype == torch.float32
    assert policy.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert (policy.lm_head.weight is policy.model.embed_tokens.weight) == tied
    ids = torch.tensor([[3, 4, 5, 6]])
    hidden = before.model(ids).last_hidden_state
    expected = hidden.float() @ before.lm_head.weight.float().T
    torch.testing.assert_close(policy(ids).logits, expected, rtol=1e-6, atol=1e-6)
    attach(policy)
    seen = policy(ids, head_fn=lambda h, head: (h.dtype, head.weight.dtype))
    assert seen == (torch.float32, torch.float32)
    # a reference is a copy of it
    again = copy.deepcopy(policy)
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_a_run_with_a_float32_head(tmp_path):
    policy = model().to(torch.bfloat16)
    run = trainer(tmp_path, policy, cast_lm_head_to_fp32=True, max_steps=1, beta=0.1)
    run.train()
    assert policy.lm_head.weight.dtype == torch.float32
    assert run.state.log_history[0]["kl"] == 0.0
