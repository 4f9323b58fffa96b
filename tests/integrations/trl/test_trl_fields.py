"""TRL's GRPOConfig and constructor against ours, and the configurations that its docs show."""

import dataclasses

import pytest

pytest.importorskip("trl")

import trl_table
from datasets import Dataset
from tiny_trainer import count_w3, dataset, model, spread_reward, tokenizer

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.trainer.trl_options import HONOURED, OTHER_DEFAULTS, REFUSED, TRLOptions


def test_the_table_of_the_page_is_that_of_the_dataclass():
    page = trl_table.PAGE.read_text(encoding="utf-8")
    assert trl_table.BLOCK.search(page)[0].split("\n", 1)[1] == trl_table.table() + "<!-- end -->"


def test_every_field_is_declared_with_a_default_that_says_what_it_says():
    theirs = trl_table.fields_of_trl()
    ours = {f.name for f in dataclasses.fields(GRPOConfig)}
    assert set(theirs) <= ours
    # no row about a field that TRL has not, but for what older versions had
    assert set(REFUSED) | set(OTHER_DEFAULTS) | set(HONOURED) <= set(theirs) | {
        "gradient_checkpointing"
    }
    assert {f.name for f in dataclasses.fields(TRLOptions)} <= set(theirs)
    for name, (allowed, _) in REFUSED.items():
        assert theirs[name] in allowed


def config(folder, **options):
    small = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return GRPOConfig(output_dir=str(folder), **{**small, **options})


def test_all_of_trls_defaults_by_name(tmp_path):
    config(
        tmp_path,
        **{n: d for n, d in trl_table.fields_of_trl().items() if n != "bf16"}
        | {"num_generations": 4, "max_completion_length": 6},
    )


CHAT = [{"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}]} for i in range(8)]


async def later(completions, **_):
    return [float(len(c)) for c in completions]


def of_one_task(completions, **_):
    return [None if i % 2 else float(len(c)) for i, c in enumerate(completions)]


def with_logs(completions, log_extra, log_metric, **_):
    log_extra("length", [len(c) for c in completions])
    log_metric("lengths", 1.0)
    return [float(len(c)) for c in completions]


def words(completions, **_):
    return [float(len(c[0]["content"].split())) for c in completions]


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj"])


# name -> (options, arguments of the constructor)
RUN = {
    "quick start": ({}, {}),
    "grpo": ({"loss_type": "grpo", "beta": 0.04}, {}),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": False}, {}),
    "dapo": (
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
        {},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, {}),
    "sapo": ({"loss_type": "sapo", "sapo_temperature_neg": 1.1}, {}),
    "luspo": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, {}),
    "vespo": ({"loss_type": "vespo", "importance_sampling_level": "token"}, {}),
    "gspo": (
        {
            "importance_sampling_level": "sequence",
            "loss_type": "grpo",
            "beta": 0.0,
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 2,
        },
        {},
    ),
    "two-sided clipping": ({"delta": 4.0}, {}),
    "batch scale": ({"scale_rewards": "batch"}, {}),
    "no scale": ({"scale_rewards": "none"}, {}),
    "gdpo": (
        {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
        {"reward_funcs": [count_w3, spread_reward]},
    ),
    "high entropy tokens": ({"top_entropy_quantile": 0.2}, {}),
    "entropy bonus": ({"entropy_coef": 0.001}, {}),
    "adaptive entropy": ({"use_adaptive_entropy": True, "entropy_target": 0.3}, {}),
    "off-policy mask": ({"off_policy_mask_threshold": 0.5, "num_iterations": 2}, {}),
    "plain KL": ({"beta": 0.01, "use_bias_correction_kl": False}, {}),
    "moving reference": ({"beta": 0.01, "sync_ref_model": True, "ref_model_sync_steps": 1}, {}),
    "float32 head": ({"cast_lm_head_to_fp32": True}, {}),
    "sampling": ({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01}, {}),
    "chunks of sampling": ({"sampling_batch_size": 2}, {}),
    "conversations": (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reward_funcs": words, "train_dataset": Dataset.from_list(CHAT)},
    ),
    "async reward": ({}, {"reward_funcs": later}),
    "rewards of several tasks": ({}, {"reward_funcs": [of_one_task, count_w3]}),
    "extra logs": ({"log_completions": True}, {"reward_funcs": with_logs}),
    "adapter": ({}, {"peft_config": lora}),
    "checkpointed activations": ({"gradient_checkpointing": True}, {}),
    "stream": ({}, {"train_dataset": lambda: Dataset.from_list(dataset()).to_iterable_dataset()}),
    "evaluation": (
        {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2},
        {"eval_dataset": lambda: Dataset.from_list(dataset(2))},
    ),
}
# what its docs show and this trainer refuses: (options, arguments, what the sentence names)
NOT = {
    "cache": ({"cache_implementation": "static"}, {}, "cache_implementation"),
    "vllm beside": ({"use_vllm": True, "vllm_mode": "colocate"}, {}, "use_vllm"),
    "vllm server": ({"use_vllm": True, "vllm_mode": "server"}, {}, "use_vllm"),
    "continuous": ({"use_transformers_continuous_batching": True}, {}, "use_transformers_cont"),
    "tools": ({}, {"tools": [count_w3]}, "tools"),
    "environments": ({}, {"environment_factory": dict[str, int]}, "environment_factory"),
    "quantised": ({}, {"quantization_config": object()}, "quantization_config"),
}


def build(folder, options, given):
    kinds = {"train_dataset": lambda: Dataset.from_list(dataset()), **given}
    kinds.setdefault("reward_funcs", spread_reward)
    made = ("train_dataset", "eval_dataset", "peft_config")
    built = {n: v() if n in made and callable(v) else v for n, v in kinds.items()}
    parts = {"model": model(), "processing_class": tokenizer(), "args": config(folder, **options)}
    return GRPOTrainer(**parts, **built)


@pytest.mark.parametrize("name", RUN)
def test_a_documented_configuration_runs(tmp_path, name):
    run = build(tmp_path, *RUN[name])
    run.train()
    assert run.state.global_step == 1
    logged = set().union(*run.state.log_history)
    assert {"train_loss"} <= logged


@pytest.mark.parametrize("name", NOT)
def test_another_is_refused_in_one_sentence(tmp_path, name):
    options, given, named = NOT[name]
    with pytest.raises(ValueError, match=f"^{named}") as caught:
        build(tmp_path, options, given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250
