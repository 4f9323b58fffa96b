"""Packed rows against the same sequences alone: layout, hidden states, gradients, self-check."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import kept_for_backward
from tiny import tiny
from torch import nn

from grpo_fast.models.packing import (
    PackedBatch,
    check_packing,
    completion_logprobs,
    default_row_length,
    pack,
)
from grpo_fast.models.policy import attach

PROMPTS = [[5, 9, 33], [7], [40, 41, 42, 43, 44, 45, 46], [8, 8], [60, 61]]
COMPLETIONS = [[11, 12, 13, 14, 15], [21, 22], [], [31], [51, 52, 53, 54, 55, 56, 57, 58]]
PAD = 2


def sequences():
    tokens = st.integers(0, 96)
    prompt, completion = st.lists(tokens, min_size=1, max_size=9), st.lists(tokens, max_size=9)
    return st.lists(st.tuples(prompt, completion), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(sequences(), st.one_of(st.none(), st.integers(1, 30)))
def test_layout(pairs, row_length):
    prompts, completions = [p for p, _ in pairs], [c for _, c in pairs]
    batch = pack(prompts, completions, pad_id=PAD, row_length=row_length, device="cpu")
    rows, width = batch.input_ids.shape
    fed = [[*p, *c[:-1]] for p, c in pairs if c]
    longest = max(map(len, fed), default=1)
    several = len(fed) > rows
    if row_length is None:
        assert (rows, width) == (1, max(1, sum(map(len, fed))))
    elif several:
        assert longest <= row_length and width % 16 == 0 and width < row_length + 16
    else:
        assert width == longest
    assert batch.ids.tolist() == [token for c in completions for token in c]
    ends = torch.tensor([len(c) for c in completions]).cumsum(0).tolist()
    assert batch.cu_seqlens.tolist() == [0, *ends]

    flat, places = batch.input_ids.flatten(), batch.position_ids.flatten()
    assert (batch.position_ids[:, 0] == 0).all()
    steps = batch.position_ids.diff(dim=1)
    assert ((steps == 1) | (batch.position_ids[:, 1:] == 0)).all()
    # the padding is no sequence: a row of one needs no mask
    assert (batch.position_ids == 0).sum() == max(len(fed), 1)
    used = torch.zeros(rows * width, dtype=torch.bool)
    for s, (prompt, completion) in enumerate(pairs):
        where = batch.rows[batch.cu_seqlens[s] : batch.cu_seqlens[s + 1]]
        if not completion:
            assert len(where) == 0
            continue
        start = int(where[0]) - len(prompt) + 1
        span = slice(start, int(where[-1]) + 1)
        assert start // width == int(where[-1]) // width
        assert flat[span].tolist() == [*prompt, *completion[:-1]]
        assert places[span].tolist() == list(range(len(prompt) + len(completion) - 1))
        assert where.tolist() == list(range(start + len(prompt) - 1, span.stop))
        assert not used[span].any()
        used[span] = True
    assert (flat[~used] == PAD).all()
    if row_length is not None and rows > 1 and longest <= row_length:
        # First fit leaves no two rows that would go into one.
        fills = used.view(rows, width).sum(1).tolist()
        assert sum(sorted(fills)[:2]) > row_length


def reference(model, prompts, completions):
    """Hidden states that predict each completion, from one plain forward per sequence."""
    out = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        out.append(hidden[len(prompt) - 1 : -1])
    return torch.cat(out)


def packed_hidden(model, batch, **changes):
    inputs = {**batch.inputs(), **changes}
    return model(**inputs, head_fn=lambda hidden, head: batch.select(hidden))


@pytest.mark.parametrize("row_length", [None, 1, 16, 30])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPT2"])
def test_hidden_states_and_gradients_are_those_of_separate_forwards(family, attention, row_length):
    model = tiny(family)
    model.set_attn_implementation(attention)
    attach(model)
    expected = reference(model, PROMPTS, COMPLETIONS)
    upstream = torch.randn(expected.shape)
    expected.backward(upstream)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = pack(PROMPTS, COMPLETIONS, pad_id=PAD, row_length=row_length, device="cpu")
    got = packed_hidden(model, batch)
    got.backward(upstream)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-4, rtol=1e-4)


def test_sliding_windows_restart_with_the_sequence():
    model = tiny("Gemma2")
    attach(model)
    prompts, completions = [[3] * 9, [4, 5, 6, 7, 8, 9]], [[10, 11, 12, 13], [14, 15, 16, 17, 18]]
    batch = pack(prompts, completions, pad_id=PAD, row_length=None, device="cpu")
    expected = reference(model, prompts, completions)
    torch.testing.assert_close(packed_hidden(model, batch), expected, atol=2e-5, rtol=1e-5)


def test_padding_at_the_end_changes_nothing():
    model = tiny()
    attach(model)
    seen = []
    for pad in (0, 50):
        batch = pack(PROMPTS, COMPLETIONS, pad_id=pad, row_length=20, device="cpu")
        assert (batch.input_ids == pad).sum() > 3
        seen.append(packed_hidden(model, batch))
    assert torch.equal(*seen)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_or_missing_positions_contaminate(attention):
    """The reason for `inputs()`: both calls look right and are wrong."""
    model = tiny()
    model.set_attn_implementation(attention)
    attach(model)
    batch = pack(PROMPTS, COMPLETIONS, pad_id=PAD, row_length=None, device="cpu")
    expected = reference(model, PROMPTS, COMPLETIONS)
    ones = torch.ones_like(batch.input_ids)
    for wrong in ({"attention_mask": ones}, {"position_ids": None}):
        assert (packed_hidden(model, batch, **wrong) - expected).abs().max() > 0.1


def test_the_cache_is_off_whatever_the_config_says():
    model = tiny_attached("Llama")
    batch = pack(PROMPTS, COMPLETIONS, pad_id=PAD, row_length=None, device="cpu")
    expected = packed_hidden(model, batch)
    assert model.config.use_cache and batch.inputs()["use_cache"] is False
    assert torch.equal(packed_hidden(model, batch, use_cache=None), expected)


class Wrong(nn.Module):
    """A wrapper that loses, or adds, what packing depends on."""

    def __init__(self, module, **changes):
        super().__init__()
        self.module, self.changes = module, changes

    def forward(self, **kwargs):
        changes = {name: make(kwargs["input_ids"]) for name, make in self.changes.items()}
        return self.module(**{**kwargs, **changes})


def test_self_check_passes_what_packs_and_says_when_attach_is_missing():
    model = tiny()
    with pytest.raises(ValueError, match="call attach"):
        check_packing(model, PAD)
    with pytest.raises(ValueError, match="call attach"):
        completion_logprobs(model, None, 1.0)
    attach(model.train())
    check_packing(model, PAD)
    assert model.training and all(p.grad is None for p in model.parameters())
    check_packing(tiny_attached("Gemma2").bfloat16(), PAD)


def tiny_attached(family):
    model = tiny(family)
    attach(model)
    return model


def test_self_check_finds_a_wrapper_that_contaminates():
    model = tiny_attached("Llama")
    for changes in ({"position_ids": lambda ids: None}, {"attention_mask": torch.ones_like}):
        with pytest.raises(ValueError, match=r"alone by [\d.]+ of the largest"):
            check_packing(Wrong(model, **changes), PAD)


@pytest.mark.parametrize("family", ["FalconH1", "RecurrentGemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_check_finds_recurrent_states_however_small_the_leak(family, dtype):
    model = tiny_attached(family).to(dtype)
    with pytest.raises(ValueError, match=r"have a gradient of [\d.e-]+ with respect to its neigh"):
        check_packing(model, PAD)


@pytest.mark.parametrize("family", ["Gemma2", "Granite"])
def test_completion_logprobs(family):
    model = tiny_attached(family)
    batch = pack(PROMPTS, COMPLETIONS, pad_id=PAD, row_length=16, device="cpu")
    logp, entropy = completion_logprobs(model, batch, 0.7, entropy=True)
    assert not logp.requires_grad and logp.shape == batch.ids.shape
    assert torch.equal(completion_logprobs(model, batch, 0.7), logp)
    expected, spread = [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        if completion:
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
            table = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
            expected.append(table.gather(1, torch.tensor(completion)[:, None])[:, 0])
            spread.append(-(table.exp() * table).sum(-1))
    torch.testing.assert_close(logp, torch.cat(expected), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.cat(spread), atol=2e-5, rtol=1e-5)


def test_a_batch_without_any_completion_token_still_runs():
    model = tiny_attached("Llama")
    batch = pack([[3, 4], [5]], [[], []], pad_id=PAD, row_length=16, device="cpu")
    assert batch.input_ids.tolist() == [[PAD]] and batch.cu_seqlens.tolist() == [0, 0, 0]
    assert completion_logprobs(model, batch, 1.0).shape == (0,)
    assert packed_hidden(model, batch).shape == (0, 32)


def test_default_row_length():
    model = tiny()
    assert default_row_length(model) == 256
    model.config.hidden_size = 4096
    assert default_row_length(model) == 2048
    model.config._attn_implementation = "flash_attention_2"
    assert default_row_length(model) is None


@pytest.mark.parametrize(
    ("prompts", "completions", "row_length", "message"),
    [
        ([], [], None, "completion_ids: expected .* got 0 for 0 prompts"),
        ([[1]], [[2], [3]], None, "completion_ids: expected .* got 2 for 1 prompts"),
        ([[1], []], [[2], [3]], None, "prompt_ids: .* got none in row 1"),
        ([[1]], [[2]], 0, "row_length: expected None or an integer >= 1, got 0"),
    ],
)
def test_bad_input(prompts, completions, row_length, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, completions, pad_id=PAD, row_length=row_length, device="cpu")


def test_select_takes_rows_of_the_flattened_batch():
    unused = torch.zeros(2, 3).long()
    batch = PackedBatch(unused, unused, torch.tensor([4, 1]), unused, unused)
    hidden = torch.arange(12.0).view(2, 3, 2)
    assert batch.select(hidden).tolist() == [[8, 9], [2, 3]]


def test_a_sequence_longer_than_a_row_gives_each_a_row_and_no_mask():
    """Rows as long as the longest would each have a mask of its length squared, in every layer."""
    prompts, completions = [[3] * 90, [4] * 3, [5] * 4], [[6] * 40, [7] * 3, [8] * 5]
    model = tiny("Llama", max_position_embeddings=256)
    attach(model)
    model.train()
    for rows in (64, 256):
        batch = pack(prompts, completions, pad_id=PAD, row_length=rows, device="cpu")
        tensors = kept_for_backward(lambda batch=batch: packed_hidden(model, batch))
        masks = [t for t in tensors if t.shape[-2:] == (batch.input_ids.shape[1],) * 2]
        assert len(batch.input_ids) == (3 if rows == 64 else 1)
        assert bool(masks) is (rows == 256)
