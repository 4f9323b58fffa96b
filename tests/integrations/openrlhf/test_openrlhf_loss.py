"""OpenRLHF's PolicyLoss against ours: where the two mean the same, and the rest in float64.

Where openrlhf is missing the file is skipped; `make test-openrlhf` has it.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

pytest.importorskip("openrlhf", reason="needs openrlhf, which `make test-openrlhf` lays over")
from openrlhf.models.loss import PolicyLoss
from openrlhf_cases import distance

from grpo_fast import reference
from grpo_fast.config import LossConfig
from grpo_fast.integrations.openrlhf.loss import FastPolicyLoss, chosen
from grpo_fast.integrations.openrlhf.options import OWN
from grpo_fast.presets import PRESETS

BOUND, EXACT = 1e-6, 1e-12
B, T = 6, 11
# what the trainer passes: counts of a whole optimizer step on three ranks
COUNTS = {"dp_size": 3, "batch_num_tokens": torch.tensor(97.0), "global_batch_size": 13.0}
MORE = {
    "cispo": {"epsilon_high": 1.1},
    "dr_grpo": {"max_completion_length": 17},
    "ppo": {"delta": 1.6},
    "gmpo": {"epsilon": 0.1, "epsilon_high": 0.15},
    "dppo_tv": {"epsilon": 0.02},
    "dppo_kl": {"epsilon": 0.02},
}
NAMES = tuple(name for name in PRESETS if name != "reward_weighted")


def case(seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probs near the old ones, a hole in the mask, a short and an empty sequence."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g) * 3 - 0.5
    mask = (torch.arange(T) < torch.tensor([11, 4, 7, 0, 1, 11])[:, None]).long()
    mask[0, 3:5] = 0
    return {
        "log_probs": (old + 0.3 * torch.randn(B, T, generator=g)).clamp(max=-1e-3) * mask,
        "old_log_probs": old * mask,
        "advantages": torch.randn(B, T, generator=g),
        "action_mask": mask,
        "rollout_log_probs": (old + 0.6 * torch.randn(B, T, generator=g)).clamp(max=0) * mask,
    }


def results(loss, data, counts) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """The five results and the gradient of the log-probs."""
    logp = data["log_probs"].clone().requires_grad_()
    out = loss(**{**data, "log_probs": logp}, **counts)
    out[0].backward()
    assert len(out) == 5 and not any(x is not None and x.requires_grad for x in out[1:])
    return [None if x is None else x.detach() for x in out], logp.grad


def same(ours, theirs) -> None:
    for a, b in zip([*ours[0], ours[1]], [*theirs[0], theirs[1]], strict=True):
        assert (a is None) == (b is None)
        assert a is None or distance(a, b) <= BOUND, (a, b)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("token_mean", [True, False])
@pytest.mark.parametrize("counts", [{}, COUNTS], ids=["alone", "counts"])
@pytest.mark.parametrize("correction", ["off", "mask", "clip"])
def test_ppo(dual_clip, token_mean, counts, correction):
    """OpenRLHF's ppo is dapo's objective, and ppo's with a dual clip."""
    options = {
        "clip_eps_low": 0.1,
        "clip_eps_high": 0.25,
        "dual_clip": dual_clip,
        "token_level_loss": token_mean,
    }
    if correction != "off":
        options |= {"is_correction_level": "token", "is_correction_mode": correction}
        options["is_correction_threshold"] = [0.6, 1.7]
    stock = results(PolicyLoss(**options), case(), counts)
    for name in ("dapo",) if dual_clip is None else ("dapo", "bnpo", "ppo"):
        ours = results(chosen(name)(**options), case(), counts)
        same(ours, stock)
    # the case has what the options are about
    assert 0 < stock[0][1] < 1 and (correction == "off" or 0 < stock[0][4] < 1)


@pytest.mark.parametrize("counts", [{}, COUNTS], ids=["alone", "counts"])
@pytest.mark.parametrize("named", ["ppo", "gspo"])
def test_gspo(named, counts):
    """Whether --actor.policy_loss_type says it too or not."""
    options = {"clip_eps_low": 0.03, "clip_eps_high": 0.04}
    stock = results(PolicyLoss(**options, policy_loss_type="gspo"), case(), counts)
    same(results(chosen("gspo")(**options, policy_loss_type=named), case(), counts), stock)
    assert 0 < stock[0][1] < 1


def test_far_ratios():
    """A log-ratio beyond 20 nats carries no gradient, there as here."""
    data = case()
    data["old_log_probs"][0, 0] -= 30
    data["log_probs"][5, 2] -= 30
    same(results(chosen("dapo")(), data, {}), results(PolicyLoss(), data, {}))


