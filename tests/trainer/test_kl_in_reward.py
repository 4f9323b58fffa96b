"""GRPO with the KL in the reward: R - beta * KL of the completion, before the group is compared."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import Recording, config, dataset, double, logprobs, spread_reward, trainer

from grpo_fast.advantages import group

SETTINGS = {"beta": 0.3, "kl_in_reward": True, "num_iterations": 2, "steps_per_generation": 2}


def caught(folder, **options):
    """A run that has ended, and the micro-batch of every optimizer step."""
    settings = {**SETTINGS, "max_steps": 8, "learning_rate": 1e-2}
    run = trainer(folder, reward=spread_reward, cls=Recording, **{**settings, **options})
    seen, stage = [], run.loss

    def loss(model, micro):
        seen.append(micro)
        return stage(model, micro)

    run.loss = loss
    run.train()
    return run, seen


def kl_of(run, window):
    """KL of each completion to the first policy, in float64, one sequence at a time."""
    rollouts, _, weights = run.windows[window]
    pairs = list(zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True))
    with torch.no_grad():
        new, first = double(weights), double(run.windows[0][2])
        return torch.stack(
            [(logprobs(new, p, c, 1.0) - logprobs(first, p, c, 1.0)).sum() for p, c in pairs]
        )


def test_by_hand(tmp_path):
    """The second window: rewards minus 0.3 KL, in groups of four; the loss has no KL term."""
    run, seen = caught(tmp_path)
    assert run.loss_config.beta == 0.0 and len(run.windows) == 2
    kl = kl_of(run, 1)
    total = (run.windows[1][1].double() - 0.3 * kl).view(-1, 4)
    expected = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)
    found = torch.cat([micro.advantages for micro in seen[4:6]]).double()
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-3, atol=1e-3)
    assert torch.equal(seen[6].advantages, seen[4].advantages)
    logs = [log for log in run.state.log_history if "kl_per_completion" in log]
    assert logs[1]["kl_per_completion"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert logs[1]["kl_per_completion"] > 0.1 and [log["kl_coef"] for log in logs] == [0.3, 0.3]
    # the KL moves the advantages: without it they are others
    plain = group.group_advantages(run.windows[1][1].view(-1, 4)).flatten().double()
    assert (plain - found).abs().max() > 1e-2


def test_the_controller_learns_of_each_window(tmp_path):
    run, _ = caught(tmp_path, kl_controller="doubling", kl_target=1e-3, max_steps=16)
    coefficients = [log["kl_coef"] for log in run.state.log_history if "kl_coef" in log]
    # the policy of the first window is the reference
    assert coefficients == [0.3, 0.15, 0.3, 0.6] and run.kl.coefficient == 1.2


def test_resume_and_evaluation(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_dataset": dataset(4)}
    whole = trainer(tmp_path, reward=spread_reward, max_steps=7, **SETTINGS, **saving)
    whole.train()
    again = trainer(tmp_path / "b", reward=spread_reward, max_steps=7, **SETTINGS)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    one, other = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.evaluate()["eval_reward"] > 0
    changed = trainer(
        tmp_path / "c", reward=spread_reward, max_steps=7, **{**SETTINGS, "beta": 0.2}
    )
    with pytest.raises(ValueError, match="kl_in_reward was 0.3, is 0.2"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"kl_in_reward": True}, "kl_in_reward"),
        ({"kl_in_reward": "yes", "beta": 0.1}, "kl_in_reward"),
        ({"kl_in_reward": True, "beta": 0.1, "kl_estimator": "k1"}, "kl_estimator"),
        (
            {
                "kl_in_reward": True,
                "beta": 0.1,
                "multi_objective_aggregation": "normalize_then_sum",
            },
            "kl_in_reward",
        ),
    ],
)
def test_options_without_use_are_named(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        config(tmp_path, **options)
