"""Segments by flash attention's varlen function, whose semantics a stand-in has, and by flex."""

from __future__ import annotations

import pytest
import torch
from packing_cases import groups, hidden, kept_for_backward, model, separately
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from grpo_fast.models import attention, varlen
from grpo_fast.models.attention import install, segment_attention
from grpo_fast.models.segments import Segments
from grpo_fast.models.shared_prompts import pack_segments, packer_of
from grpo_fast.models.varlen import block_mask, varlen_arguments, varlen_attention

TABLE = [[0, 9, -1], [9, 4, 0], [13, 1, 0], [14, 3, 0], [17, 6, -1], [23, 8, -1], [31, 5, 5]]


def stand_in(q, k, v, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **_):
    """What `flash_attn_varlen_func` says it computes: each sequence's queries over its keys, the
    causal triangle aligned at the bottom right."""
    assert causal and q.dim() == 3 and cu_seqlens_q.dtype == torch.int32
    out = []
    for s in range(len(cu_seqlens_q) - 1):
        mine = slice(*cu_seqlens_q[s : s + 2].tolist())
        theirs = slice(*cu_seqlens_k[s : s + 2].tolist())
        n, m = mine.stop - mine.start, theirs.stop - theirs.start
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        heads_first = (x.transpose(0, 1) for x in (q[mine], k[theirs], v[theirs]))
        one = nn.functional.scaled_dot_product_attention(
            *heads_first, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        )
        out.append(one.transpose(0, 1))
    return torch.cat(out)


def given(segments):
    torch.manual_seed(0)
    n = segments.tokens
    return [torch.randn(1, heads, n, 8, requires_grad=True) for heads in (4, 2, 2)]


def test_varlen_is_the_attention_of_the_other_kernels():
    segments = Segments(torch.tensor(TABLE))
    ours, theirs = given(segments), given(segments)
    got = varlen_attention(*ours, segments, 0.5, stand_in)
    expected = segment_attention(*theirs, segments, 0.5)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=5e-6, rtol=1e-5)


def test_the_gathered_keys_are_not_kept():
    segments = Segments(torch.tensor([[0, 400, -1], *([400 + 4 * i, 4, 0] for i in range(16))]))
    q, k, v = given(segments)
    kept = kept_for_backward(lambda: varlen_attention(q, k, v, segments, None, stand_in))
    assert max(t.numel() for t in kept) <= q.numel()


def test_the_arguments_of_a_varlen_call():
    keys, bounds = varlen_arguments(Segments(torch.tensor(TABLE[:3])), torch.device("cpu"))
    assert keys.tolist() == [*range(9), *range(9), *range(9, 13), *range(9), 13]
    assert bounds["cu_seqlens_q"].tolist() == [0, 9, 13, 14]
    assert bounds["cu_seqlens_k"].tolist() == [0, 9, 22, 32]
    assert (bounds["max_seqlen_q"], bounds["max_seqlen_k"]) == (9, 13)


def test_a_flash_model_shares_prompts_through_the_varlen_function(monkeypatch):
    """transformers' own names, its loader replaced: what a GPU with flash-attn would call."""
    policy = model("Llama")
    expected_of = groups([11, 6], [[4, 1, 9], [3, 3]])
    expected = hidden(policy, separately(policy, *expected_of))
    calls = []

    def load(name):
        def kernel(*args, **options):
            calls.append(options)
            return stand_in(*args, **options)

        return (None, kernel, None, None, None), (None, None)

    monkeypatch.setattr(
        "transformers.modeling_flash_attention_utils.lazy_import_flash_attention", load
    )
    assert lazy_import_flash_attention is not load
    assert install("flash_attention_2")
    policy.config._attn_implementation_internal = "flash_attention_2"
    batch = pack_segments(*expected_of, pad_id=0, share=True, device="cpu")
    got = hidden(policy, [batch])
    assert len(calls) == policy.config.num_hidden_layers
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()


def test_the_block_mask_of_flex_attention_lets_see_what_segments_say():
    segments = Segments(torch.tensor(TABLE))
    mask = block_mask(segments, "cpu")
    position = torch.arange(segments.tokens)
    q, k = position[:, None], position[None]
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.mask_mod(zero, zero, q, k), segments.sees(q, k))


def test_flex_attention_gets_the_block_mask(monkeypatch):
    """On a CPU flex attention has no backward: the forward alone, not compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    def eager(module, q, k, v, mask, scaling=None, **_):
        out = flex_attention(q, k, v, block_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", eager)
    policy = model("Llama", head_dim=16)
    pairs = groups([11, 6], [[4, 1, 9], [3, 3]])
    with torch.no_grad():
        expected = hidden(policy, separately(policy, *pairs))
        assert install("flex_attention")
        policy.config._attn_implementation_internal = "flex_attention"
        got = hidden(policy, [pack_segments(*pairs, pad_id=0, share=True, device="cpu")])
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()


def test_what_cannot_be_taught_is_left_alone():
    assert not install("eager") and not install("nobody/has-this-kernel")
    assert install("sdpa") and install("sdpa")
    for mapping in (AttentionInterface, AttentionMaskInterface):
        function = mapping._global_mapping["sdpa"]
        assert function.over_segments
    policy = model("Llama")
    policy.set_attn_implementation("eager")
    assert "eager attention" in packer_of(policy, 0).reason


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "s_aux"),
        ({"is_causal": False}, "is_causal=False"),
        ({"sliding_window": 8}, "sliding_window=8 below a sequence of 13"),
    ],
)
def test_what_segments_cannot_answer_is_refused(options, asked):
    install("sdpa")
    segments = Segments(torch.tensor(TABLE))
    function = AttentionInterface._global_mapping["sdpa"]
    with pytest.raises(ValueError, match=asked):
        function(nn.Module(), *given(segments), segments, **options)


def test_a_row_of_other_tokens_and_a_backbone_without_its_layout_are_refused():
    install("sdpa")
    segments = Segments(torch.tensor(TABLE[:3]))
    q, k, v = given(Segments(torch.tensor(TABLE)))
    function = AttentionInterface._global_mapping["sdpa"]
    with pytest.raises(ValueError, match="input_ids: expected one row of 14 tokens"):
        function(nn.Module(), q, k, v, segments)
    with pytest.raises(ValueError, match="layout: expected a backbone that runs under laid_out"):
        function(nn.Module(), q, k, v, None, layout=segments)
    batch = pack_segments(*groups([4], [[3, 3]]), pad_id=0, share=True, device="cpu")
    with pytest.raises(ValueError, match="layout: expected a backbone"):
        model("Llama").model(**batch.inputs())


def test_heads_of_unequal_width_are_refused():
    segments = Segments(torch.tensor([[0, 4, -1]]))
    q, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="heads of one width"):
        segment_attention(q, q, v, segments, None)
    assert attention.SDPA == "sdpa" and varlen.FLEX == "flex_attention"
