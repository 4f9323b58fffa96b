"""Forms of the policy loss: the ratio to the reference, PPO's penalty by the KL to the old policy,
and a KL that is measured alone."""

from __future__ import annotations

import pytest
import tiny_ppo
import tiny_trainer
import torch
from tiny_trainer import Recording, double, logprobs, model, spread_reward

from grpo_fast.models.critic import without_critic


def logged(run, name):
    return tiny_ppo.logged(run, name)


def train_and_catch(run):
    """Run it, and keep the micro-batch of every optimizer step."""
    seen, stage = [], run.loss

    def loss(wrapped, micro):
        seen.append(micro)
        return stage(wrapped, micro)

    run.loss = loss
    run.train()
    return seen


def exact_logp(weights, rollouts):
    """Log-probs (N,) of the sampled tokens in float64, one sequence at a time."""
    policy = double(weights)
    pairs = zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
    with torch.no_grad():
        return torch.cat([logprobs(policy, p, c, 1.0) for p, c in pairs])


def of_tokens(micro):
    """The advantages (N,), in float64."""
    given = micro.advantages.double()
    lengths = micro.packed.cu_seqlens.diff()
    return given if given.numel() == micro.packed.ids.numel() else given.repeat_interleave(lengths)


def test_the_ratio_to_the_reference(tmp_path):
    """GRPO: at every step the loss is the clipped surrogate of p / p(reference), in float64 by
    hand; at the last one the ratio is far from 1, on either side of the clip."""
    run = tiny_trainer.trainer(
        tmp_path,
        reward=spread_reward,
        cls=Recording,
        ratio_to="reference",
        num_iterations=2,
        max_steps=8,
        learning_rate=2e-2,
    )
    seen = train_and_catch(run)
    assert all(micro.old_logp is None for micro in seen)
    start, clipped = run.steps[0]["weights"], 0
    for step, micro in enumerate(seen):
        rollouts = run.windows[step // 2][0]
        new = exact_logp(run.steps[step]["weights"], rollouts)
        ratio = (new - exact_logp(start, rollouts)).exp()
        a = of_tokens(micro)
        loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
        assert run.steps[step]["losses"][0] == pytest.approx(loss.item(), rel=2e-4, abs=2e-5)
        clipped = ((ratio < 0.8).sum().item(), (ratio > 1.2).sum().item())
    assert min(clipped) > 2
    assert logged(run, "ratio/max")[-1] == pytest.approx(ratio.max().item(), rel=1e-3)


def test_on_policy_too(tmp_path):
    """Where a window is used once the ratio is not 1 either, and is logged."""
    run = tiny_trainer.trainer(
        tmp_path, reward=spread_reward, ratio_to="reference", max_steps=3, learning_rate=2e-2
    )
    run.train()
    highest = logged(run, "ratio/max")
    assert highest[0] == pytest.approx(1.0) and highest[-1] > 1.5


@pytest.mark.parametrize("given", [None, 4.0])
def test_the_penalty_by_hand(tmp_path, given):
    """PPO: -r A + c (1 - r + r log r), without a clip, in float64; c doubles or halves after each
    window with the controller, which takes the KL that the last step of a window starts from."""
    target = {} if given is None else {"kl_controller": "doubling", "kl_target": given}
    run = tiny_ppo.trainer(
        tmp_path,
        cls=tiny_ppo.RecordingPPO,
        penalty_coef=0.5,
        kl_coef=0.1,
        vf_coef=1e-12,
        value_detach=True,
        num_iterations=3,
        max_steps=9,
        learning_rate=3e-2,
        **target,
    )
    seen = train_and_catch(run)
    coefficient, far = 0.5, 0.0
    for step, micro in enumerate(seen):
        rollouts = run.windows[step // 3][0]
        new = exact_logp(without_critic(run.steps[step]["weights"]), rollouts)
        gap = new - exact_logp(without_critic(run.windows[step // 3][2]), rollouts)
        ratio, a = gap.exp(), of_tokens(micro)
        kl = 1 - ratio + ratio * gap
        assert logged(run, "kl_coef")[step] == coefficient
        expected = (coefficient * kl - ratio * a).mean().item()
        assert run.steps[step]["losses"][0] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        far = max(far, ratio.max().item())
        approx = (ratio - 1 - gap).sum().item() / len(rollouts.completion_ids)
        if given is not None and step % 3 == 2:
            coefficient *= 2 if approx > 1.5 * given else 0.5 if approx < given / 1.5 else 1
    assert far > 1.5 and run.args.loss_config().beta == 0.5
    # k3 of the loss, not multiplied by the ratio; the KL to the reference is that of the window
    assert logged(run, "kl_to_old")[0] == pytest.approx(0.0, abs=1e-6) and not logged(run, "kl")
    assert len(logged(run, "kl_per_completion")) == 3
    assert given is None or coefficient != 0.5


def test_a_penalty_resumes_exactly(tmp_path):
    settings = {"penalty_coef": 0.5, "kl_controller": "doubling", "kl_target": 0.01}
    settings |= {"num_iterations": 3, "max_steps": 8, "steps_per_generation": 2}
    whole = tiny_ppo.trainer(tmp_path, save_strategy="steps", save_steps=1, **settings)
    whole.train()
    for step in (2, 5, 6):
        again = tiny_ppo.trainer(tmp_path / "again", **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert tiny_ppo.equal(whole.model.state_dict(), again.model.state_dict())
        assert again.kl.coefficient == whole.kl.coefficient != 0.5


def test_measuring_the_kl_changes_no_bit(tmp_path):
    """log_kl at beta 0: the KL to the reference and the approximate one are logged."""
    runs = []
    for name, asked in (("a", True), ("b", False)):
        run = tiny_trainer.trainer(
            tmp_path / name, reward=spread_reward, log_kl=asked, num_iterations=2, max_steps=4
        )
        run.train()
        runs.append(run)
    one, other = (run.model.state_dict() for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    kl, approximate = logged(runs[0], "kl"), logged(runs[0], "approx_kl")
    assert len(kl) == len(approximate) == 4 and kl[-1] > 1e-4 and approximate[1] > 1e-4
    assert approximate[2] == pytest.approx(0.0, abs=1e-8)
    assert not logged(runs[1], "kl") and not logged(runs[1], "approx_kl")


@pytest.mark.parametrize(
    "options, named",
    [
        ({"ratio_to": "referense"}, "ratio_to"),
        ({"ratio_to": "reference", "loss_type": "reinforce"}, "ratio_to"),
        ({"ratio_to": "reference", "off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold"),
    ],
)
def test_a_ratio_without_use_is_named(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        tiny_trainer.config(tmp_path, **options)


def test_a_sampler_with_log_probs_and_the_ratio_to_the_reference(tmp_path):
    run = tiny_trainer.trainer(tmp_path, policy=model(), ratio_to="reference", max_steps=1)
    sample = run.sampler.sample

    def with_logp(*args):
        rollouts = sample(*args)
        rollouts.logp = [[0.0] * len(c) for c in rollouts.completion_ids]
        return rollouts

    run.sampler.sample = with_logp
    with pytest.raises(ValueError, match="^ratio_to: expected 'old' with a sampler"):
        run.train()


@pytest.mark.parametrize(
    "options, named",
    [
        ({"penalty_coef": -1.0}, "penalty_coef"),
        ({"penalty_coef": float("inf")}, "penalty_coef"),
        ({"penalty_coef": 1.0, "num_iterations": 1}, "penalty_coef"),
        (
            {"penalty_coef": 1.0, "gradient_accumulation_steps": 3, "steps_per_generation": 1},
            "penalty_coef",
        ),
        ({"penalty_coef": 1.0, "epsilon": 0.1}, "epsilon"),
        ({"penalty_coef": 1.0, "epsilon_high": 0.3}, "epsilon_high"),
        ({"penalty_coef": 1.0, "beta": 0.1}, "beta"),
        ({"penalty_coef": 1.0, "loss_type": "ppo"}, "loss_type"),
        ({"penalty_coef": 1.0, "loss_type": "sapo"}, "loss_type"),
        ({"penalty_coef": 1.0, "ratio_to": "reference"}, "ratio_to"),
        ({"penalty_coef": 1.0, "target_kl": 1.0, "target_kl_to": "reference"}, "target_kl_to"),
    ],
)
def test_what_a_penalty_has_no_use_for_is_named(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        tiny_ppo.config(tmp_path, **{"num_iterations": 2, **options})
