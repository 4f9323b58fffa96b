"""GRPOConfig has every option of the loss, and the trainer takes the advantages of its row."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_trainer import Recording, config, double, logprobs, relative, spread_reward, trainer

from grpo_fast import PRESETS, GRPOConfig, LossConfig
from grpo_fast.advantages.group import group_advantages
from grpo_fast.advantages.reward_weights import SCHEMES
from grpo_fast.advantages.table import advantages_of
from grpo_fast.checks import ArgumentError

LOSS_FIELDS = {field.name: field for field in dataclasses.fields(LossConfig)}
# a loss type that has the option, and a value that is not its default
OTHER = {
    "loss_type": ("grpo", "grpo"),
    "importance_sampling_level": ("grpo", "sequence"),
    "aggregation": ("grpo", "token_mean"),
    "epsilon": ("grpo", 0.1),
    "epsilon_high": ("grpo", 0.3),
    "delta": ("grpo", 4.0),
    "beta": ("grpo", 0.1),
    "kl_estimator": ("grpo", "k2"),
    "kl_gradient": ("grpo", "k2"),
    "use_bias_correction_kl": ("grpo", False),
    "entropy_coef": ("grpo", 0.01),
    "top_entropy_quantile": ("grpo", 0.2),
    "rollout_correction": ("grpo", "token_truncate"),
    "rollout_ratio_min": ("grpo", 0.5),
    "rollout_ratio_max": ("grpo", 2.0),
    "off_policy_mask_threshold": ("grpo", 0.5),
    "cispo_ratio_min": ("cispo", 0.1),
    "sapo_temperature_pos": ("sapo", 2.0),
    "sapo_temperature_neg": ("sapo", 3.0),
    "vespo_k_pos": ("vespo", 1.0),
    "vespo_lambda_pos": ("vespo", 1.5),
    "vespo_k_neg": ("vespo", 1.0),
    "vespo_lambda_neg": ("vespo", 1.5),
    "temperature": ("grpo", 0.8),
    "max_completion_length": ("grpo", 5),
}


def test_every_option_of_the_loss_is_one_of_the_trainer():
    offered = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    assert set(LOSS_FIELDS) - set(offered) == set()
    for name, field in LOSS_FIELDS.items():
        # the trainer always has a length: it samples that much
        if name != "max_completion_length":
            assert offered[name].default == field.default, name
    assert set(OTHER) == set(LOSS_FIELDS)
    for name in PRESETS:
        assert name in offered["loss_type"].metadata["help"]


@pytest.mark.parametrize("name", list(OTHER))
def test_every_option_reaches_the_loss(name, tmp_path):
    loss_type, value = OTHER[name]
    assert value != LOSS_FIELDS[name].default
    got = config(tmp_path, **{"loss_type": loss_type, name: value}).loss_config()
    length = {"max_completion_length": 8}
    assert got == LossConfig(**{**length, "loss_type": loss_type, name: value})


@pytest.mark.parametrize(
    ("overrides", "name", "options"),
    [
        *(
            ({"loss_type": loss_type}, "group", {"scale": "group"})
            for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "ppo", "reinforce")
        ),
        ({"loss_type": "gpg"}, "centered", {}),
        ({"loss_type": "rloo"}, "leave_one_out", {}),
        (
            {"loss_type": "reward_weighted"},
            "reward_weights",
            {"scheme": "softmax", "temperature": 1.0, "keep": 1},
        ),
        # the division of the group's advantages, under TRL's name
        ({"scale_rewards": "batch"}, "group", {"scale": "batch"}),
        ({"scale_rewards": False}, "centered", {}),
        ({"loss_type": "dr_grpo", "scale_rewards": False}, "centered", {}),
        ({"loss_type": "ppo", "scale_rewards": "none"}, "centered", {}),
        ({"loss_type": "gpg", "scale_rewards": True}, "group", {"scale": "group"}),
        ({"loss_type": "rloo", "scale_rewards": "none"}, "leave_one_out", {}),
        # another estimator than the loss type's own
        ({"advantage_estimator": "leave_one_out"}, "leave_one_out", {}),
        (
            {"loss_type": "dr_grpo", "advantage_estimator": "centered", "scale_rewards": "none"},
            "centered",
            {},
        ),
        (
            {"loss_type": "rloo", "advantage_estimator": "group", "scale_rewards": "batch"},
            "group",
            {"scale": "batch"},
        ),
        (
            {"advantage_estimator": "reward_weights", "reward_weight_scheme": "rank"},
            "reward_weights",
            {"scheme": "rank", "temperature": 1.0, "keep": 1},
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_which_advantages(overrides, name, options, tmp_path):
    args = config(tmp_path, **overrides)
    assert args.estimator == (name, options)
    # a copy of finished arguments keeps what was asked for, not what came of it
    again = dataclasses.replace(args, loss_type="rloo", scale_rewards=None)
    if args.advantage_estimator is None and name != "reward_weights":
        assert again.estimator == ("leave_one_out", {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"advantage_estimator": "leave_one"},
            "advantage_estimator: .*'leave_one'; did you mean 'leave_one_out'",
        ),
        ({"advantage_estimator": "given"}, "advantage_estimator: .* got 'given'; it stands for"),
        (
            {"loss_type": "rloo", "scale_rewards": "group"},
            "scale_rewards: expected None or 'none' with the leave_one_out advantages of "
            "loss_type = 'rloo', got 'group'",
        ),
        (
            {"advantage_estimator": "group", "scale_rewards": False},
            "scale_rewards: expected None or 'group' or 'batch' with the group advantages of "
            "advantage_estimator = 'group', got 'none'",
        ),
        (
            {"loss_type": "dr_grpo", "advantage_estimator": "centered", "scale_rewards": "batch"},
            "scale_rewards: expected None or 'none' with the centered .* got 'batch'",
        ),
        (
            {"reward_weight_scheme": "rank"},
            "reward_weight_scheme: expected 'softmax' with the group advantages of .* got 'rank'",
        ),
        ({"reward_weight_temperature": 2.0}, "reward_weight_temperature: expected 1.0 with"),
        ({"loss_type": "rloo", "reward_weight_keep": 2}, "reward_weight_keep: expected 1 with"),
        (
            {"loss_type": "reward_weighted", "reward_weight_scheme": "ranks"},
            "reward_weight_scheme: .*'ranks'; did you mean 'rank'",
        ),
        (
            {"loss_type": "reward_weighted", "reward_weight_temperature": 0},
            "reward_weight_temperature: expected a finite number > 0, got 0",
        ),
        (
            {"loss_type": "reward_weighted", "reward_weight_keep": 2},
            "reward_weight_keep: expected 1 with the scheme 'softmax', since only 'rejection'",
        ),
        (
            {
                "loss_type": "reward_weighted",
                "reward_weight_scheme": "rejection",
                "reward_weight_keep": 5,
            },
            "reward_weight_keep: expected at most num_generations = 4, got 5",
        ),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile: expected a finite number > 0"),
        ({"aggregation": "mean"}, "aggregation: .*got 'mean'"),
        ({"kl_gradient": "k4"}, "kl_gradient: .*got 'k4'"),
    ],
)
def test_config_refuses(overrides, message, tmp_path):
    with pytest.raises(ArgumentError, match=message) as error:
        config(tmp_path, **overrides)
    assert error.value.argument in overrides


def one_step(folder, **overrides):
    run = trainer(folder, cls=Recording, reward=spread_reward, max_steps=1, **overrides)
    run.train()
    rollouts, advantages, _ = run.windows[0]
    texts = run.processing_class.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
    rewards = torch.tensor(spread_reward(texts)).view(-1, run.args.num_generations)
    return run, rewards, advantages.view_as(rewards)


STEPS = [
    *({"loss_type": name} for name in ("rloo", "gpg", "ppo", "reinforce", "grpo", "dapo")),
    *({"loss_type": "reward_weighted", "reward_weight_scheme": scheme} for scheme in SCHEMES),
]


@pytest.mark.parametrize("overrides", STEPS, ids=lambda o: "-".join(o.values()))
def test_one_step(overrides, tmp_path):
    run, rewards, advantages = one_step(tmp_path, **overrides)
    own = PRESETS[run.args.loss_type].advantage
    options = {"scheme": overrides["reward_weight_scheme"]} if own == "reward_weights" else {}
    expected = advantages_of("group" if own == "given" else own, rewards, **options)
    assert torch.equal(advantages, expected) and advantages.any()
    (row,) = (row for row in run.state.log_history if "loss" in row)
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    gradients = run.steps[0]["gradients"].values()
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("overrides", STEPS[:4] + STEPS[6:], ids=lambda o: "-".join(o.values()))
def test_the_first_step_has_the_gradient_of_its_formula(overrides, tmp_path):
    """-sum_i A_i log pi(y_i | x) over the number of completions or tokens, in float64: on the
    sampling policy the ratio is 1, and that of a whole completion has the gradient of its sum."""
    settings = {"max_completion_length": 20, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    run, _, advantages = one_step(tmp_path, **settings, **overrides)
    rollouts, _, start = run.windows[0]
    policy, total = double(start), torch.zeros((), dtype=torch.float64)
    for prompt, ids, advantage in zip(
        rollouts.prompt_ids, rollouts.completion_ids, advantages.flatten().double(), strict=True
    ):
        total = total - advantage * logprobs(policy, prompt, ids, 1.0).sum()
    per_token = run.args.loss_type in ("gpg", "ppo")
    assert len({len(ids) for ids in rollouts.completion_ids}) > 1
    total = total / (sum(map(len, rollouts.completion_ids)) if per_token else advantages.numel())
    total.backward()
    reference = {name: p.grad for name, p in policy.named_parameters()}
    assert relative(run.steps[0]["gradients"], reference) < 5e-5
    # without a ratio the value is that of the formula too
    if not PRESETS[run.args.loss_type].levels:
        assert sum(run.steps[0]["losses"]) == pytest.approx(total.item(), rel=2e-5, abs=1e-6)


def test_the_default_is_the_advantage_of_trl(tmp_path):
    _, rewards, advantages = one_step(tmp_path, loss_type="dr_grpo")
    assert torch.equal(advantages, group_advantages(rewards, "group"))
    _, rewards, advantages = one_step(tmp_path, loss_type="dr_grpo", scale_rewards=False)
    assert torch.equal(advantages, rewards - rewards.mean(1, keepdim=True))