def mean_of(losses, mask, weights: str, dp_size, batch_num_tokens, global_batch_size):
    """Each way to average, over OpenRLHF's counts of a step."""
    if weights == "token_mean":
        return dp_size * losses.sum() / batch_num_tokens
    if weights == "sequence_mean":
        losses = losses / mask.sum(-1, keepdim=True).clamp(min=1)
    length = MORE["dr_grpo"]["max_completion_length"] if weights == "constant_length" else 1
    return dp_size * losses.sum() / (global_batch_size * length)


def double() -> dict[str, torch.Tensor]:
    """The case in float64: a loss is a sum of both signs, of which fp32 leaves over 1e-6."""
    return {k: v.double() if v.is_floating_point() else v for k, v in case().items()}


def exact(config, data, weights: str, counts, corrected: bool = False):
    """Loss and gradient in float64, by autograd."""
    logp, mask = data["log_probs"].requires_grad_(), data["action_mask"].bool()
    old, advantages = data["old_log_probs"], data["advantages"]
    losses, _ = reference._objective(config, logp, old, advantages, mask, None)
    if corrected:
        losses = losses * reference._rollout_factor(config, old - data["rollout_log_probs"], mask)
    losses = torch.where(mask, losses, torch.zeros_like(losses))
    loss = mean_of(losses, mask, weights, **counts)
    loss.backward()
    return loss.detach(), logp.grad


@pytest.mark.parametrize("name", NAMES)
def test_presets(name):
    """Loss and gradient of every row, averaged as the row says."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = chosen(name, **MORE.get(name, {}))()
    ours, grad = results(made, double(), COUNTS)
    want = exact(made.loss_config, double(), PRESETS[name].weights, COUNTS)
    assert made.loss_config.loss_type == name and grad.any()
    assert distance(ours[0], want[0]) <= EXACT and distance(grad, want[1]) <= EXACT
    assert not grad[case()["action_mask"] == 0].any()


@pytest.mark.parametrize("name", ["cispo", "sapo", "gmpo", "luspo"])
@pytest.mark.parametrize("mode", ["mask", "clip"])
def test_correction_of_presets(name, mode):
    """is_correction_level=token is a rollout correction of each token."""
    options = {"is_correction_level": "token", "is_correction_mode": mode}
    made = chosen(name, **MORE.get(name, {}))(**options, is_correction_threshold=[0.6, 1.7])
    ours, grad = results(made, double(), COUNTS)
    mode = {"mask": "token_mask", "clip": "token_truncate"}[mode]
    more = {"rollout_correction": mode, "rollout_ratio_min": 0.6, "rollout_ratio_max": 1.7}
    config = LossConfig(loss_type=name, **{"epsilon_high": 0.2} | MORE.get(name, {}) | more)
    want = exact(config, double(), PRESETS[name].weights, COUNTS, corrected=True)
    assert distance(ours[0], want[0]) <= EXACT and distance(grad, want[1]) <= EXACT
    stock = PolicyLoss(**options, is_correction_threshold=[0.6, 1.7])
    theirs, _ = results(stock, case(), COUNTS)
    assert distance(ours[3], theirs[3]) <= BOUND and distance(ours[4], theirs[4]) <= BOUND


@pytest.mark.parametrize("name", ["luspo", "dr_grpo"])
def test_a_sum_per_sequence_counts_its_own_sequences(name):
    """Without counts: the sequences of this call that have a token, as OpenRLHF's means do it."""
    made = chosen(name, **MORE.get(name, {}))()
    alone = results(made, case(), {})
    counted = {"dp_size": 1, "batch_num_tokens": 34.0, "global_batch_size": 5.0}
    same(alone, results(made, case(), counted))


@pytest.mark.parametrize(
    "name, install, host, weights",
    [
        ("dapo", {}, {"token_level_loss": False}, "sequence_mean"),
        ("grpo", {}, {"token_level_loss": False}, "sequence_mean"),
        ("grpo", {"aggregation": "token_mean"}, {}, "token_mean"),
        ("dapo", {"aggregation": "sequence_sum"}, {}, "sequence_sum"),
        ("grpo", {"aggregation": "sequence_mean"}, {"token_level_loss": False}, "sequence_mean"),
    ],
)
def test_aggregation(name, install, host, weights):
    made = chosen(name, **install)(**host)
    ours, grad = results(made, double(), COUNTS)
    want = exact(made.loss_config, double(), weights, COUNTS)
    assert distance(ours[0], want[0]) <= EXACT and distance(grad, want[1]) <= EXACT


def test_without_a_mask():
    data = {k: v for k, v in case().items() if k != "action_mask"}
    same(results(chosen("dapo")(), data, {}), results(PolicyLoss(), data, {}))


