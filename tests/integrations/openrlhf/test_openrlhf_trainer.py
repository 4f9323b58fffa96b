"""Optimizer steps of OpenRLHF's own ActorPPOTrainer, stock and with ours.

Where openrlhf is missing the file is skipped; `make test-openrlhf` has it.
"""

from __future__ import annotations

import pytest

pytest.importorskip("openrlhf", reason="needs openrlhf, which `make test-openrlhf` lays over")
import openrlhf_cases as cases
from openrlhf.models import Actor
from openrlhf.trainer.ray import ppo_actor
from openrlhf_trainer import train

from grpo_fast.integrations.openrlhf import actor as adapter

BOUND = 1e-5
# A loss is a sum of both signs and a KL is what terms near 1 leave over, each rounded to 1.2e-7 in
# fp32: this floor allows 1e-7 for them. All else is relative to the largest of the run.
FLOOR = 1e-2


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(ppo_actor, "torch_dist_barrier_and_cuda_sync", lambda: None)
    monkeypatch.setattr(ppo_actor, "NaiveReplayBuffer", lambda *args: None)
    yield
    adapter.uninstall()


CASES = {
    "ppo": ({}, {}, "dapo"),
    "packed": ({"packed": True, "temperature": 0.8}, {}, "dapo"),
    "lora": ({"lora": True}, {"is_correction_level": "token"}, "dapo"),
    "dual clip": ({}, {"dual_clip": 1.2, "entropy_coef": None, "kl_estimator": "k2"}, "ppo"),
    "experts": ({"family": "Qwen3Moe"}, {"aux_loss_coef": 0.1, "kl_use_loss": False}, "bnpo"),
    "gspo": ({}, {"policy_loss_type": "gspo"}, "gspo"),
    "sequence mean": ({"packed": True}, {"loss_agg_mode": "seq-mean-token-mean"}, "dapo"),
}


@pytest.mark.parametrize("ours_too", [False, True], ids=["actor", "actor and loss"])
@pytest.mark.parametrize("case", CASES)
def test_steps(case, ours_too):
    """The same losses, metrics and weights after six steps."""
    actor, options, name = CASES[case]
    theirs = train(cases.actor(**actor), **options)
    adapter.install(name if ours_too else None)
    ours = train(cases.actor(**actor), **options)
    assert Actor.forward is adapter._forward and ours.keys() == theirs.keys()
    far = {}
    for key, value in theirs.items():
        floor = FLOOR if key in ("policy_loss", "kl", "ppo_kl", "logprobs_diff") else 1e-6
        gap = (ours[key] - value).abs().max() / value.abs().max().clamp(min=floor)
        far[key] = float(gap.nan_to_num(nan=float("inf")))
    assert max(far.values()) <= BOUND, far
    start = cases.actor(**actor)
    moved = [p.detach().flatten() for p in start.parameters() if p.requires_grad]
    assert cases.distance(ours["weights"], cases.torch.cat(moved)) > 1e-3
    assert theirs["ppo_clip_ratio"].max() > 0 and ("entropy_loss" in far) == (case != "dual clip")


def test_the_trainer_has_the_loss_of_install():
    adapter.install("cispo", epsilon_high=4.0)
    seen = []
    loss = ppo_actor.PolicyLoss

    class Watched(loss):
        def forward(self, *args, **kwargs):
            seen.append(self.loss_config.loss_type)
            return super().forward(*args, **kwargs)

    ppo_actor.PolicyLoss = Watched
    train(cases.actor(), steps=1, eps_clip_low_high=(0.2, 0.2))
    assert seen == ["cispo"]
    adapter.uninstall()
    assert ppo_actor.PolicyLoss.__name__ == "PolicyLoss" and ppo_actor.PolicyLoss is not loss
