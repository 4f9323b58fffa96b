"""GRPOTrainer against a float64 reference, and what each of its options does."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from tiny_trainer import WORDS, count_w3, dataset, model, tokenizer, trainer
from transformers import TrainerCallback

from grpo_fast import GRPOTrainer
from grpo_fast.sampler import WindowSampler

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


class Recording(GRPOTrainer):
    """Keeps the rollouts of every window, and weights, gradients and losses of every step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.windows, self.steps = [], []
        trainer = self

        class Record(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                weights = copy.deepcopy(trainer.model.state_dict())
                trainer.steps.append({"weights": weights, "losses": []})

            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                named = trainer.model.named_parameters()
                gradients = {n: p.grad.clone() for n, p in named if p.requires_grad}
                trainer.steps[-1]["gradients"] = gradients

        self.add_callback(Record())

    def batch(self, rollouts, advantages, evaluate=False):
        if not evaluate:
            weights = copy.deepcopy(self.model.state_dict())
            self.windows.append((rollouts, advantages.clone(), weights))
        return super().batch(rollouts, advantages, evaluate)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.steps[-1]["losses"].append(loss.item())
        return loss


def logprobs(policy, prompt, completion, temperature):
    """log p of each completion token, one sequence at a time, through the model's own logits."""
    logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def double(weights):
    policy = model().double()
    policy.load_state_dict({k: v.double() for k, v in weights.items()})
    return policy.eval()


def reference_step(run, number):
    """(loss, gradients) of an optimizer step in float64, written from the formulas of the
    papers."""
    args, uses = run.args, run.args.steps_per_generation * run.args.num_iterations
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    policy, start = double(run.steps[number]["weights"]), double(run.windows[0][2])
    micros = []
    for micro_step in range(number * accumulation, (number + 1) * accumulation):
        rollouts, advantages, weights = run.windows[micro_step // uses]
        first = micro_step % args.steps_per_generation * size
        old = double(weights)
        micros.append([(rollouts, advantages, old, i) for i in range(first, first + size)])
    kept = [[not (args.mask_truncated_completions and r.truncated[i]) for r, _, _, i in m] for m in
    micros]
    lengths = [[len(r.completion_ids[i]) for r, _, _, i in m] for m in micros]
    tokens = [sum(n for n, k in zip(*pair, strict=True) if k) for pair in zip(lengths, kept,
    strict=True)]
        total
            =
                torch.zeros((),
                    dtype=torch.float64)
                    for
                    m,
                        micro
                            in
                                enumerate(micros):
                                    for
                                        (rollouts, advantages, old,
                                            i), keep
                                                in
                                                    zip(micro,
                                                        kept[m],
                                                            strict=True):
                                                                if
                                                                    not keep:
                                                                        continue
            pair
            =
            rollouts.prompt_ids[i], rollouts.completion_ids[i], args.temperature
                logp
                =
                logprobs(policy, *pair)
                with torch.no_grad(): delta, ref = logp - logprobs(old, *pair),
                logprobs(start, *pair) - logp
            advantage = advantages[i].double()
            log_ratio = delta + logp - logp.detach()
            ratio = log_ratio.exp()
            if args.loss_type == "cispo":
                value = -ratio.detach().clamp(max=args.epsilon_high) * advantage * logp
            else:
                clipped = ratio.clamp(1 - args.epsilon, 1 + (args.epsilon_high or args.epsilon))
                value = -torch.minimum(ratio * advantage, clipped * advantage)
            gap = ref + logp.detach() - logp
            value = value + args.beta * ratio * (gap.exp() - gap - 1)
            total = total + {
                "grpo": lambda v: v.mean() / (accumulation * size),
                "bnpo": lambda v, m=m: v.sum() / tokens[m] / accumulation,
                "dr_grpo": lambda v: v.sum() / (accumulation * size * args.max_completion_length),
                "dapo": lambda v: v.sum() / sum(tokens),
                "cispo": lambda v: v.sum() / sum(tokens),
            }[args.loss_type](value)
    total.backward()
    return total.item(), {name: p.grad for name, p in policy.named_parameters()}


def spread_reward(completions, **_):
    """Different for almost every two completions, so that groups have a gradient."""
    return [float(sum(int(w[1:]) for w in c.split()) % 11) for c in completions]


def relative(a, b):
    gap = sum((a[n].double() - b[n].double()).square().sum() for n in b)
    return (gap / sum(b[n].double().square().sum() for n in b)).sqrt().item()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_step_has_the_loss_and_gradient_of_the_float64_reference(loss_type, tmp_path):
    """Uneven lengths, truncated ones masked, temperature, KL, and steps off the old policy."""
    run = trainer(
        tmp_path,
        cls=Recording,
        reward=spread_reward,
        loss_type=loss_type,
        epsilon_high=0.3,
        beta=0.1,
        temperature=0.8,
        max_completion_length=20,
        per_device_train_batch_size=4,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        num_iterations=2,
        mask_truncated_completions=True,
        max_grad_norm=0.0,
        max_steps=4,
        learning_rate=3e-3,
    )
    run.train()
    rollouts = run.windows[0][0]
    assert any(rollouts.truncated) and not all(rollouts.truncated)
    assert len({len(ids) for ids in rollouts.completion_ids}) > 2
    assert len(run.windows) == 1 and len(run.steps) == 4
    for number, step in enumerate(run.steps):
        loss, gradients = reference_step(run, number)
        assert sum(step["losses"]) == pytest.approx(loss, rel=2e-5, abs=2e-6)
        assert relative(step["gradients"], gradients) < 5e-5, number
    assert run.state.log_history[2]["clip_ratio/region_mean" if loss_type != "cispo" else "ratio/max"] > 0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_split_into_micro_batches_changes_nothing_but_bnpo(loss_type, tmp_path):
    def gradients(size, accumulation):
        run = trainer(
            tmp_path,
            cls=Recording,
            reward=spread_reward,
            loss_type=loss_type,
            epsilon_high=0.3,
            max_completion_length=20,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            max_steps=1,
        )
        run.train()
        return run.steps[0]["gradients"]

    whole = gradients(8, 1)
    for size, accumulation in ((4, 2), (1, 8)):
        gap = relative(gradients(size, accumulation), whole)
        assert gap < 1e-5 if loss_type != "bnpo" else gap > 1e-3, (size, accumulation)


def test_the_last_step_of_an_epoch_counts_the_micro_batches_it_has(tmp_path):
    """3 prompts, one for each micro-batch, accumulation 2: the second step has a single one."""
    run = trainer(
        tmp_path,
        cls=Recording,
        reward=spread_reward,
        loss_type="grpo",
        train_dataset=dataset(3),
        steps_per_generation=1,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        max_steps=2,
        temperature=0.8,
    )
    run.train()
    assert [len(step["losses"]) for step in run.steps] == [2, 1] and len(run.windows) == 3
    rollouts, advantages, weights = run.windows[2]
    policy = double(weights)
    total = 0.0
    for i, ids in enumerate(rollouts.completion_ids):
        logp = logprobs(policy, rollouts.prompt_ids[i], ids, 0.8)
        total = total - (logp - logp.detach()).exp().mean() * advantages[i].double() / 4
    total.backward()
    reference = {name: p.grad for name, p in policy.named_parameters()}
    assert relative(run.steps[1]["gradients"], reference) < 5e-5


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
    assert once.args.on_policy and once.window[0]["old_logp"] is None
    assert not any(key.startswith("ratio") for row in once.state.log_history for key in row)
    twice = trainer(tmp_path, num_iterations=2, max_steps=2, reward=spread_reward)
    twice.train()
    assert not twice.args.on_policy and twice.window[0]["old_logp"] is not None
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


@pytest.mark.parametrize("kind", ["gradient_checkpointing", "disable_dropout"])
def test_options_that_must_not_change_the_gradient(kind, tmp_path):
    def gradients(**overrides):
        policy = model(attention_dropout=0.3 if kind == "disable_dropout" else 0.0)
        run = trainer(tmp_path, policy=policy, cls=Recording, reward=spread_reward, max_steps=1,
        **overrides)
        run.train()
        return run.steps[0]["gradients"]

    plain = gradients()
    if kind == "disable_dropout":
        assert relative(plain, gradients(disable_dropout=True)) > 1e-2
        return
    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert relative(gradients(gradient_checkpointing=True, **kwargs), plain) < 1e-6


def test_messages_go_through_the_template_and_come_back_as_messages(tmp_path):
    seen = {}

    def reward(prompts, completions, target, **_):
        seen.update(prompts=prompts, completions=completions, target=target)
        return [1.0] * len(prompts)

    rows = [
        {"prompt": [{"role": "user", "content": f"w{i} w9"}], "target": i} for i in range(2, 6)
    ]
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
    assert torch.equal(run.window[0]["advantages"], torch.ones(4))


def test_scales_of_the_advantages_and_weights_of_the_rewards(tmp_path):
    def half(completions, **_):
        return [None if i % 4 == 0 else 0.5 * i for i, _ in enumerate(completions)]

    rewards = torch.tensor([[1.0, float("nan")], [0.0, 0.5], [3.0, 1.0], [2.0, 1.5]])
    total = torch.tensor([2.0, -0.5, 5.0, 2.5])
    centred = total - total.mean()
    for scale, expected in (("group", centred / (total.std() + 1e-4)), ("none", centred)):
        run = trainer(tmp_path, reward=[count_w3, half], reward_weights=[2.0, -1.0],
        scale_rewards=scale)
        got, weighted = run.advantages(rewards, 4)
        torch.testing.assert_close(weighted, total[None])
        torch.testing.assert_close(got, expected)


def test_unscorable_completions_do_not_train(tmp_path):
    run = trainer(tmp_path, reward=lambda completions, **_: [None] * len(completions),
    cls=Recording)
    run.train()
    assert all(g.abs().max() == 0 for g in
    run.steps[0]["gradients"].values())
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


def test_words_are_known():
    """The toy tokenizer must not map the prompts to one unknown token."""
    assert len(set(tokenizer()(" ".join(WORDS))["input_ids"])) == len(WORDS)
