"""Bad input of the trainer: a ValueError that names it, before any work, with nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_trainer import config, count_w3, dataset, model, tokenizer, trainer
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from grpo_fast import GRPOTrainer


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_generations": 1}, r"num_generations must be an integer >= 2 \(a group needs"),
        ({"num_generations": 3}, "num_generations = 3 must divide the generation batch of 4"),
        ({"num_generations": 2.0}, "num_generations must be an integer >= 2"),
        ({"num_generations_eval": 0}, "num_generations_eval must be an integer >= 1"),
        ({"num_iterations": 0}, "num_iterations must be an integer >= 1"),
        ({"steps_per_generation": 0}, "steps_per_generation must be an integer >= 1"),
        ({"generation_batch_size": 6}, "generation_batch_size must be a multiple .* = 4, got 6"),
        (
            {"generation_batch_size": 8, "steps_per_generation": 4},
            "generation_batch_size and steps_per_generation exclude each other, got 8 and 4",
        ),
        ({"loss_type": "dappo"}, "loss_type: .*'dappo'; did you mean 'dapo'"),
        ({"importance_sampling_level": "seq"}, "importance_sampling_level: got 'seq'"),
        ({"kl_estimator": "k4"}, "kl_estimator: got 'k4'"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number > 0"),
        ({"beta": -0.1}, "beta: expected a finite number >= 0"),
        ({"delta": 1.1}, "delta: expected a finite number > 1.2"),
        ({"max_completion_length": 0}, "max_completion_length must be an integer >= 1"),
        ({"top_p": 1.5}, r"top_p must be a number in \(0, 1\], got 1.5"),
        ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"min_p": 2}, r"min_p must be a number in \[0, 1\]"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be"),
        ({"scale_rewards": "groups"}, "scale_rewards must be 'group', 'batch' or 'none'"),
        ({"sync_ref_model": True}, "sync_ref_model: beta is 0"),
        ({"beta": 0.1, "ref_model_mixup_alpha": 0}, r"ref_model_mixup_alpha must be .*\(0, 1\]"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be an integer >= 1"),
        ({"generation_kwargs": {"temperature": 2}}, "generation_kwargs: temperature belong"),
        ({"generation_kwargs": "[1]"}, "generation_kwargs must be a dict or a JSON object"),
        (
            {"generation_kwargs": {"topk": 1}},
            "generation_kwargs: expected fields of .*, got 'topk'; did you mean 'top_k'",
        ),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number >= 0, got inf"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number >= 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number >= 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0, .* entropy_coef"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: expected None, got 5.0"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: .* shuffle_dataset"),
        ({"workspace_bytes": 0}, "workspace_bytes must be an integer >= 1"),
        ({"num_completions_to_print": 0}, "num_completions_to_print must be an integer >= 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint must be False"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "fused_linear_cross_entropy must be False",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_refuses(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path / "out", **overrides)
    assert not (tmp_path / "out").exists()


class Stream(IterableDataset):
    def __iter__(self):
        yield from dataset()


def long_prompt(rows):
    rows[5]["prompt"] = "w1 " * 60
    return rows


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": None}, "train_dataset: expected a dataset, got None"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"train_dataset": Stream()}, "train_dataset must be a map-style dataset .* got Stream"),
        ({"train_dataset": "gsm8k"}, "train_dataset must be a map-style dataset .* got str"),
        (
            {"train_dataset": [{"question": "w1"}]},
            "has no column 'prompt'; its columns are question",
        ),
        ({"train_dataset": ["w1"]}, "train_dataset: rows must be dicts, got str"),
        ({"train_dataset": [{"prompt": ""}]}, "train_dataset: prompt of row 0 is an empty string"),
        ({"train_dataset": [{"prompt": None}]}, "prompt of row 0 must be a string or a list"),
        ({"train_dataset": [{"prompt": "w1"}, {"prompt": 3}]}, "prompt of row 1 must be a string"),
        (
            {"train_dataset": [{"prompt": "w1"}, {"promt": "w1"}]},
            "row 1 must have the columns of row 0",
        ),
        ({"train_dataset": [{"prompt": [{"role": "user"}]}]}, "row 0 has a message without"),
        (
            {"train_dataset": [{"prompt": "w1"}, {"prompt": [{"role": "user", "content": "w1"}]}]},
            "prompt of row 1 is of another kind than row 0",
        ),
        (
            {"train_dataset": long_prompt(dataset())},
            "prompt of row 5 has 60 tokens, but the context leaves room for 56",
        ),
        ({"eval_dataset": []}, "eval_dataset is empty"),
        (
            {"eval_dataset": {"a": dataset(), "b": [{"x": 1}]}},
            r"eval_dataset\['b'\] has no column 'prompt'",
        ),
        (
            {"max_completion_length": 64},
            "max_completion_length = 64 leaves no room .* of 64 tokens",
        ),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights"),
        ({"reward_weights": [float("nan")]}, "reward_weights"),
        ({"reward": []}, "reward_funcs: expected at least one reward"),
        ({"reward": lambda completions, answer: [0.0]}, "answer"),
        (
            {"beta": 0.1, "sync_ref_model": True, "peft_config": lora()},
            "sync_ref_model: the reference of an adapter",
        ),
        ({"policy": 3}, "model must be a name, a path or a model, got int"),
        ({"model_init_kwargs": {"dtype": "float32"}}, "model_init_kwargs: model is built already"),
        ({"processing_class": "gpt2"}, "processing_class must be a tokenizer, got str"),
        ({"processing_class": None}, "processing_class: expected a tokenizer"),
        ({"eval_strategy": "steps"}, "eval_dataset"),
    ],
)
def test_trainer_refuses_before_any_work(given, message, tmp_path):
    calls = []

    class Counting(GRPOTrainer):
        def generate(self, *args):
            calls.append(args)

    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "out", **{"cls": Counting, **given}).train()
    assert not calls and not (tmp_path / "out").exists()


def test_arguments_of_another_class_are_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="args must be a GRPOConfig, got TrainingArguments"):
        GRPOTrainer(model(), count_w3, args, dataset(), processing_class=tokenizer())


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir: cannot write .*/file is not a folder"):
        trainer(tmp_path / "file" / "out")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    # root may write where the mode says no, but nobody in /proc
    folder = Path("/proc") if os.geteuid() == 0 and Path("/proc/self").exists() else locked
    with pytest.raises(ValueError, match=f"output_dir: cannot write .*{folder} takes no new"):
        trainer(folder / "out")


def test_more_than_one_gpu_in_one_process_is_refused(tmp_path):
    args = config(tmp_path)
    args._n_gpu = 2
    args.__dict__["_setup_devices"] = torch.device("cpu")
    with pytest.raises(ValueError, match="nn.DataParallel over 2 GPUs is not supported"):
        GRPOTrainer(model(), count_w3, args, dataset(), processing_class=tokenizer())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, **_: 1 / 0, "ZeroDivisionError"),
        (lambda completions, **_: [1.0], "1"),
        (lambda completions, **_: [float("nan")] * len(completions), "nan"),
        (lambda completions, **_: [float("inf")] * len(completions), "inf"),
        (lambda completions, **_: ["good"] * len(completions), "good"),
    ],
)
def test_a_broken_reward_stops_the_run_and_is_named(reward, message, tmp_path):
    reward.__name__ = "broken_reward"
    run = trainer(tmp_path, reward=reward)
    before = [p.clone() for p in run.model.parameters()]
    with pytest.raises(ValueError, match="broken_reward") as error:
        run.train()
    assert message in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_finished_config_can_be_copied(tmp_path):
    import dataclasses

    first = config(tmp_path, gradient_accumulation_steps=2)
    again = dataclasses.replace(first, beta=0.1)
    assert (again.steps_per_generation, again.generation_batch_size) == (2, 8)
    assert again.loss_config().beta == 0.1
