"""Ulysses over two gloo processes against one process, and what it refuses."""

from __future__ import annotations

import pytest
import ranks
import torch
import ulysses_worker
from tiny import tiny

from grpo_fast import LossConfig
from grpo_fast.models.packing import pack
from grpo_fast.models.sequence_parallel import check_sequence_parallel, split


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each rank said to each check."""
    return ranks.ask("ulysses_worker.py", tmp_path_factory.mktemp("ranks"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.__name__ for f in ulysses_worker.CHECKS])
def test_two_processes_agree_with_one(said, name):
    ranks.judge(said, name)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_token_is_predicted_on_one_rank(world):
    batch = pack(
        ulysses_worker.PROMPTS, ulysses_worker.COMPLETIONS, pad_id=0, row_length=24, device="cpu"
    )
    parts = [split(batch, rank, world) for rank in range(world)]
    tokens = torch.cat([part.tokens for part in parts])
    assert tokens.sort().values.tolist() == list(range(len(batch.ids)))
    width = batch.input_ids.shape[1]
    together = torch.cat([part.input_ids for part in parts], 1)
    assert torch.equal(together[:, :width], batch.input_ids)
    for part in parts:
        # the hidden state that predicts a token is that of the token before it, in both
        before = batch.input_ids.flatten()[batch.rows[part.tokens]]
        assert torch.equal(part.input_ids.flatten()[part.rows], before)
        owner = torch.bucketize(part.tokens, batch.cu_seqlens[1:], right=True)
        assert torch.equal(part.sequence, owner)


@pytest.mark.parametrize(
    "family, world, loss, sentence",
    [
        ("Qwen3", 3, {}, "world: expected a divisor of the 4 attention heads, got 3"),
        ("Qwen3", 4, {}, "world: expected a divisor of the 2 key-value heads, got 4"),
        ("Gemma2", 2, {}, "expected full attention in every layer, got sliding_attention"),
        ("Qwen3", 2, {"loss_type": "gspo"}, "importance_sampling_level: expected token with seq"),
        ("Qwen3", 2, {"loss_type": "grpo"}, "aggregation: expected token_mean, sequence_sum or"),
        ("Qwen3", 2, {}, "rollout_correction: expected one of tokens with sequence"),
        ("Qwen3", 2, {"top_entropy_quantile": 0.2}, "top_entropy_quantile: expected 1 with"),
        ("Qwen3", 2, {"off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold: expected"),
    ],
)
def test_refuses(family, world, loss, sentence):
    with pytest.raises(ValueError, match=sentence):
        given = LossConfig(**{"loss_type": "dapo", **loss})
        check_sequence_parallel(tiny(family), world, given, rollout=True)


def test_takes_token_losses():
    for options in ({"loss_type": "dapo"}, {"loss_type": "dr_grpo", "max_completion_length": 9}):
        check_sequence_parallel(tiny("Qwen3"), 2, LossConfig(**options))
