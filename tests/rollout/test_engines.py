"""Sampling engines: continuous batching for real, vLLM's and SGLang's routes against a double."""

import copy

import pytest
import torch
from engine_double import Engine, Served
from tiny_trainer import model
from transformers import AutoModelForCausalLM, GenerationConfig

from grpo_fast.models.policy import attach
from grpo_fast.rollout import (
    ContinuousSampler,
    HFSampler,
    Rollouts,
    SamplerFailed,
    SGLangSampler,
    VLLMSampler,
    joined,
)
from grpo_fast.rollout.client import Client
from grpo_fast.rollout.weights import plain_state, save_weights

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
CONFIG = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.8, top_k=0)
QUICK = {"patience": 4.0, "timeout": 20.0}


def exact(policy, rollouts, temperature=0.8):
    """Largest distance of the sampler's log-probs from one plain float64 forward."""
    worst = 0.0
    for prompt, tokens, values in zip(
        rollouts.prompt_ids, rollouts.completion_ids, rollouts.logp, strict=True
    ):
        with torch.no_grad():
            z = policy(torch.tensor([prompt + tokens])).logits[0].double() / temperature
        z = z.log_softmax(-1)[len(prompt) - 1 : -1]
        want = z.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, (want - torch.tensor(values, dtype=torch.float64)).abs().max().item())
    return worst


def server(kind, url, folder, version=lambda: 0, config=CONFIG):
    return kind(
        url, generation_config=config, eos_ids={1}, folder=folder, version=version, client=QUICK
    )


def test_continuous_batching_gives_its_log_probs_and_follows_the_seed():
    policy = model()
    attach(policy)
    given = {"generation_config": CONFIG, "pad_id": 0, "eos_ids": {1}}
    sampler = ContinuousSampler(policy, **given)
    torch.manual_seed(3)
    first, after = sampler.sample(PROMPTS, 4), torch.rand(())
    torch.manual_seed(3)
    again = sampler.sample(PROMPTS, 4)
    assert first.completion_ids == again.completion_ids and torch.rand(()) == after
    assert first.prompt_ids == [p for p in PROMPTS for _ in range(4)]
    assert len({tuple(row) for row in first.completion_ids}) > 6
    assert exact(policy, first) < 1e-5
    # another implementation of attention served the call alone
    assert policy.config._attn_implementation == "sdpa" and policy.training


def test_continuous_batching_samples_what_generate_samples():
    """Frequencies of the first token over 600 draws each."""
    policy = model(seed=1)
    attach(policy)
    given = {"generation_config": GenerationConfig(max_new_tokens=1, do_sample=True)}
    given |= {"pad_id": 0, "eos_ids": {1}}
    counts = []
    for kind in (HFSampler, ContinuousSampler):
        torch.manual_seed(0)
        tokens = kind(policy, **given).sample([[5, 6, 7]], 600).completion_ids
        counts.append(torch.bincount(torch.tensor(tokens).flatten(), minlength=32).double())
    with torch.no_grad():
        p = policy(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1)
    for found in counts:
        kept = p > 0.01
        z = (found[kept] - 600 * p[kept]) / (600 * p[kept] * (1 - p[kept])).sqrt()
        # 4.5 sigma of about 20 tokens: a false alarm in 7,000 runs
        assert z.abs().max() < 4.5


@pytest.mark.parametrize("kind", [VLLMSampler, SGLangSampler])
def test_a_server_is_asked_for_ids_and_gives_log_probs(kind, tmp_path):
    policy = model()
    engine = Engine(copy.deepcopy(policy))
    with Served(engine) as url:
        sampler = server(kind, url, tmp_path)
        torch.manual_seed(5)
        first = sampler.sample(PROMPTS, 4)
        torch.manual_seed(5)
        assert sampler.sample(PROMPTS, 4).completion_ids == first.completion_ids
    assert first.prompt_ids == [p for p in PROMPTS for _ in range(4)]
    assert exact(policy, first) < 1e-5
    assert any(first.truncated) and not all(first.truncated)
    for tokens, cut in zip(first.completion_ids, first.truncated, strict=True):
        assert cut == (tokens[-1] != 1) and 1 not in tokens[:-1]
    assert all(b.get("top_k") is None for b in engine.bodies)


