"""A LoRA adapter on the lm_head itself: part of the fused product, or refused by name."""

import pytest
import torch
from tiny import lora, tiny

from grpo_fast.engine.logprob import linear_logprob
from grpo_fast.models.head import find_head
from grpo_fast.models.policy import attach


def test_an_adapter_on_the_head_is_part_of_it():
    """Log-probs and gradients of A, B and the hidden states are those of the model's own logits."""
    model = lora(tiny(), target_modules=["q_proj", "lm_head"]).double()
    attach(model)
    ids = torch.arange(12)[None] % 7
    positions = torch.arange(12)[None]
    grads = []
    for fused in (True, False):
        model.zero_grad()
        if fused:
            logp = model(
                input_ids=ids,
                position_ids=positions,
                head_fn=lambda h, head: linear_logprob(h, head, ids).logp,
            )
        else:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        (logp * torch.linspace(-1, 1, 12)).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("lm_head.lora_B" in n for n in grads[0]) and grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-12)
    assert find_head(model).lora is not None
    with model.disable_adapter():
        assert find_head(model).lora is None


@pytest.mark.parametrize(
    "options, reason",
    [({"lora_dropout": 0.1}, "has a dropout"), ({"use_dora": True}, "has more to it")],
)
def test_an_adapter_on_the_head_that_is_more_than_lora_is_refused(options, reason):
    model = lora(tiny(), target_modules=["q_proj", "lm_head"], **options)
    with pytest.raises(ValueError, match=rf"Linear on lm_head, which {reason}.*modules_to_save"):
        attach(model)
