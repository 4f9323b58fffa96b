"""RewardModelTrainer: losses, padding, the saved folder, resume, bad rows."""

import copy

import pytest
import tiny_trainer
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from grpo_fast import GRPOConfig, GRPOTrainer, RewardModelConfig, RewardModelTrainer
from grpo_fast.models.classifier import attach_rows, classifier_of, pack_texts, packed_scores
from grpo_fast.rewards.model import RewardModel
from grpo_fast.trainer.preferences import key_of, load_preferences, split_by_prompt

W = tiny_trainer.WORDS


def rows(count=24):
    """Sets of three: the more w3 an answer has, the better."""
    out = []
    for i in range(count):
        words = [W[(i + j) % 29] for j in range(3)]
        answers = [" " + " ".join(["w3"] * n + words[: 4 - n]) for n in (0, 1, 3)]
        out.append({"prompt": " ".join(words), "completions": answers, "scores": [0.0, 1.0, 3.0]})
    return out


def config(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "num_train_epochs": 3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "lr_scheduler_type": "constant",
    }
    return RewardModelConfig(**{**settings, **changes})


def trainer(folder, data=None, **changes):
    extra = {
        k: changes.pop(k) for k in ("callbacks", "peft_config", "eval_dataset") if k in changes
    }
    data = rows() if data is None else data
    model = changes.pop("model", None) or tiny_trainer.model()
    tokenizer = changes.pop("tokenizer", None) or tiny_trainer.tokenizer()
    args = config(folder, **changes)
    return RewardModelTrainer(model, args, data, processing_class=tokenizer, **extra)


def test_learns_and_the_folder_gives_the_same_numbers_everywhere(tmp_path):
    made = trainer(tmp_path, rows(90), validation_split=0.25, eval_strategy="epoch")
    made.train()
    made.save_model()
    logs = [r for r in made.state.log_history if "eval_accuracy" in r]
    assert logs[-1]["eval_accuracy"] > 0.9
    prompts = [row["prompt"] for row in rows(5)]
    completions = [row["completions"][i % 3] for i, row in enumerate(rows(5))]
    ours = made.score(prompts, completions)
    assert RewardModel(str(tmp_path))(prompts, completions) == ours
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
    )
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        assert plain(**batch).logits[:, 0].tolist() == ours
    assert set(plain.config.grpo_fast_scores) == {"mean", "std"}
    assert (tmp_path / "curves.png").is_file()
    policy = GRPOTrainer(
        tiny_trainer.model(),
        str(tmp_path),
        GRPOConfig(
            output_dir=str(tmp_path / "policy"),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            max_steps=1,
            report_to="none",
            use_cpu=True,
        ),
        tiny_trainer.dataset(4),
        processing_class=tiny_trainer.tokenizer(),
    )
    assert policy.train().global_step == 1


@pytest.mark.parametrize("padding", ["eos", "none", "added", "chat"])
def test_padding_that_ends_a_text(tmp_path, padding):
    """Every text ends with EOS: with pad = EOS transformers would read the token before it."""
    tokenizer = tiny_trainer.tokenizer()
    if padding == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    elif padding == "none":
        tokenizer.pad_token = None
    elif padding == "added":
        tokenizer.add_tokens(["<new>"])
    data = rows(8)
    for row in data:
        row["completions"] = [text + " <eos>" for text in row["completions"]]
        if padding == "chat":
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row["completions"] = [
                [{"role": "assistant", "content": text}] for text in row["completions"]
            ]
    made = trainer(tmp_path, data, tokenizer=tokenizer, max_steps=2)
    made.train()
    made.save_model()
    prompts = [row["prompt"] for row in data]
    completions = [row["completions"][i % 3] for i, row in enumerate(data)]
    ours = made.score(prompts, completions)
    assert RewardModel(str(tmp_path))(prompts, completions) == ours
    ids = [
        made.render(made.processing_class, p, c) for p, c in zip(prompts, completions, strict=True)
    ]
    with torch.no_grad():
        packed = packed_scores(made.model, pack_texts(ids, made.model, 0))
    torch.testing.assert_close(packed, torch.tensor(ours), atol=1e-5, rtol=1e-5)


def test_self_check_finds_a_padding_token_that_ends_texts(tmp_path):
    data = rows(8)
    for row in data:
        row["completions"] = [text + " <eos>" for text in row["completions"]]
    made = trainer(tmp_path, data)
    made.processing_class.pad_token = made.processing_class.eos_token
    with pytest.raises(ValueError, match="from transformers' forward, got a difference of"):
        made.save_model()


