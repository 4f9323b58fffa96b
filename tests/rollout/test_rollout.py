"""`generate` against plain Hugging Face generation of one prompt at a time."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from tiny import tiny
from transformers import GenerationConfig

from grpo_fast.models.policy import attach
from grpo_fast.rollout import hf as rollout
from grpo_fast.rollout.hf import generate

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17, 18, 19, 20, 21, 22, 23]]
GREEDY = GenerationConfig(max_new_tokens=7)
SAMPLE = GenerationConfig(max_new_tokens=7, do_sample=True)
PAD = 0


def run(model, prompts=PROMPTS, count=3, config=GREEDY, eos=frozenset({2}), seed=0, **options):
    torch.manual_seed(seed)
    options = {"pad_id": PAD, **options}
    return generate(model, prompts, count, generation_config=config, eos_ids=set(eos), **options)


def alone(model, prompt, eos=None, **options):
    ids = torch.tensor([prompt])
    model.generation_config = GenerationConfig()
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": eos, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=PAD, **options)
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def prefills(monkeypatch):
    """What `_prefill` returned, call by call."""
    seen, inner = [], rollout._prefill

    def spy(*args):
        seen.append(inner(*args))
        return seen[-1]

    monkeypatch.setattr(rollout, "_prefill", spy)
    return seen


@pytest.mark.parametrize(
    ("family", "shares"),
    [("Llama", True), ("Qwen3", True), ("Gemma2", True), ("FalconH1", False)],
)
def test_shared_prefill_gives_the_same_tokens(family, shares, prefills):
    model = tiny(family)
    attach(model)
    got = run(model)
    assert [bool(cache) for cache in prefills] == [shares]
    assert got.prompt_ids == [p for p in PROMPTS for _ in range(3)]
    assert got.completion_ids == [c for p in PROMPTS for c in [alone(model, p, eos=2)] * 3]
    assert run(model, shared_prefill=False) == got
    sampled = run(model, config=SAMPLE)
    assert run(model, config=SAMPLE, shared_prefill=False) == sampled
    assert len({tuple(c) for c in sampled.completion_ids[:3]}) > 1


def test_prompts_go_through_the_model_once(prefills):
    model, sizes = tiny(), []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    run(model, count=5)
    assert sizes[:2] == [(4, 7), (20, 1)]
    sizes.clear()
    run(model, count=1)
    run(model, [[3], [4]], count=5)
    assert sizes[0] == (4, 8) and (10, 1) in sizes and len(prefills) == 1
    handle.remove()


def test_the_global_seed_decides():
    model = tiny()
    first = run(model, config=SAMPLE)
    assert run(model, config=SAMPLE) == first
    assert run(model, config=SAMPLE, seed=1) != first


@pytest.mark.parametrize("pad", [0, 2])
def test_completions_end_with_their_eos(pad):
    """EOS tokens chosen from what greedy search says: at the start, in the middle, never."""
    model = tiny()
    free = [alone(model, p) for p in PROMPTS]
    eos = {free[0][0], free[2][3]}
    got = run(model, count=2, eos=eos, pad_id=pad)
    lengths = []
    for i, tokens in enumerate(free):
        end = next((t + 1 for t, token in enumerate(tokens) if token in eos), len(tokens))
        lengths.append(end)
        for j in (2 * i, 2 * i + 1):
            assert got.completion_ids[j] == tokens[:end]
            assert got.truncated[j] == (tokens[end - 1] not in eos)
    assert lengths[0] == 1 and 1 < lengths[2] < 7 and 7 in lengths and True in got.truncated


def test_pad_may_be_eos_and_eos_may_be_unset():
    model = tiny()
    eos = alone(model, PROMPTS[0])[2]
    assert asdict(run(model, eos={eos}, pad_id=eos)) == asdict(run(model, eos={eos}, pad_id=PAD))
    endless = run(model, eos=set())
    assert all(endless.truncated) and {len(c) for c in endless.completion_ids} == {7}


def test_settings_of_the_checkpoint_are_not_read():
    model = tiny()
    plain = run(model, config=SAMPLE, count=8)
    own = GenerationConfig(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=5.0)
    model.generation_config = own
    assert run(model, config=SAMPLE, count=8) == plain
    assert model.generation_config is own
    # top_k = 50 is what transformers takes for None; there are 97 tokens.
    exact = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=0, temperature=1.0)
    assert run(model, config=exact, count=8) == plain


def first_tokens(model, **settings):
    config = GenerationConfig(max_new_tokens=1, do_sample=True, **settings)
    got = run(model, [[5, 6, 7]], count=3000, config=config)
    return torch.tensor(got.completion_ids)[:, 0].bincount(minlength=97) / 3000


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.4}, {"min_p": 0.3}]
)
def test_sampled_distribution_is_the_one_asked_for(settings):
    model = tiny()
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].detach()
    p = (logits / settings.get("temperature", 1.0)).softmax(-1)
    ranked, order = p.sort(descending=True)
    keep = torch.ones(97, dtype=torch.bool)
    keep[settings.get("top_k", 97) :] = False
    keep &= ranked.cumsum(0) - ranked < settings.get("top_p", 2.0)
    keep &= ranked >= settings.get("min_p", 0.0) * ranked[0]
    p = torch.zeros(97).scatter(0, order, ranked * keep)
    p /= p.sum()
    got = first_tokens(model, **settings)
    assert (got[p == 0] == 0).all()
    assert ((got - p).abs() <= 5 * (p * (1 - p) / 3000).sqrt() + 1e-3).all()


def test_repetition_penalty_does_not_depend_on_padding():
    model = tiny(seed=1)
    config = GenerationConfig(max_new_tokens=7, repetition_penalty=30.0)
    short = [13, 14, 15]
    expected = alone(model, short, repetition_penalty=30.0)
    assert expected != alone(model, short)
    long = [16, 17, 18, 19, 20, 21, 22, 23]
    # Were padding penalised (transformers 5.5 does), this token would lose its first place.
    got = run(model, [short, long], config=config, pad_id=expected[0], eos=set())
    assert got.completion_ids[:3] == [expected] * 3


def test_modes_are_given_back():
    model = tiny().train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    out = run(model)
    assert [module.training for module in model.modules()] == flags
    assert out.completion_ids == run(tiny()).completion_ids


def test_prompt_and_completion_may_fill_the_context_and_no_more():
    model = tiny()
    assert len(run(model, [[3] * 57], eos=set()).completion_ids[0]) == 7
    message = r"at most 57 tokens \(context 64 less max_new_tokens\), got 58 in row 1"
    with pytest.raises(ValueError, match=message):
        run(model, [[3], [3] * 58])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: expected at least one prompt"),
        ([[1], []], "prompts: .* got none in row 1"),
        ([[1], [2, 97]], r"prompts: expected ids in \[0, 97\), got 97 in row 1"),
        ([[1], [-1]], r"prompts: expected ids in \[0, 97\), got -1 in row 1"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(ValueError, match=message):
        run(tiny(), prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": None}, "max_new_tokens >= 1, got None"),
        ({"num_beams": 2}, "expected sampling or greedy search, got beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "got assisted_generation"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences=1, got 2"),
        ({"stop_strings": "x"}, "stop_strings"),
        ({"max_time": 1.0}, "max_time"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=None, got 2"),
    ],
)
def test_unsupported_settings(settings, message):
    config = GenerationConfig(**{"max_new_tokens": 7, **settings})
    with pytest.raises(ValueError, match=message):
        run(tiny(), config=config)
    with pytest.raises(ValueError, match="num_generations: expected an integer >= 1, got 0"):
        run(tiny(), count=0)


def test_the_configuration_is_not_changed():
    config = GenerationConfig(max_new_tokens=7, do_sample=True)
    before = config.to_dict()
    run(tiny(), config=config)
    assert config.to_dict() == before
