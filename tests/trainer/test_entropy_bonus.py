"""The entropy bonus: one scale for every loss, and a coefficient that follows a target."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_trainer import Recording, double, relative, spread_reward, trainer

from grpo_fast.trainer.entropy import EntropyBonus

LOSSES = ("dapo", "bnpo", "dr_grpo", "luspo", "cispo", "vespo", "grpo", "sapo")


def bonus_gradient(weights, micros, coef, by_completion):
    """d(-coef * mean entropy) / d weights in float64 through the model's own logits."""
    policy = double(weights)
    total, count = 0.0, 0
    for prompt, completion in micros:
        if not completion:
            continue
        logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0]
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        total = total + (entropy.mean() if by_completion else entropy.sum())
        count += 1 if by_completion else len(completion)
    (-coef * total / count).backward()
    return {n: p.grad for n, p in policy.named_parameters()}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_bonus_is_a_mean_entropy_whatever_the_loss(tmp_path, loss_type):
    """The difference of two runs' first gradients, with the bonus and without."""
    gradients, coef = [], 0.5
    options = {"max_steps": 1, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
    for value in (0.0, coef):
        folder = tmp_path / str(value)
        settings = {"loss_type": loss_type, "entropy_coef": value, **options}
        run = trainer(folder, reward=spread_reward, cls=Recording, **settings)
        run.train()
        gradients.append(run.steps[0]["gradients"])
    rollouts = run.windows[0][0]
    pairs = list(zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True))
    found = {n: gradients[1][n] - gradients[0][n] for n in gradients[0]}
    mean = loss_type in ("grpo", "sapo")
    if loss_type == "bnpo":
        halves = [bonus_gradient(run.steps[0]["weights"], p, coef, False) for p in _halves(pairs)]
        expected = {n: (halves[0][n] + halves[1][n]) / 2 for n in halves[0]}
    else:
        expected = bonus_gradient(run.steps[0]["weights"], pairs, coef, mean)
    assert relative(found, expected) < 1e-4
    logs = run.state.log_history[0]
    assert logs["entropy_coef"] == coef
    if not mean and loss_type != "bnpo":
        without = trainer(tmp_path / "again", reward=spread_reward, loss_type=loss_type, **options)
        without.train()
        plain = without.state.log_history[0]["loss"]
        assert logs["policy_loss"] == pytest.approx(plain, abs=1e-4)


def _halves(pairs):
    return pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]


def settings(**more):
    known = {
        "entropy_coef": 0.1,
        "use_adaptive_entropy": True,
        "entropy_coef_min": 0.0,
        "entropy_coef_max": 0.25,
        "entropy_coef_delta": 0.1,
        "entropy_target": 1.0,
        "top_entropy_quantile": 1.0,
    }
    return SimpleNamespace(**{**known, **more})


class Ranks:
    num_processes = 1

    def reduce(self, value, how):
        return value


def step(bonus, *pairs):
    for entropy, tokens in pairs:
        metrics = {"entropy": torch.tensor(entropy), "tokens": torch.tensor(tokens)}
        bonus.add(torch.tensor(-0.5), metrics)
    return bonus.end(Ranks())


def test_the_controller_by_hand():
    bonus = EntropyBonus(settings())
    assert (bonus.applied, bonus.coefficient) == (0.0, 0.1)
    # (0.5 * 30 + 2.0 * 10) / 40 = 0.875 <= 1: it grows, and is on from now on
    step(bonus, (0.5, 30), (2.0, 10))
    assert (bonus.applied, bonus.last) == (0.2, 0.875)
    # the loss had its bonus: -0.5 + 0.2 * 0.9
    assert step(bonus, (0.9, 5)) == pytest.approx(-0.5 + 0.2 * 0.9)
    assert bonus.coefficient == 0.25
    step(bonus, (3.0, 5))
    assert bonus.applied == 0.0
    assert bonus.coefficient == pytest.approx(0.15)
    for _ in range(3):
        step(bonus, (3.0, 5))
    assert bonus.coefficient == 0.0
    # a step without a token, or with a number that is none, says nothing
    assert step(bonus, (math.nan, 5)) is None
    assert bonus.last == 3.0
    state = bonus.state_dict()
    other = EntropyBonus(settings())
    other.load_state_dict(state)
    assert other.state_dict() == state


def test_an_adaptive_run_resumes_bit_for_bit(tmp_path):
    options = {
        "use_adaptive_entropy": True,
        "entropy_target": 100.0,
        "entropy_coef_delta": 0.1,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    run = trainer(tmp_path / "a", reward=spread_reward, **options)
    run.train()
    coefs = [log["entropy_coef"] for log in run.state.log_history if "entropy_coef" in log]
    assert coefs == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert all("policy_loss" in log for log in run.state.log_history if "loss" in log)
    again = trainer(tmp_path / "a", reward=spread_reward, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.entropy.coefficient == run.entropy.coefficient
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"entropy_target": 0.5}, "^entropy_target: expected 0.2 without use_adaptive_entropy"),
        ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, "^entropy_coef: expected a number"),
        ({"use_adaptive_entropy": True, "entropy_coef_delta": -1}, "^entropy_coef_delta: expected"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)
