"""GRPOTrainer: it learns, and each of its options does what it says."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from tiny_trainer import (
    WORDS,
    Recording,
    count_w3,
    dataset,
    model,
    relative,
    spread_reward,
    tokenizer,
    trainer,
)

from grpo_fast import GRPOTrainer
from grpo_fast.models.head import evaluating
from grpo_fast.models.packing import completion_logprobs
from grpo_fast.trainer.sampler import WindowSampler


def test_reward_rises_on_a_task_that_can_be_learnt(tmp_path):
    run = trainer(
        tmp_path,
        per_device_train_batch_size=16,
        num_generations=8,
        max_steps=40,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
    )
    run.train()
    rewards = [row["reward"] for row in run.state.log_history if "reward" in row]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert first < 0.3 and last > 0.8, rewards


def test_ratios_leave_one_only_when_a_window_outlives_its_step(tmp_path):
    once = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    once.train()
    assert once.args.on_policy and once.window.micro_batches[0].old_logp is None
    assert not any(key.startswith("ratio") for row in once.state.log_history for key in row)
    twice = trainer(tmp_path, num_iterations=2, max_steps=2, reward=spread_reward)
    twice.train()
    assert not twice.args.on_policy and twice.window.micro_batches[0].old_logp is not None
    first, second = (row for row in twice.state.log_history if "loss" in row)
    assert first["ratio/min"] == pytest.approx(1, abs=1e-5) == first["ratio/max"]
    assert second["ratio/min"] < 0.99 and second["ratio/max"] > 1.01
    assert "reward" in first and "reward" not in second


def test_adapter_trains_alone_and_the_base_is_its_reference(tmp_path):
    from peft import LoraConfig

    policy = model()
    before = copy.deepcopy(policy.state_dict())
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    run = trainer(
        tmp_path, policy=policy, peft_config=adapter, beta=0.1, reward=spread_reward, max_steps=3
    )
    run.train()
    losses = [row for row in run.state.log_history if "loss" in row]
    assert losses[0]["kl"] == pytest.approx(0, abs=1e-6) and losses[-1]["kl"] > 1e-6
    base = run.model.get_base_model().state_dict()
    for name, value in before.items():
        kept = base.get(name, base.get(name.replace("proj.", "proj.base_layer.")))
        assert torch.equal(kept, value), name
    adapted = [p for n, p in run.model.named_parameters() if "lora_B" in n]
    assert adapted and all(p.abs().max() > 0 for p in adapted)


def test_reference_moves_by_its_share_at_its_steps(tmp_path):
    run = trainer(
        tmp_path,
        beta=0.1,
        reward=spread_reward,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.25,
        max_steps=3,
        cls=Recording,
    )
    run.train()
    start, after = run.steps[0]["weights"], run.steps[2]["weights"]
    for name, value in run.reference.state_dict().items():
        torch.testing.assert_close(value, start[name] * 0.75 + after[name] * 0.25)
    assert trainer(tmp_path).reference is None


def first_gradients(folder, **overrides):
    run = trainer(folder, cls=Recording, reward=spread_reward, max_steps=1, **overrides)
    run.train()
    return run.steps[0]["gradients"]


def test_checkpointed_activations_give_the_same_gradient(tmp_path):
    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    plain = first_gradients(tmp_path)
    assert relative(first_gradients(tmp_path, gradient_checkpointing=True, **kwargs), plain) < 1e-6


def test_disable_dropout_reaches_attention_too(tmp_path):
    plain = first_gradients(tmp_path)
    noisy = first_gradients(tmp_path, policy=model(attention_dropout=0.3))
    quiet = first_gradients(tmp_path, policy=model(attention_dropout=0.3), disable_dropout=True)
    assert relative(noisy, plain) > 1e-2 and relative(quiet, plain) == 0


def test_old_and_reference_logprobs_are_without_dropout(tmp_path):
    policy = model(attention_dropout=0.5)
    settings = {"num_iterations": 2, "beta": 0.1, "learning_rate": 0.0, "max_steps": 3}
    run = trainer(tmp_path, policy=policy, reward=spread_reward, **settings)
    run.train()
    assert run.model.training
    micro = run.window.micro_batches[0]
    with evaluating(run.model), torch.no_grad():
        expected = completion_logprobs(run.model, micro.packed, 1.0)
    assert torch.equal(micro.old_logp, expected) and torch.equal(micro.ref_logp, expected)


def test_messages_go_through_the_template_and_come_back_as_messages(tmp_path):
    seen = {}

    def reward(prompts, completions, target, **_):
        seen.update(prompts=prompts, completions=completions, target=target)
        return [1.0] * len(prompts)

    rows = [{"prompt": [{"role": "user", "content": f"w{i} w9"}], "target": i} for i in range(2, 6)]
    run = trainer(tmp_path, reward=reward, train_dataset=rows, max_steps=1, cls=Recording)
    run.train()
    first = seen["prompts"][0][0]["content"]
    expected = tokenizer()(f"w0 {first} w1")["input_ids"]
    assert run.windows[0][0].prompt_ids[0] == expected
    assert [m["role"] for c in seen["completions"] for m in c] == ["assistant"] * 4
    assert seen["target"] == [int(first.split()[0][1:])] * 4
    answer = run.encode([{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}])
    assert tokenizer().decode(answer) == "w0 w5 w1 w6"


def test_evaluation_measures_every_prompt_and_changes_nothing(tmp_path):
    seen = []

    def reward(prompts, completions, **_):
        seen.extend(prompts)
        return [float(len(c.split())) for c in completions]

    run = trainer(
        tmp_path,
        reward=reward,
        eval_dataset=dataset(5),
        num_generations_eval=3,
        per_device_eval_batch_size=6,
        beta=0.1,
    )
    before = copy.deepcopy(run.model.state_dict())
    metrics = run.evaluate()
    assert seen == [row["prompt"] for row in dataset(5) for _ in range(3)]
    assert all(torch.equal(before[n], v) for n, v in run.model.state_dict().items())
    assert metrics["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert {"eval_reward", "eval_loss", "eval_entropy", "eval_rewards/reward/std"} <= set(metrics)
    assert metrics["eval_completions/mean_length"] >= metrics["eval_reward"]
    assert run.metrics.host == {}


def test_a_stage_can_be_replaced(tmp_path):
    class Reinforce(GRPOTrainer):
        def advantages(self, rewards, num_generations):
            total = rewards.sum(1).view(-1, num_generations)
            return torch.ones(total.numel()), total

    run = trainer(tmp_path, cls=Reinforce, max_steps=1)
    run.train()
    assert torch.equal(run.window.micro_batches[0].advantages, torch.ones(4))


def test_scales_of_the_advantages_and_weights_of_the_rewards(tmp_path):
    def half(completions, **_):
        return [None if i % 4 == 0 else 0.5 * i for i, _ in enumerate(completions)]

    rewards = torch.tensor([[1.0, float("nan")], [0.0, 0.5], [3.0, 1.0], [2.0, 1.5]])
    total = torch.tensor([2.0, -0.5, 5.0, 2.5])
    centred = total - total.mean()
    for scale, expected in (("group", centred / (total.std() + 1e-4)), ("none", centred)):
        both = {"reward": [count_w3, half], "reward_weights": [2.0, -1.0]}
        run = trainer(tmp_path, scale_rewards=scale, **both)
        got, weighted = run.advantages(rewards, 4)
        torch.testing.assert_close(weighted, total[None])
        torch.testing.assert_close(got, expected)


def test_unscorable_completions_do_not_train(tmp_path):
    def nothing(completions, **_):
        return [None] * len(completions)

    run = trainer(tmp_path, reward=nothing, cls=Recording)
    run.train()
    assert all(gradient.abs().max() == 0 for gradient in run.steps[0]["gradients"].values())
    assert run.state.log_history[0]["active_rows"] == 0


def test_generation_config_is_ours_and_not_the_checkpoints(tmp_path):
    policy = model()
    policy.generation_config.top_k = 1
    run = trainer(tmp_path, policy=policy, cls=Recording, max_completion_length=6, max_steps=1)
    run.train()
    ids = run.windows[0][0].completion_ids
    assert len({tuple(c) for c in ids}) > 1 and max(map(len, ids)) <= 6


@pytest.mark.parametrize("shuffle", [True, False])
def test_sampler_covers_every_prompt_and_repeats_each_window(shuffle):
    sampler = WindowSampler(5, 2, 3, uses=4, seed=7, shuffle=shuffle)
    order = list(sampler)
    assert len(order) == len(sampler) == 3 * 4 * 2 * 3
    windows = [order[i : i + 24] for i in range(0, len(order), 24)]
    for window in windows:
        assert window == window[:6] * 4 and window[:3] == [window[0]] * 3
    first = [window[i] for window in windows for i in (0, 3)]
    assert sorted(first[:5]) == [0, 1, 2, 3, 4] and first[5] == first[0]
    random.seed(1)
    torch.manual_seed(1)
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert (list(sampler) != order) == shuffle


def test_epochs_have_their_own_order_and_batches_match_the_prompts(tmp_path):
    seen = []

    def reward(prompts, **_):
        seen.append(prompts[0])
        return [0.0] * len(prompts)

    run = trainer(tmp_path, reward=reward, train_dataset=dataset(6), max_steps=12)
    run.train()
    prompts = sorted(row["prompt"] for row in dataset(6))
    assert sorted(seen[:6]) == sorted(seen[6:]) == prompts and seen[:6] != seen[6:]


@pytest.mark.parametrize("messages", [False, True])
def test_a_datasets_dataset_trains_and_evaluates(messages, tmp_path):
    from datasets import Dataset

    rows = dataset(6)
    for row in rows if messages else []:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    data = Dataset.from_list(rows)

    def reward(prompts, completions, target, **_):
        assert target == [rows[[r["prompt"] for r in rows].index(p)]["target"] for p in prompts]
        return [0.0] * len(prompts)

    run = trainer(tmp_path, reward=reward, train_dataset=data, eval_dataset={"held": data})
    run.train()
    assert "eval_held_reward" in run.evaluate()


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [{}, {"num_iterations": 2, "beta": 0.04}])
def test_it_learns_on_a_gpu_in_bf16(overrides, tmp_path):
    settings = {"use_cpu": False, "bf16": None, "learning_rate": 5e-3, "max_steps": 40}
    settings |= {"per_device_train_batch_size": 16, "num_generations": 8}
    run = trainer(tmp_path, lr_scheduler_type="constant", **settings, **overrides)
    run.train()
    assert run.args.bf16 and run.model.device.type == "cuda"
    rows = run.state.log_history
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3, rewards
    assert all(abs(row["ratio/mean"] - 1) < 0.2 for row in rows if "ratio/mean" in row)
    assert all(row["nonfinite_tokens"] == 0 for row in rows if "nonfinite_tokens" in row)


def test_words_are_known():
    """The toy tokenizer must not map the prompts to one unknown token."""
    assert len(set(tokenizer()(" ".join(WORDS))["input_ids"])) == len(WORDS)