def test_first_loss_is_the_mean_over_sets(tmp_path):
    """Accumulation over uneven micro-batches divides by the sets of the step."""
    seen = []
    for size, steps in ((6, 1), (4, 2)):
        made = trainer(
            tmp_path / str(size),
            rows(6),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_steps=1,
            margin_scale=0.1,
        )
        made.train()
        seen.append(made.state.log_history[0])
    assert seen[0]["loss"] == pytest.approx(seen[1]["loss"], rel=1e-5)
    assert seen[0]["grad_norm"] == pytest.approx(seen[1]["grad_norm"], rel=1e-4)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("step", [1, 5, 7])
def test_resumed_run_is_bit_identical(tmp_path, step):
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    first = trainer(tmp_path / "cut", callbacks=[Stop(step)], **options)
    first.train()
    second = trainer(tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == whole.state.global_step
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    logs = [
        [
            {k: v for k, v in row.items() if "_per_second" not in k and "runtime" not in k}
            for row in h
        ]
        for h in (whole.state.log_history, second.state.log_history)
    ]
    assert logs[0][:-1] == logs[1][:-1]


def test_adapter_is_merged_and_checkpointing_changes_nothing(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    made = trainer(tmp_path, peft_config=lora, max_steps=2, gradient_checkpointing=True)
    made.train()
    made.save_model()
    prompts, completions = ["w1 w2"] * 3, [" w3", " w4 w5", " w3 w3"]
    loaded = RewardModel(str(tmp_path))(prompts, completions)
    assert loaded == pytest.approx(made.score(prompts, completions), abs=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1", "completions": ["w2", "w3"], "scores": [1, 1]}, "a preference among"),
        ({"prompt": "w1", "completions": ["w2"], "scores": [1]}, "at least two completions"),
        ({"prompt": "w1", "completions": ["w2", "w3"]}, "the columns prompt, chosen"),
        ({"prompt": "w1", "completions": ["w2", "w3"], "ranks": [1]}, "2, one for each completion"),
        ({"prompt": "w1", "chosen": "w2", "rejected": None}, "the columns"),
        ({"chosen": "w1 w2", "rejected": "w1 w3"}, "a column 'prompt' beside texts"),
        ({"prompt": "w1", "chosen": "w2", "rejected": [{"role": "a"}]}, "text, as the prompt is"),
        ({"prompt": "w1", "chosen": "w2", "rejected": "w3", "margin": float("nan")}, "finite"),
        ({"prompt": "w1", "completions": ["a", "b"], "scores": [1, None]}, "finite numbers"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"train_dataset\[1\].*" + message):
        trainer(tmp_path, [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}, row])


def test_ties_are_left_out_when_asked_for_and_long_texts_are_refused(tmp_path):
    tie = {"prompt": "w1", "completions": ["w2", "w3"], "scores": [1, 1]}
    made = trainer(tmp_path, [*rows(4), tie], drop_ties=True)
    assert made.dropped == 1 and len(made.train_dataset) == 4
    with pytest.raises(ValueError, match="set 0: completion: expected at most 3 tokens"):
        trainer(tmp_path, rows(4), max_length=3)
    assert all(
        len(ids) == 3
        for one in trainer(tmp_path, rows(4), max_length=3, truncate=True).train_dataset
        for ids in one.ids
    )


def test_split_is_by_prompt_and_files_are_read(tmp_path):
    import json

    data = [{"prompt": f"w{i % 5}", "chosen": "w1", "rejected": "w2"} for i in range(20)]
    kept, out = split_by_prompt(data, 0.4, 0)
    assert len(kept) + len(out) == 20 and out
    assert not {key_of(r["prompt"]) for r in kept} & {key_of(r["prompt"]) for r in out}
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, data)))
    assert load_preferences(str(file)) == data
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "pairs.parquet")
    assert load_preferences(str(tmp_path / "pairs.parquet")) == data
    file.write_text("[1]")
    with pytest.raises(ValueError, match="one JSON object in each line"):
        load_preferences(str(file))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Phi", "GPT2", "Mistral", "Qwen2"])
def test_packed_scores_equal_padded(family):
    from tiny import FAMILIES, tiny

    FAMILIES.setdefault(family, {})
    model = classifier_of(tiny(family)).eval()
    model.config.pad_token_id = 0
    attach_rows(model)
    texts = [[(7 * i + j) % 90 + 3 for j in range(4 + 3 * i)] for i in range(5)]
    with torch.no_grad():
        packed = packed_scores(model, pack_texts(texts, model, 0))
        width = max(map(len, texts))
        ids = torch.tensor([t + [0] * (width - len(t)) for t in texts])
        padded = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    assert copy.deepcopy(model)(input_ids=ids).logits.shape == (5, 1)
