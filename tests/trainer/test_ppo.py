"""PPOTrainer: what it computes, what it saves, how it resumes, what it refuses, and that it
learns."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_ppo import RecordingPPO, config, equal, logged, trainer
from tiny_trainer import checkpoint, count_w3, dataset, model, tokenizer
from transformers import AutoModelForCausalLM

from grpo_fast import linear_policy_loss
from grpo_fast.advantages import gae, token_rewards
from grpo_fast.models.critic import without_critic
from grpo_fast.models.head import backbone, find_head
from grpo_fast.objective.value import value_loss


def first_window(run):
    """The micro-batch of the first window, its loss by the trainer, and the gradients of it."""
    caught = {}
    stage = run.loss

    def loss(wrapped, micro):
        found = stage(wrapped, micro)
        caught.setdefault("micro", micro)
        return found

    run.loss = loss
    run.train()
    return caught["micro"], run.steps[0]


def test_the_actor_of_the_first_step_to_the_bit(tmp_path):
    """The gradients of the policy, with a critic that keeps out of the backbone, are those of
    `linear_policy_loss` with the same advantages (N,)."""
    run = trainer(tmp_path, cls=RecordingPPO, value_detach=True, max_grad_norm=0.0, max_steps=1)
    micro, step = first_window(run)
    policy = model()
    policy.load_state_dict(without_critic(step["weights"]))
    packed = micro.packed
    hidden = packed.select(backbone(policy)(**packed.inputs())[0])
    assert micro.advantages.shape == packed.ids.shape
    loss, _ = linear_policy_loss(
        hidden,
        find_head(policy),
        packed.ids,
        micro.advantages,
        config=run.loss_config,
        cu_seqlens=packed.cu_seqlens,
        old_logp=micro.old_logp,
        ref_logp=micro.ref_logp,
        denominator=micro.denominator,
    )
    loss.backward()
    found = without_critic(step["gradients"])
    assert equal(found, {n: p.grad for n, p in policy.named_parameters()})


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_forwards_are_counted(tmp_path, critic):
    """One forward of the policy's backbone to measure and one for each use; a shared critic adds
    none, a separate one runs its own as often."""
    run = trainer(tmp_path, critic=critic, kl_coef=0.0, max_steps=2, num_iterations=2)
    counts = {"policy": 0, "critic": 0}

    def counting(name):
        def hook(module, args, kwargs, output):
            # generation has a cache
            counts[name] += not kwargs.get("use_cache")

        return hook

    backbone(run.model).register_forward_hook(counting("policy"), with_kwargs=True)
    if critic == "separate":
        run.critic.body.register_forward_hook(counting("critic"), with_kwargs=True)
    run.train()
    assert counts == {"policy": 3, "critic": 3 if critic == "separate" else 0}


def test_the_window_by_hand(tmp_path):
    """Rewards of tokens, GAE, whitening and the value loss from what the micro-batch holds."""
    run = trainer(
        tmp_path,
        cls=RecordingPPO,
        max_steps=1,
        gamma=0.9,
        value_lam=1.0,
        kl_coef=0.1,
        missing_eos_penalty=0.5,
        cliprange_value=0.05,
    )
    # a critic that says something
    torch.nn.init.normal_(run.critic.head.weight, generator=torch.Generator().manual_seed(5))
    micro, _ = first_window(run)
    rollouts, rewards, _ = run.windows[0]
    scores = rewards - 0.5 * torch.tensor(rollouts.truncated).float()
    bounds = micro.packed.cu_seqlens
    gap = micro.old_logp - micro.ref_logp
    tokens = token_rewards(scores, bounds, kl=gap, kl_coef=0.1)
    advantages, _ = gae(tokens, micro.values, bounds, gamma=0.9, lam=0.95)
    _, returns = gae(tokens, micro.values, bounds, gamma=0.9, lam=1.0)
    white = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)
    torch.testing.assert_close(micro.advantages, white, rtol=1e-5, atol=1e-5)
    assert torch.equal(micro.returns, returns) and micro.values.std() > 0.1
    # the first use: values are those of the window, and the ratio is 1
    expected, _, _ = value_loss(micro.values, returns, micro.values, cliprange=0.05)
    assert logged(run, "value_loss")[0] == pytest.approx(expected.mean().item(), rel=1e-4)
    # whitened advantages have mean 0, so the loss is that of the values alone
    assert logged(run, "loss")[0] == pytest.approx(0.5 * expected.mean().item(), rel=1e-4)
    share = 1 - (returns - micro.values).var() / returns.var()
    assert logged(run, "explained_variance")[0] == pytest.approx(share.item(), rel=1e-4)
    assert logged(run, "kl_coef") == [0.1]


def test_what_cannot_be_judged_teaches_nothing(tmp_path):
    """A completion without a reward has no weight, and its places no advantage."""

    def half(completions, **_):
        return [None if i % 2 else 1.0 + i for i in range(len(completions))]

    run = trainer(tmp_path, reward=half, cls=RecordingPPO, max_steps=1)
    micro, _ = first_window(run)
    kept = torch.tensor([True, False] * 2).repeat_interleave(micro.packed.cu_seqlens.diff())
    assert torch.equal(micro.mask, kept)
    assert not micro.advantages[~kept].any() and micro.denominator == kept.sum()


def test_warm_up_moves_the_critic_alone(tmp_path):
    """Weight decay is on, and the policy keeps every bit for two steps."""
    run = trainer(
        tmp_path,
        cls=RecordingPPO,
        value_warmup_steps=2,
        weight_decay=0.1,
        max_steps=3,
        num_iterations=1,
    )
    run.train()
    weights = [s["weights"] for s in run.steps]
    policy = [without_critic(w) for w in weights]
    assert equal(policy[0], policy[1]) and equal(policy[1], policy[2])
    assert not equal(policy[2], without_critic(run.model.state_dict()))
    name = "critic.head.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_the_critic_has_its_own_learning_rate(tmp_path):
    run = trainer(tmp_path, value_learning_rate=0.25)
    optimizer = run.create_optimizer()
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(list(run.model.parameters()))
    own = {id(p) for p in run.critic.parameters()}
    assert {rate for i, rate in rates.items() if i in own} == {0.25}
    assert {rate for i, rate in rates.items() if i not in own} == {1e-2}


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_saved_beside_the_policy_and_never_inside(tmp_path, critic):
    run = trainer(tmp_path, critic=critic, max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "final"))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert equal(loaded.state_dict(), without_critic(run.model.state_dict()))
    assert (tmp_path / "final" / "critic" / "critic.safetensors").is_file()
    if run.reference is not None:
        assert not any("critic" in name for name, _ in run.reference.model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"critic": "separate", "value_learning_rate": 3e-3},
        {"target_kl": 1e-3, "kl_controller": "ziegler", "kl_target": 0.1, "kl_horizon": 20},
    ],
)
def test_resume_is_exact(tmp_path, options):
    """From every step of a run: inside an epoch, between windows, inside dropped steps."""
    settings = {"max_steps": 7, "num_iterations": 3, "save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path, **settings, **options)
    whole.train()
    for step in (1, 2, 3, 5):
        again = trainer(tmp_path / "again", **{**settings, "save_strategy": "no"}, **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert equal(whole.model.state_dict(), again.model.state_dict()), step
        assert again.kl.coefficient == whole.kl.coefficient
        keys = ("loss", "explained_variance", "value_loss", "kl_coef")
        assert [logged(again, k)[-1] for k in keys] == [logged(whole, k)[-1] for k in keys]


def test_a_checkpoint_without_its_critic_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    other = trainer(tmp_path / "b", critic="separate", max_steps=2)
    with pytest.raises(ValueError, match="critic"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_an_adapter_is_its_own_reference(tmp_path):
    """LoRA: the reference is the policy without it, the critic a head that is trained with it."""
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(tmp_path, peft_config=lora, max_steps=4)
    run.train()
    assert run.reference.peft and run.critic.head.weight.any()
    kls = logged(run, "kl_per_completion")
    assert kls[0] == 0 and kls[1] != 0
    run.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()


def test_a_critic_of_another_checkpoint(tmp_path):
    """Its own width and weights; one with another vocabulary is refused."""
    source = checkpoint(tmp_path / "critic")
    run = trainer(tmp_path / "run", critic="separate", critic_model=source, max_steps=1)
    assert type(run.critic.body).__name__ == "Qwen3Model"
    run.train()
    other = tokenizer()
    other.add_tokens(["w99"])
    other.save_pretrained(source)
    with pytest.raises(ValueError, match="^critic_model: expected the tokenizer"):
        trainer(tmp_path / "run", critic="separate", critic_model=source)


def test_evaluation(tmp_path):
    run = trainer(tmp_path, eval_dataset=dataset(4), max_steps=1)
    values = run.evaluate()
    assert math.isfinite(values["eval_value_loss"]) and "eval_explained_variance" in values
    assert "eval_reward_std" not in values


@pytest.mark.parametrize(
    "options, named",
    [
        ({"scale_rewards": "none"}, "scale_rewards"),
        ({"advantage_estimator": "leave_one_out"}, "advantage_estimator"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"loss_type": "gspo"}, "loss_type"),
        ({"loss_type": "reinforce"}, "loss_type"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold"),
        ({"gamma": 1.1}, "gamma"),
        ({"lam": None}, "lam"),
        ({"lam": 0.5, "lam_length_alpha": 0.05}, "lam"),
        ({"lam_length_alpha": 0.0}, "lam_length_alpha"),
        ({"value_lam": -1.0}, "value_lam"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"kl_coef": 0.0, "kl_reward_estimator": "k3"}, "kl_reward_estimator"),
        ({"kl_reward_estimator": "k2"}, "kl_reward_estimator"),
        ({"kl_coef": 0.0, "kl_controller": "doubling", "kl_target": 1.0}, "kl_controller"),
        ({"missing_eos_penalty": 0.0}, "missing_eos_penalty"),
        ({"critic": "shred"}, "critic"),
        ({"critic_model": "x"}, "critic_model"),
        ({"critic": "separate", "value_detach": True}, "value_detach"),
        ({"value_loss": "l1"}, "value_loss"),
        ({"huber_delta": 2.0}, "huber_delta"),
        ({"cliprange_value": 0}, "cliprange_value"),
        ({"vf_coef": 0.0}, "vf_coef"),
        ({"value_warmup_steps": -1}, "value_warmup_steps"),
        ({"value_learning_rate": 0.0}, "value_learning_rate"),
    ],
)
def test_options_without_use_are_named(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        config(tmp_path, **options)


def test_an_optimizer_of_ones_own_is_refused(tmp_path):
    policy = model()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="^optimizers: expected"):
        trainer(tmp_path, policy=policy, optimizers=(optimizer, None))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_reward_rises(tmp_path, critic):
    """The share of one word among those of a completion, in 40 windows of 16 completions, and the
    critic knows part of the returns while it does."""
    run = trainer(
        tmp_path,
        reward=count_w3,
        critic=critic,
        per_device_train_batch_size=16,
        max_steps=160,
        num_iterations=4,
        learning_rate=5e-3,
        kl_coef=0.0,
        lr_scheduler_type="constant",
        seed=1,
    )
    run.train()
    rewards, explained = logged(run, "reward"), logged(run, "explained_variance")
    assert len(rewards) == 40 and sum(rewards[:2]) / 2 < 0.1
    assert sum(rewards[-4:]) / 4 > 0.6, rewards
    assert sorted(explained[2:20])[9] > 0.3, explained


def test_a_moving_reference_leaves_the_critic_out(tmp_path):
    """With a share of 1 and every step, the reference is the policy itself."""
    moving = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    run = trainer(tmp_path, max_steps=2, **moving)
    run.train()
    policy = without_critic(run.model.state_dict())
    for name, weight in run.reference.model.state_dict().items():
        torch.testing.assert_close(weight, policy[name], rtol=1e-6, atol=1e-7)
