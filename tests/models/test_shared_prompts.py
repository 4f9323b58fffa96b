"""Prompts computed once: layout, hidden states, log-probs, gradients, what is kept and refused."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import (
    FAMILIES,
    gradients,
    groups,
    hidden,
    kept_for_backward,
    model,
    separately,
)
from tiny import lora, tiny
from torch import nn

from grpo_fast.models.attention import segment_attention
from grpo_fast.models.packing import completion_logprobs, pack
from grpo_fast.models.policy import attach
from grpo_fast.models.segments import Segments
from grpo_fast.models.shared_prompts import Packer, pack_segments, packer_of

# 2e-6 of the largest value: fp32 sums in another order
BOUND = 2e-6
# a sum over all tokens of products of which many cancel
GRADIENT_BOUND = 1e-5


def shared(prompts, completions, share=True):
    return pack_segments(prompts, completions, pad_id=0, share=share, device="cpu")


def worst(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def sequences():
    tokens = st.integers(0, 2)
    prompt, completion = st.lists(tokens, min_size=1, max_size=4), st.lists(tokens, max_size=5)
    return st.lists(st.tuples(prompt, completion), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(sequences(), st.sampled_from(["auto", True, False]))
def test_layout(pairs, share):
    prompts, completions = [p for p, _ in pairs], [c for _, c in pairs]
    batch = shared(prompts, completions, share)
    fed = [(tuple(p), c) for p, c in pairs if c]
    tokens, places = batch.input_ids[0].tolist(), batch.position_ids[0]
    position = torch.arange(len(tokens))
    assert batch.ids.tolist() == [token for c in completions for token in c]
    assert batch.cu_seqlens.diff().tolist() == [len(c) for c in completions]
    for s, (prompt, completion) in enumerate(pairs):
        where = batch.rows[batch.cu_seqlens[s] : batch.cu_seqlens[s + 1]]
        assert len(where) == len(completion)
        if not completion:
            continue
        # what the row that predicts the last token sees is the sequence, in order
        seen = position[batch.layout.sees(where[-1], position)]
        assert [tokens[i] for i in seen] == [*prompt, *completion[:-1]]
        assert places[seen].tolist() == list(range(len(seen)))
        assert where.tolist() == seen[len(prompt) - 1 :].tolist()
    apart = sum(len(p) + len(c) - 1 for p, c in fed)
    repeated = sum(len(p) for p, _ in fed) - sum(len(p) for p in {p for p, _ in fed})
    if share is False:
        assert len(tokens) == max(1, apart)
    elif share is True:
        assert len(tokens) == max(1, apart - repeated)
    else:
        assert max(1, apart - repeated) <= len(tokens) <= max(1, apart)


def test_a_prompt_is_shared_where_that_saves_a_sixteenth():
    for prompt, length, expected in ((8, 9, True), (8, 120, False), (64, 512, True)):
        prompts, completions = groups([prompt], [[length] * 8])
        batch = shared(prompts, completions, "auto")
        assert bool(batch.layout.links) is expected, (prompt, length)
        assert batch.input_ids.numel() == (
            prompt + 8 * (length - 1) if expected else 8 * (prompt + length - 1)
        )


TABLE = [[0, 9, -1], [9, 4, 0], [13, 1, 0], [14, 3, 0], [17, 6, -1], [23, 40, -1], [63, 35, 5]]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_is_that_under_a_mask_in_float64(heads, dtype, bound):
    segments = Segments(torch.tensor([*TABLE, [98, 2, 5]]))
    n = segments.tokens
    many, few = heads
    torch.manual_seed(0)
    given = [torch.randn(1, h, n, 8, dtype=dtype, requires_grad=True) for h in (many, few, few)]
    wide = [x.detach().double().requires_grad_() for x in given]
    position = torch.arange(n)
    mask = segments.sees(position[:, None], position)
    expected = nn.functional.scaled_dot_product_attention(
        *wide, attn_mask=mask, scale=0.5, enable_gqa=True
    ).transpose(1, 2)
    got = segment_attention(*given, segments, 0.5)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream.double())
    assert got.dtype == dtype
    assert worst(got.double(), expected) < bound
    for ours, theirs in zip(given, wide, strict=True):
        assert worst(ours.grad.double(), theirs.grad) < bound


def test_attention_takes_the_dtype_of_autocast():
    segments = Segments(torch.tensor([[0, 3, -1], [3, 2, 0]]))
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = segment_attention(q, q, q, segments, None)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "table",
    [
        [[1, 2, -1]],
        [[0, 2, -1], [3, 1, -1]],
        [[0, 2, -1], [2, 1, -1], [3, 1, 0]],
        [[0, 0, -1]],
    ],
)
def test_a_table_with_gaps_or_wrong_roots_is_refused(table):
    with pytest.raises(ValueError, match="segments: expected segments without gaps"):
        Segments(torch.tensor(table))


def compare(policy, prompts, completions, bound=BOUND, gradient_bound=GRADIENT_BOUND):
    """Hidden states and gradients of shared prompts against each sequence alone."""
    expected = hidden(policy, separately(policy, prompts, completions))
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = gradients(policy, expected, upstream)
    batch = shared(prompts, completions)
    assert batch.layout.links
    got = hidden(policy, [batch])
    found = gradients(policy, got, upstream)
    assert worst(got, expected) < bound
    assert found.keys() == wanted.keys()
    scale = max(g.abs().max() for g in wanted.values())
    for name in wanted:
        assert (found[name] - wanted[name]).abs().max() < gradient_bound * scale, name
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_separate_forwards(family):
    prompts, completions = groups([11, 1, 7], [[4, 1, 9, 5], [3, 3], [2]])
    batch = compare(model(family), prompts, completions)
    # P + sum(n - 1) for each group; the last one is whole
    assert batch.input_ids.numel() == (11 + 3 + 0 + 8 + 4) + (1 + 2 + 2) + (7 + 1)


@pytest.mark.parametrize(("size", "prompt"), [(2, 1), (16, 1), (2, 300), (16, 300), (3, 4096)])
def test_group_sizes_and_prompt_lengths(size, prompt):
    policy = model("Llama", max_position_embeddings=8192)
    prompts, completions = groups([prompt], [[3 + i % 5 for i in range(size)]])
    batch = compare(policy, prompts, completions)
    assert batch.input_ids.numel() == prompt + sum(len(c) - 1 for c in completions)


@pytest.mark.parametrize("family", ["Llama", "Granite"])
def test_log_probs_are_those_of_unshared_packing(family):
    policy = model(family)
    prompts, completions = groups([9, 20], [[5, 1, 8], [7, 7]])
    together = completion_logprobs(policy, shared(prompts, completions), 0.7)
    apart = completion_logprobs(policy, shared(prompts, completions, False), 0.7)
    rows = pack(prompts, completions, pad_id=0, row_length=256, device="cpu")
    assert worst(together, apart) < BOUND
    assert worst(together, completion_logprobs(policy, rows, 0.7)) < BOUND


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_see_the_same_layout_again(reentrant):
    policy = model("Llama")
    policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
    policy.enable_input_require_grads()
    prompts, completions = groups([11, 7], [[4, 1, 9], [5, 6]])
    compare(policy, prompts, completions)


def test_an_adapter_and_its_base():
    policy = tiny("Llama")
    attach(policy)
    policy = lora(policy).train()
    prompts, completions = groups([11], [[4, 6, 9]])
    compare(policy, prompts, completions)
    with policy.disable_adapter():
        base = hidden(policy, [shared(prompts, completions)])
    assert worst(base, hidden(policy, [shared(prompts, completions)])) > 1e-3


def test_nothing_of_the_prompt_is_kept_for_each_completion():
    """What is kept grows with P + G n, and no tensor has a number for every pair of tokens."""
    policy = model("Llama", max_position_embeddings=2048)
    kept = {}
    for size in (2, 8):
        prompts, completions = groups([512], [[9] * size])
        batch = shared(prompts, completions)
        tensors = kept_for_backward(lambda batch=batch: hidden(policy, [batch]))
        kept[size] = sum(t.untyped_storage().nbytes() for t in tensors)
        assert max(t.numel() for t in tensors) < 512 * 512 / 4
    tokens = {size: 512 + size * 8 for size in kept}
    # within the few numbers that do not grow with the tokens
    assert kept[8] / kept[2] == pytest.approx(tokens[8] / tokens[2], rel=0.02)


def test_only_calls_with_a_layout_are_taken_over():
    policy = model("Llama")
    packer_of(policy, 0)
    ids = torch.arange(3, 11)[None].repeat(2, 1)
    left = torch.ones_like(ids)
    left[0, :3] = 0
    first = policy(input_ids=ids, attention_mask=left).logits
    alone = policy(input_ids=ids[:1, 3:]).logits
    assert worst(first[0, 3:], alone[0]) < BOUND


def test_a_layout_without_its_attention_is_refused():
    policy = model("Llama")
    batch = shared(*groups([4], [[3, 3]]))
    policy.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="layout: expected an attention implementation that takes"):
        policy(**batch.inputs(), head_fn=lambda h, head: h)
    with pytest.raises(ValueError, match="layout: expected None without head_fn"):
        policy(**batch.inputs())


def test_the_packer_says_why_a_model_cannot_share():
    for family, changes, reason in (
        ("Gemma2", {}, "eager attention"),
        ("MiniCPM3", {}, "heads of one width"),
        ("Llama", {"attention_dropout": 0.1}, "dropout in attention"),
        # a module of its own, which is no attribute that could be read
        ("GPT2", {"attn_pdrop": 0.1}, r"dropout=0\.1"),
    ):
        policy = tiny(family, **changes)
        attach(policy)
        packer = packer_of(policy, 0)
        assert not packer.segments and re.search(reason, packer.reason) and not policy.training
        assert packer.pack([[3, 4]] * 2, [[5], [6, 7]], "cpu").segments is None
        with pytest.raises(ValueError, match=f"share_prompts: expected False .*{reason}"):
            packer_of(policy, 0, True)


@pytest.mark.parametrize("family", ["FalconH1", "RecurrentGemma"])
def test_recurrent_layers_are_refused(family):
    policy = tiny(family)
    attach(policy)
    with pytest.raises(ValueError, match="share_prompts: expected False"):
        packer_of(policy, 0, True)
    with pytest.raises(ValueError, match="cannot be packed"):
        packer_of(policy, 0)


def test_the_check_finds_attention_that_forgets_the_prompt(monkeypatch):
    monkeypatch.setattr(Segments, "links", property(lambda self: []))
    policy = tiny("Llama")
    attach(policy)
    with pytest.raises(ValueError, match=r"differ from those of the sequence alone by [\d.]+"):
        packer_of(policy, 0, True)


def test_a_sliding_window_is_honoured_by_leaving_longer_sequences_to_rows():
    policy = model("Mistral", sliding_window=16)
    packer = packer_of(policy, 0, True)
    assert packer.segments and packer.window == 16
    prompts, completions = groups([8], [[9, 5]])
    assert packer.pack(prompts, completions, "cpu").layout.links
    longer, answers = groups([8], [[10, 5]])
    batch = packer.pack(longer, answers, "cpu")
    assert batch.layout is None
    for case in ((prompts, completions), (longer, answers)):
        got = hidden(policy, [packer.pack(*case, "cpu")])
        assert worst(got, hidden(policy, separately(policy, *case))) < BOUND
    with pytest.raises(ValueError, match="at most its window of 16"):
        hidden(policy, [shared(longer, answers)])


def test_flash_attention_keeps_its_own_rows_where_nothing_is_shared():
    packer = Packer(0, None, segments=True, share="auto", native=True)
    assert packer.pack([[3], [4, 5]], [[6, 7], [8]], "cpu").segments is None
    assert packer.pack([[3, 4]] * 2, [[6, 7], [8]], "cpu").layout.links


@pytest.mark.parametrize("share", ["yes", None, 2])
def test_bad_input(share):
    with pytest.raises(ValueError, match="share: expected True, False or 'auto'"):
        pack_segments([[1]], [[2]], pad_id=0, share=share, device="cpu")
    policy = tiny("Llama")
    attach(policy)
    with pytest.raises(ValueError, match="share_prompts: expected True, False or 'auto'"):
        packer_of(policy, 0, share)


def test_a_batch_moves_with_its_layout():
    batch = shared(*groups([4], [[3, 3]])).to("cpu")
    assert batch.layout.links and batch.segments.shape == (3, 3)
    assert "layout" in batch.inputs() and "layout" not in batch.body_inputs()


def test_every_pair_of_groups_of_one_row_is_apart():
    """No hidden state of one group has a gradient with respect to another's tokens."""
    policy = model("Llama")
    batch = shared(*groups([5, 4, 3], [[3, 4], [2, 2], [5]]))
    leaf = policy.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    inputs = {**batch.inputs(), "input_ids": None, "inputs_embeds": leaf}
    states = policy(**inputs, head_fn=lambda h, head: batch.select(h))
    tokens = torch.arange(batch.layout.tokens)
    for s, (a, b) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        probe = states[a:b] * torch.linspace(-1, 1, states.shape[-1])
        (gradient,) = torch.autograd.grad(probe.sum(), leaf, retain_graph=True)
        seen = batch.layout.sees(batch.rows[b - 1], tokens)
        assert (gradient[0, ~seen] == 0).all(), s
        assert (gradient[0, seen] != 0).any()