@pytest.mark.parametrize("kind", [VLLMSampler, SGLangSampler])
def test_weights_are_pushed_once_a_step_and_the_cache_is_forgotten(kind, tmp_path):
    policy, step = model(), [0]
    engine = Engine(model(seed=9))
    with Served(engine) as url:
        sampler = server(kind, url, tmp_path, version=lambda: step[0])
        assert exact(policy, sampler.sample(PROMPTS, 2)) > 0.1
        sampler.sync(policy)
        sampler.sync(policy)
        found = sampler.sample(PROMPTS, 2)
        assert exact(policy, found) < 1e-5 and found.version == 0
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.05 * torch.randn_like(p))
        step[0] = 7
        sampler.sync(policy)
        found = sampler.sample(PROMPTS, 2)
        assert exact(policy, found) < 1e-5 and found.version == 7
    loads = [r for r in engine.calls if r in ("/collective_rpc", "/update_weights_from_disk")]
    assert len(loads) == 2
    if kind is VLLMSampler:
        assert engine.calls.count("/reset_prefix_cache") == 2
    # one folder is left: the last one
    assert [path.name for path in tmp_path.iterdir()] == ["weights-00000007"]


def test_a_busy_server_is_asked_again_and_a_dead_one_is_named(tmp_path):
    engine = Engine(model())
    with Served(engine) as url:
        sampler = server(VLLMSampler, url, tmp_path)
        engine.broken = [503, 0]
        assert len(sampler.sample(PROMPTS[:1], 2).completion_ids) == 2
        engine.broken = [400]
        with pytest.raises(SamplerFailed, match="refused: status 400"):
            sampler.sample(PROMPTS[:1], 2)
    with pytest.raises(SamplerFailed, match=r"gave no answer in 4 s .* Is the server running"):
        sampler.sample(PROMPTS[:1], 2)


def test_answers_of_another_kind_are_refused(tmp_path, monkeypatch):
    sampler = server(VLLMSampler, "http://127.0.0.1:9", tmp_path)
    sampler._name = "tiny"
    for answer, said in (
        ({"choices": [{"index": 0}]}, "without token_ids"),
        ({"error": "x"}, "expected choices"),
        (
            {"choices": [{"index": 0, "token_ids": [1], "logprobs": {"token_logprobs": []}}]},
            "1 tokens came with 0 log-probs",
        ),
        ({"choices": []}, "expected 1 completions of prompt 0, got 0"),
    ):
        monkeypatch.setattr(Client, "ask", lambda *_, answer=answer: answer)
        with pytest.raises(SamplerFailed, match=said):
            sampler.sample([[3]], 1)


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: Client("localhost:8000"), "sampler_url: expected http"),
        (
            lambda: server(
                VLLMSampler,
                "http://x",
                "f",
                config=GenerationConfig(max_new_tokens=3, do_sample=True, typical_p=0.5),
            ),
            "generation_kwargs: expected a field that a server knows",
        ),
        (
            lambda: ContinuousSampler(
                model(), generation_config=CONFIG, pad_id=0, eos_ids={1}, settings={"seed": 1}
            ),
            "sampler_kwargs: expected none of seed",
        ),
        (
            lambda: ContinuousSampler(
                model(), generation_config=CONFIG, pad_id=0, eos_ids={1}, settings={"blocks": 1}
            ),
            "sampler_kwargs: expected fields of ContinuousBatchingConfig",
        ),
    ],
)
def test_wrong_settings_are_named(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


def test_adapters_are_added_up_without_touching_the_policy(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"])
    policy = peft.get_peft_model(model(), config)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    save_weights(policy, tmp_path / "w")
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "w")
    assert set(plain.state_dict()) == set(plain_state(policy))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        gap = (plain(ids).logits - policy(ids).logits).abs().max()
        base = (plain(ids).logits - model()(ids).logits).abs().max()
    assert gap < 1e-5 < 1e-2 < base
    assert not list(tmp_path.glob("*.part"))


def test_rollouts_are_joined_and_checked():
    one = Rollouts([[3]], [[4, 5]], [True], logp=[[-0.5, -1.0]], mask=[[True, False]])
    two = Rollouts([[6]], [[7]], [False], logp=[[-0.1]])
    both = joined([one, two])
    assert both.completion_ids == [[4, 5], [7]] and both.logp == [[-0.5, -1.0], [-0.1]]
    assert both.mask is None and one.lengths == [1] and both.lengths == [2, 1]
    with pytest.raises(ValueError, match=r"extras\['x'\]: expected 1 values"):
        Rollouts([[3]], [[4]], [True], extras={"x": [1, 2]})
