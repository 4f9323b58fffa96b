"""Where a critic may come from: what is continued, and refused before anything is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_ppo import config, trainer
from tiny_trainer import checkpoint, dataset, model, spread_reward, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from grpo_fast import PPOTrainer
from grpo_fast.trainer import grpo


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved policies with their critics, by the critic's kind."""
    made = {}
    for kind in ("shared", "separate"):
        folder = tmp_path_factory.mktemp(kind)
        run = trainer(folder, reward=spread_reward, critic=kind, max_steps=2)
        run.train()
        run.save_model()
        made[kind] = folder
    return made


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_a_saved_critic_is_continued(folders, tmp_path, kind):
    source = folders[kind] / "critic"
    facts = json.loads((source / "critic.json").read_text())
    assert facts["kind"] == kind and facts["width"] == 32
    first = trainer(tmp_path / "a", critic=kind, critic_model=str(source)).critic
    state = trainer(tmp_path / "b", critic=kind).critic.state_dict()
    assert first.head.weight.any() and not state["head.weight"].any()
    again = PPOTrainer(
        str(folders[kind]),
        spread_reward,
        config(tmp_path / "c", critic=kind, critic_model=str(source), max_steps=2),
        dataset(),
    )
    for name, value in first.state_dict().items():
        assert torch.equal(again.critic.state_dict()[name], value)
    again.train()
    assert not torch.equal(again.critic.head.weight, first.head.weight)


def wide(folder):
    """A policy of width 64, saved with its tokenizer."""
    settings = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**settings, max_position_embeddings=64)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def judge(folder, labels, words=0, **settings):
    """A reward model with its tokenizer."""
    shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForSequenceClassification(
        LlamaConfig(**{**shape, **settings}, num_labels=labels)
    ).save_pretrained(folder)
    own = tokenizer()
    own.add_tokens([f"v{i}" for i in range(words)])
    own.save_pretrained(folder)
    return str(folder)


def case(name, folders, tmp_path):
    """Policy, kind and source of a critic that is refused, and what the message says."""
    policy, saved = checkpoint(tmp_path / "policy"), {k: f / "critic" for k, f in folders.items()}
    if name == "width":
        return wide(tmp_path / "wide"), "shared", saved["shared"], "the 64 hidden states .* on 32"
    if name == "kind":
        return policy, "separate", saved["shared"], "of the kind 'separate'"
    if name == "other kind":
        return policy, "shared", saved["separate"], "of the kind 'shared'"
    if name == "saved tokenizer":
        return policy, "shared", saved["shared"], "the tokenizer of the policy"
    if name == "tokenizer":
        source = judge(tmp_path / "judge", 1, words=2, vocab_size=34)
        return policy, "separate", source, "the tokenizer of the policy"
    if name == "labels":
        return policy, "separate", judge(tmp_path / "judge", 2), "a reward model with one label"
    if name == "embedding":
        source = judge(tmp_path / "judge", 1, vocab_size=30)
        return policy, "separate", source, "an embedding for each of the 32 tokens"
    if name == "no tokenizer":
        model().save_pretrained(tmp_path / "bare")
        return policy, "separate", tmp_path / "bare", "a checkpoint with its tokenizer"
    return policy, "separate", tmp_path / "nowhere", "a checkpoint that can be read"


@pytest.mark.parametrize(
    "name",
    [
        "width",
        "kind",
        "other kind",
        "saved tokenizer",
        "tokenizer",
        "labels",
        "embedding",
        "no tokenizer",
        "missing",
    ],
)
def test_refused_before_anything_is_loaded(folders, tmp_path, monkeypatch, name):
    policy, kind, source, message = case(name, folders, tmp_path)
    words = tokenizer()
    if name == "saved tokenizer":
        words.add_tokens(["w99"])

    def loaded(*_):
        raise AssertionError("the policy was loaded")

    monkeypatch.setattr(grpo, "policy_of", loaded)
    args = config(tmp_path / "run", critic=kind, critic_model=str(source))
    with pytest.raises(ValueError, match=f"^critic_model: expected .*{message}"):
        PPOTrainer(policy, spread_reward, args, dataset(), processing_class=words)
    assert not (tmp_path / "run").exists()
