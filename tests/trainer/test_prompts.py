"""What tokenizers add to prompts, and what reward models and tables see of completions."""

import copy
import logging

import pytest
import torch
from tiny_trainer import VOCAB, checkpoint, count_w3, model, tokenizer, trainer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForSequenceClassification

from grpo_fast.models.loading import tokenizer_kwargs
from grpo_fast.rewards import RewardSet
from grpo_fast.rewards.model import RewardModel
from grpo_fast.rewards.render import Render
from grpo_fast.trainer.prompts import encode_prompt, texts_of

PAD, EOS, UNK = 0, 1, 2


def adding(template: str):
    """A tokenizer whose begin is <pad> and whose template has both ends or one of them."""
    built = tokenizer()
    built.bos_token = "<pad>"
    special = [("<pad>", PAD), ("<eos>", EOS)]
    built._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return built


@pytest.mark.parametrize(
    "template, prompt, expected",
    [
        ("$A", "w0 w1", [3, 4]),
        ("$A <eos>", "w0 w1", [3, 4]),
        ("$A <eos>", "w0 <eos>", [3, EOS]),
        ("$A", "w0 <eos>", [3, EOS]),
        ("$A <eos>", "w0 <eos> <eos>", [3, EOS, EOS]),
        ("<pad> $A", "w0", [PAD, 3]),
        ("<pad> $A", "<pad> w0", [PAD, 3]),
        ("<pad> $A <eos>", "<pad> w0", [PAD, 3]),
        ("$A", "<pad> <pad> w0", [PAD, PAD, 3]),
        ("$A <eos>", "<eos>", [EOS]),
    ],
)
def test_a_prompt_stays_open_and_begins_once(template, prompt, expected):
    assert encode_prompt(adding(template), prompt, {}) == expected


def test_a_run_samples_after_a_prompt_without_an_end(tmp_path):
    run = trainer(tmp_path, processing_class=adding("$A <eos>"), max_steps=1)
    seen = []
    batch = run.batch
    run.batch = lambda rollouts, *rest: seen.extend(rollouts.prompt_ids) or batch(rollouts, *rest)
    run.train()
    assert seen
    assert all(EOS not in ids for ids in seen)


def test_a_token_beyond_the_tokenizer_has_no_text_and_is_named_once(caplog, monkeypatch):
    known = tokenizer()
    logger = logging.getLogger("grpo_fast.trainer.prompts")
    said = []
    monkeypatch.setattr(
        logger, "warning_once", lambda text, *a: said.append(text % a), raising=False
    )
    assert texts_of(known, [[3, len(VOCAB) + 5, 4], [5]]) == ["w0 w1", "w2"]
    assert len(said) == 1
    assert f"token {len(VOCAB) + 5}" in said[0]
    assert texts_of(known, [[3, 4]]) == ["w0 w1"]
    assert len(said) == 1


def classifier(vocab: int = len(VOCAB)):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config).eval()


def test_a_begun_assistant_turn_is_read_once_by_a_reward_model():
    judge = RewardModel(classifier(), tokenizer())
    prompt = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    answer = [{"role": "assistant", "content": "w6 w7"}]
    for begun in (prompt, prompt[:1]):
        ids = Render()(judge.tokenizer, begun, answer)
        assert judge.tokenizer.decode(ids).split() == ["w0", "w5", "w1", "w6", "w7"]
    assert judge([prompt], [answer]) == judge([prompt[:1]], [answer])


def test_chat_template_kwargs_reach_a_reward_model():
    worded = tokenizer()
    worded.chat_template = "{{ style }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    given = {"chat_template_kwargs": {"style": "w9"}}
    rewards = RewardSet([classifier()], [worded], **given)
    judge, prompt = rewards.functions[0], [{"role": "user", "content": "w5"}]
    ids = Render()(worded, prompt, [], style="w9")
    assert worded.decode(ids).split() == ["w9", "w5"]
    worded.chat_template = "{% for m in messages %}{{ 'w9 ' + m['content'] }} {% endfor %}"
    plain = RewardModel(judge.model, worded)([prompt], [[]])
    worded.chat_template = "{{ style }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert judge([prompt], [[]]) == plain


def test_one_tokenizer_is_not_that_of_two_reward_models():
    with pytest.raises(ValueError, match="^reward_processing_classes: expected a list with"):
        RewardSet([classifier(), classifier()], tokenizer())
    RewardSet([classifier(), count_w3], tokenizer())
    RewardSet([classifier(), classifier()], [tokenizer(), tokenizer()])


def test_a_tokenizer_is_of_the_models_revision(monkeypatch, tmp_path):
    config = copy.deepcopy(model().config)
    assert tokenizer_kwargs(config, {"dtype": "float32"}) == {}
    config._commit_hash = "abc"
    assert tokenizer_kwargs(config, None) == {"revision": "abc"}
    given = {"revision": "v2", "trust_remote_code": True, "dtype": "float32"}
    assert tokenizer_kwargs(config, given) == {"revision": "v2", "trust_remote_code": True}


def test_revision_and_trust_reach_both_loaders(monkeypatch, tmp_path):
    """The keywords that the model and the tokenizer of a run are loaded with."""
    import grpo_fast.models.loading as loading

    folder, seen = checkpoint(tmp_path / "model"), {}
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        load = getattr(loading, name).from_pretrained

        def recording(*args, load=load, name=name, **kwargs):
            seen[name] = kwargs
            return load(*args, **kwargs)

        monkeypatch.setattr(getattr(loading, name), "from_pretrained", recording)
    options = {"model_init_kwargs": {"revision": "main"}, "trust_remote_code": True}
    trainer(tmp_path / "run", folder, processing_class=None, **options)
    for kwargs in seen.values():
        assert kwargs["revision"] == "main"
        assert kwargs["trust_remote_code"] is True
    assert len(seen) == 2
