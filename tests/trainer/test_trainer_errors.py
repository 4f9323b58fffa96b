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
from grpo_fast.checks import ArgumentError


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_generations": 1}, "num_generations: expected an integer >= 2, got 1; a group needs"),
        (
            {"num_generations": 3},
            "num_generations: expected a divisor of the generation batch of 4",
        ),
        ({"num_generations": 2.0}, "num_generations: expected an integer >= 2, got 2.0"),
        ({"num_generations_eval": 0}, "num_generations_eval: expected an integer >= 1"),
        ({"num_iterations": 0}, "num_iterations: expected an integer >= 1"),
        ({"steps_per_generation": 0}, "steps_per_generation: expected an integer >= 1"),
        ({"generation_batch_size": 6}, "generation_batch_size: expected a multiple .* = 4, got 6"),
        (
            {"generation_batch_size": 8, "steps_per_generation": 4},
            "generation_batch_size: expected 16 with steps_per_generation = 4, got 8",
        ),
        ({"loss_type": "dappo"}, "loss_type: .*'dappo'; did you mean 'dapo'"),
        ({"importance_sampling_level": "seq"}, "importance_sampling_level: .*got 'seq'"),
        ({"kl_estimator": "k4"}, "kl_estimator: .*got 'k4'"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number > 0"),
        ({"beta": -0.1}, "beta: expected a finite number >= 0"),
        ({"delta": 1.1}, "delta: expected a finite number > 1.2"),
        ({"max_completion_length": 0}, "max_completion_length: expected an integer >= 1"),
        ({"top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k: expected an integer >= 0"),
        ({"min_p": 2}, r"min_p: expected a number in \[0, 1\]"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty: expected"),
        ({"scale_rewards": "groups"}, "scale_rewards: expected 'group', 'batch' or 'none'"),
        ({"sync_ref_model": True}, "sync_ref_model: expected False with beta = 0"),
        ({"beta": 0.1, "ref_model_mixup_alpha": 0}, r"ref_model_mixup_alpha: expected .*\(0, 1\]"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps: expected an integer >= 1"),
        (
            {"generation_kwargs": {"temperature": 2}},
            r"generation_kwargs: expected none of .*, got \['temperature'\]",
        ),
        ({"generation_kwargs": "[1]"}, "generation_kwargs: expected a dict or a JSON object"),
        ({"workspace_bytes": 0}, "workspace_bytes: expected an integer >= 1"),
        ({"num_completions_to_print": 0}, "num_completions_to_print: expected an integer >= 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: expected False"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint: expected False"),
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
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "expected fused_linear_cross_entropy False, got True",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_refuses(overrides, message, tmp_path):
    with pytest.raises(ArgumentError, match=message) as error:
        config(tmp_path / "out", **overrides)
    assert error.value.argument in overrides
    assert not (tmp_path / "out").exists()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def long_prompt(rows):
    rows[5]["prompt"] = "w1 " * 60
    return rows


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": None}, "train_dataset: expected a dataset, got None"),
        ({"train_dataset": []}, "train_dataset: expected at least one prompt, got none"),
        ({"train_dataset": Stream()}, "train_dataset: expected at least one prompt, got an empty"),
        ({"train_dataset": "gsm8k"}, "train_dataset: expected a map-style dataset .* got str"),
        (
            {"train_dataset": [{"question": "w1"}]},
            "train_dataset: expected a column 'prompt', got the columns question",
        ),
        ({"train_dataset": ["w1"]}, "train_dataset: expected rows that are dicts, got str"),
        (
            {"train_dataset": [{"prompt": ""}]},
            "at least one character, got an empty string in row 0",
        ),
        (
            {"train_dataset": [{"prompt": None}]},
            "a string or a list of messages, got None in row 0",
        ),
        (
            {"train_dataset": [{"prompt": "w1"}, {"prompt": 3}]},
            "a string or a list of messages, got 3 in row 1",
        ),
        (
            {"train_dataset": [{"prompt": "w1"}, {"promt": "w1"}]},
            "expected the columns of row 0, .* in row 1",
        ),
        (
            {"train_dataset": [{"prompt": [{"role": "user"}]}]},
            "messages with 'role' and 'content', got .* in row 0",
        ),
        (
            {"train_dataset": [{"prompt": "w1"}, {"prompt": [{"role": "user", "content": "w1"}]}]},
            "one kind, a string in row 0, got a list of messages in row 1",
        ),
        (
            {"train_dataset": long_prompt(dataset())},
            "at most 56 tokens, which max_completion_length leaves, got 60 in row 5",
        ),
        ({"eval_dataset": []}, "eval_dataset: expected at least one prompt"),
        (
            {"eval_dataset": {"a": dataset(), "b": [{"x": 1}]}},
            r"eval_dataset\['b'\]: expected a column 'prompt'",
        ),
        (
            {"max_completion_length": 64},
            "max_completion_length: expected less than the model's context of 64 tokens, got 64",
        ),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights"),
        ({"reward_weights": [float("nan")]}, "reward_weights"),
        ({"reward": []}, "reward_funcs: expected at least one reward"),
        ({"reward": lambda completions, answer: [0.0]}, "answer"),
        (
            {"beta": 0.1, "sync_ref_model": True, "peft_config": lora()},
            "sync_ref_model: expected False with an adapter",
        ),
        ({"policy": 3}, "model: expected a name, a path or a model, got int"),
        (
            {"model_init_kwargs": {"dtype": "float32"}},
            "model_init_kwargs: expected None with a model that is built",
        ),
        ({"processing_class": "gpt2"}, "processing_class: expected a tokenizer, got str"),
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
    with pytest.raises(ValueError, match="args: expected a GRPOConfig, got TrainingArguments"):
        GRPOTrainer(model(), count_w3, args, dataset(), processing_class=tokenizer())


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir: expected a folder .*/file is a file"):
        trainer(tmp_path / "file" / "out")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    # root may write where the mode says no, but nobody in /proc
    folder = Path("/proc") if os.geteuid() == 0 and Path("/proc/self").exists() else locked
    with pytest.raises(ValueError, match=f"output_dir: expected a folder .*{folder} takes no new"):
        trainer(folder / "out")


def test_more_than_one_gpu_in_one_process_is_refused(tmp_path):
    args = config(tmp_path)
    args._n_gpu = 2
    args.__dict__["_setup_devices"] = torch.device("cpu")
    with pytest.raises(ValueError, match="args: expected one GPU in a process, got 2 GPUs"):
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
