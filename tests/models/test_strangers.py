"""Models that a user brings: decoders that are called past their base model, heads without a plain
weight, weights that are NaN, rotary positions that know their neighbours."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from tiny_trainer import config, dataset, model, trainer
from torch import nn

from grpo_fast.models.packing import check_packing, completion_logprobs, pack
from grpo_fast.models.policy import attach
from grpo_fast.models.rope import shared_limit
from grpo_fast.trainer.setup import prompt_room

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def opt():
    shape = {"hidden_size": 32, "word_embed_proj_dim": 24, "ffn_dim": 48, "num_hidden_layers": 1}
    shape |= {"vocab_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
    return tf.OPTForCausalLM(tf.OPTConfig(**shape))


def bart():
    shape = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    shape |= {"vocab_size": 64, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    return tf.BartForCausalLM(tf.BartConfig(**shape))


@pytest.mark.parametrize("family", [opt, bart])
def test_a_decoder_that_is_called_past_its_base_model(family):
    torch.manual_seed(0)
    lm, ids = family().eval(), torch.arange(5)[None]
    want = lm(input_ids=ids).logits
    attach(lm)
    hidden, weight = lm(input_ids=ids, head_fn=lambda h, head: (h, head.weight))
    torch.testing.assert_close(hidden @ weight.T, want, rtol=0, atol=1e-5)


class Packed(nn.Module):
    """As the layers of GPTQ, AWQ or HQQ: no weight."""

    qweight = torch.randint(0, 15, (64, 32), dtype=torch.uint8)

    def forward(self, x):
        return x @ self.qweight.to(x).T


HEADS = {
    "dynamic int8": lambda: torch.ao.nn.quantized.dynamic.Linear(32, 64),
    "packed": Packed,
    "two layers": lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64)),
    "offloaded": None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HEADS)
def test_a_head_without_a_plain_weight_is_refused(name):
    lm = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).eval()
    if HEADS[name] is None:
        cpu_offload(lm, execution_device=torch.device("cpu"))
    else:
        lm.lm_head = HEADS[name]()
    with pytest.raises(ValueError, match="model: expected an .*lm_head .* lm_head"):
        attach(lm)


def test_weights_that_are_nan_are_named(tmp_path):
    policy = model()
    policy.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="got NaN in model.layers.0.mlp.up_proj.weight"):
        trainer(tmp_path, policy=policy)


def test_images_are_not_ignored(tmp_path):
    rows = [{**row, "image": b"a png"} for row in dataset()]
    with pytest.raises(ValueError, match="train_dataset: expected text alone, .* got 'image'"):
        trainer(tmp_path, train_dataset=rows)
    assert not (tmp_path / "metrics.jsonl").exists()


def longrope():
    scale = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}
    scale |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "partial_rotary_factor": 1.0}
    scale |= {"original_max_position_embeddings": 48}
    shape = {**SMALL, "max_position_embeddings": 512, "original_max_position_embeddings": 48}
    return tf.Phi3ForCausalLM(tf.Phi3Config(**shape, rope_parameters=scale))


def dynamic():
    scale = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    shape = {**SMALL, "max_position_embeddings": 48}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**shape, rope_parameters=scale))


@pytest.mark.parametrize("family", [longrope, dynamic])
def test_rotary_positions_that_know_their_neighbours(family, tmp_path):
    """Up to the limit a sequence is its own; beyond it, only alone. The trainer asks no more."""
    torch.manual_seed(0)
    lm = family().eval()
    for p in lm.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, 0, 0.25)
    attach(lm)
    check_packing(lm, 0)
    assert shared_limit(lm) == 48
    prompts = [[5, 6, 7], [8, 9, 10]]

    def score(lengths, prompts=prompts):
        answers = [torch.randint(2, 64, (n,)).tolist() for n in lengths]
        given = prompts[: len(answers)]
        batch = pack(given, answers, pad_id=0, row_length=256, device="cpu")
        return answers, completion_logprobs(lm, batch, 1.0)

    answers, got = score((20, 40))
    own = lm(torch.tensor([prompts[0] + answers[0]])).logits[0, 2:-1].log_softmax(-1)
    own = own.gather(-1, torch.tensor(answers[0])[:, None])[:, 0]
    torch.testing.assert_close(got[:20], own.detach(), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="of at most 48 tokens beside others .* got one of 82"):
        score((20, 80))
    score((80,))
    assert prompt_room(lm, config(tmp_path, max_completion_length=40)) == 8


def test_other_rotary_positions_have_no_limit():
    assert shared_limit(model()) is None
    scale = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    scale |= {"original_max_position_embeddings": 16}
    shape = {**SMALL, "max_position_embeddings": 64, "rope_parameters": scale}
    assert shared_limit(tf.LlamaForCausalLM(tf.LlamaConfig(**shape))) is None