def test_surface():
    """Constructor, arguments and their order."""
    for method in ("forward", "__init__"):
        theirs = list(inspect.signature(getattr(PolicyLoss, method)).parameters)
        ours = list(inspect.signature(getattr(FastPolicyLoss, method)).parameters)
        assert ours == theirs or ours == ["self", "args", "kwargs"], method
    assert (
        issubclass(chosen("dapo"), PolicyLoss)
        and FastPolicyLoss().loss_config == chosen("dapo")().loss_config
    )
    with pytest.raises(ValueError, match="is_correction_level must be off/token/seq"):
        chosen("dapo")(is_correction_level="batch")


@pytest.mark.parametrize("name", [*OWN, "top_entropy_quantile"])
def test_options_that_are_not_of_install(name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        chosen("dapo", **{name: getattr(LossConfig(), name)})


@pytest.mark.parametrize(
    "install, host, match",
    [
        ({"loss_type": "dapa"}, {}, "loss_type: .*did you mean 'dapo'"),
        ({"loss_type": "reward_weighted"}, {}, "loss_type: .*reinforce is the loss"),
        ({"loss_type": "dapo", "clip": 1}, {}, "clip: expected one of aggregation, cispo_ratio"),
        ({"loss_type": "dapo", "epsilon": -1.0}, {}, "epsilon: expected"),
        ({"loss_type": "dr_grpo"}, {}, "max_completion_length: expected a number"),
        ({"loss_type": "dapo"}, {"clip_eps_low": -1.0}, "clip_eps_low: expected"),
        ({"loss_type": "dapo"}, {"dual_clip": 1.1}, "dual_clip: expected .* > 1.2"),
        ({"loss_type": "sapo"}, {"dual_clip": 3.0}, "dual_clip: .*sapo has no such cap"),
        ({"loss_type": "cispo", **MORE["cispo"]}, {"dual_clip": 3.0}, "dual_clip: .*cispo already"),
        ({"loss_type": "cispo"}, {}, "clip_eps_high: .*the highest ratio itself"),
        ({"loss_type": "cispo", "epsilon_high": None}, {}, "clip_eps_high: .*the highest ratio"),
        ({"loss_type": "ppo"}, {}, "dual_clip: expected a number for ppo"),
        ({"loss_type": "sapo"}, {"clip_eps_low": 0.1}, "clip_eps_low: .*sapo has no such bound"),
        ({"loss_type": "sapo", "epsilon": 0.1}, {}, "epsilon: .*sapo has no such bound"),
        (
            {"loss_type": "cispo", **MORE["cispo"]},
            {"clip_eps_low": 0.1},
            "clip_eps_low: .*cispo has no such bound",
        ),
        (
            {"loss_type": "dapo", "epsilon": 0.1},
            {"clip_eps_low": 0.3},
            "clip_eps_low: expected its default or install's epsilon=0.1, got 0.3",
        ),
        ({"loss_type": "dapo"}, {"policy_loss_type": "gspo"}, "policy_loss_type: .*'dapo'"),
        ({"loss_type": "luspo"}, {"token_level_loss": False}, "token_level_loss: .*'sequence_sum'"),
        (
            {"loss_type": "dapo", "aggregation": "token_mean"},
            {"token_level_loss": False},
            "token_level_loss: .*'token_mean'",
        ),
        ({"loss_type": "dapo"}, {"is_correction_level": "seq"}, "is_correction_level: .*'seq'"),
        ({"loss_type": "gspo"}, {"is_correction_level": "token"}, "is_correction_level: .*gspo"),
        ({"loss_type": "vespo"}, {"is_correction_level": "token"}, "is_correction_level: .*vespo"),
        (
            {"loss_type": "dapo"},
            {
                "is_correction_level": "token",
                "is_correction_gating": "tv",
                "is_correction_threshold": [0.0, 0.1],
            },
            "is_correction_gating: expected ratio, got 'tv'",
        ),
        (
            {"loss_type": "dapo"},
            {"is_correction_level": "token", "is_correction_threshold": [3.0, 2.0]},
            "is_correction_threshold: expected at most",
        ),
    ],
)
def test_refusals(install, host, match):
    with pytest.raises(ValueError, match=match):
        chosen(**install)(**host)


def test_a_correction_needs_the_rollout():
    data = {k: v for k, v in case().items() if k != "rollout_log_probs"}
    with pytest.raises(ValueError, match="rollout_log_probs: expected them"):
        chosen("dapo")(is_correction_level="token")(**data)


def test_bad_tensors_are_named_as_openrlhf_names_them():
    data = case()
    with pytest.raises(ValueError, match="^old_log_probs: "):
        chosen("dapo")()(**{**data, "old_log_probs": data["old_log_probs"][:, 1:]})


def test_advantages_of_another_shape_are_refused():
    """(B,) would be spread over the tokens by the loss and over the sequences by a metric."""
    logp = torch.zeros(5, 5)
    with pytest.raises(ValueError, match=r"advantages: expected a tensor \(5, 5\), got \(5,\)"):
        chosen("dapo")()(logp, logp, torch.ones(5), torch.ones(5, 5))
