"""The trainer takes completions from any sampler: weights are handed over, log-probs and masks come
back."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import dataset, spread_reward, trainer

from grpo_fast import GRPOTrainer
from grpo_fast.models.packing import completion_logprobs
from grpo_fast.rollout import HFSampler, Rollouts, Sampler
from grpo_fast.trainer import grpo

SETTINGS = {"reward": spread_reward, "train_dataset": dataset(8), "max_completion_length": 6}


class Canned:
    """Completions made of prompts; every third token comes from an environment."""

    def __init__(self, logp=None, masked=False, stray=3) -> None:
        self.logp, self.masked, self.stray = logp, masked, stray
        self.synced, self.asked = [], []

    def sync(self, model) -> None:
        self.synced.append([p.detach().clone() for p in model.parameters()])

    def sample(self, prompts, num_generations):
        self.asked.append((prompts, num_generations))
        repeated = [p for p in prompts for _ in range(num_generations)]
        ids, masks = [], []
        for place, prompt in enumerate(repeated):
            written = [3 + (7 * sum(prompt) + 5 * place * j) % 29 for j in range(2 + place % 4)]
            masks.append([j % 3 != 2 for j in range(len(written))])
            ids.append([t if m else self.stray for t, m in zip(written, masks[-1], strict=True)])
        return Rollouts(
            repeated,
            ids,
            [False] * len(ids),
            logp=None if self.logp is None else [[self.logp] * len(c) for c in ids],
            mask=masks if self.masked else None,
        )


def run_with(sampler, folder, **overrides):
    run = trainer(folder, **{**SETTINGS, **overrides})
    run.sampler = sampler
    run.train()
    return run


def test_weights_are_handed_over_once_for_the_windows_of_a_step(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 3}
    sampler = Canned()
    assert isinstance(sampler, Sampler) and isinstance(trainer(tmp_path).sampler, HFSampler)
    versions = []

    class Watched(GRPOTrainer):
        def batch(self, rollouts, advantages, evaluate=False):
            versions.append(rollouts.version)
            now = zip(sampler.synced[-1], self.model.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in now)
            return super().batch(rollouts, advantages, evaluate)

    run = run_with(sampler, tmp_path, cls=Watched, **settings)
    assert len(sampler.synced) == 3 and len(sampler.asked) == 6
    assert versions == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(sampler.synced[0][0], sampler.synced[1][0])
    before = len(sampler.synced)
    run.evaluate(dataset(3))
    assert len(sampler.synced) == before + 1


def test_an_overridden_generate_never_asks_the_sampler(tmp_path):
    sampler = Canned()

    class Own(GRPOTrainer):
        def generate(self, examples, num_generations):
            return Canned().sample([self.encode(e["prompt"]) for e in examples], num_generations)

    own = run_with(sampler, tmp_path / "own", cls=Own)
    plugged = run_with(Canned(), tmp_path / "plugged")
    assert not sampler.asked
    for a, b in zip(own.model.parameters(), plugged.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_log_probs_of_the_sampler_reach_the_loss(tmp_path, monkeypatch):
    plain = run_with(Canned(), tmp_path / "plain", max_steps=1)
    said = []
    monkeypatch.setattr(grpo.logger, "warning_once", lambda text, *args: said.append(text % args))
    given = run_with(Canned(logp=-3.0), tmp_path / "given", max_steps=1)
    assert said and "rollout_correction='sequence_mask'" in said[0]
    micro = given.window.micro_batches[0]
    assert torch.equal(micro.rollout_logp, torch.full(micro.packed.ids.shape, -3.0))
    assert plain.window.micro_batches[0].rollout_logp is None
    pairs = zip(plain.model.parameters(), given.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_log_probs_that_the_policy_agrees_with_change_nothing(tmp_path):
    """Equal log-probs are a ratio of 1: the correction is a factor of 1."""

    class Honest(GRPOTrainer):
        def generate(self, examples, num_generations):
            rollouts = super().generate(examples, num_generations)
            micro = super().batch(rollouts, torch.ones(len(rollouts.completion_ids)))[0]
            self.model.eval()
            flat = completion_logprobs(self.model, micro.packed, self.args.temperature)
            self.model.train()
            lengths = [len(c) for c in rollouts.completion_ids]
            rollouts.logp = [part.tolist() for part in flat.split(lengths)]
            return rollouts

    # a first step of AdamW makes a whole step of a gradient of 1e-9
    plain = run_with(Canned(), tmp_path / "plain", max_steps=1, optim="sgd")
    honest = run_with(Canned(), tmp_path / "honest", max_steps=1, cls=Honest, optim="sgd")
    assert honest.window.micro_batches[0].rollout_logp is not None
    for a, b in zip(plain.model.parameters(), honest.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_tokens_that_the_policy_did_not_write_are_not_trained_or_counted(tmp_path):
    whole = {"skip_inactive_completions": False}
    run = run_with(Canned(masked=True), tmp_path / "masked", max_steps=1, **whole)
    micro = run.window.micro_batches[0]
    assert 0 < micro.mask.sum() < micro.packed.ids.numel()
    (denominator,) = run.denominators([micro])
    assert denominator == micro.mask.sum()
    assert run.loss(run.model, micro)[1]["tokens"] == micro.mask.sum()
    # with the truncated ones left out too
    run.args.mask_truncated_completions = True
    rollouts = Canned(masked=True).sample([[3, 4]], 4)
    rollouts.truncated = [True, False, True, False]
    both = run.batch(rollouts, torch.zeros(4))[0]
    owned = torch.tensor(
        [m and not t for r, t in zip(rollouts.mask, rollouts.truncated, strict=True) for m in r]
    )
    assert torch.equal(both.mask, owned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": [[1]]}, "prompt_ids: expected 2 entries, one for each completion, got 1"),
        ({"truncated": [True] * 3}, "truncated: expected 2 entries"),
        ({"logp": [[0.0]]}, "logp: expected 2 entries"),
        ({"logp": [[0.0, 0.0], []]}, r"logp\[1\]: expected 1 entries, one for each token, got 0"),
        ({"mask": [[True], [True]]}, r"mask\[0\]: expected 2 entries, one for each token, got 1"),
    ],
)
def test_rollouts_of_unequal_lengths_are_refused(change, message):
    given = {"prompt_ids": [[1], [2]], "completion_ids": [[3, 4], [5]], "truncated": [False] * 2}
    with pytest.raises(ValueError, match=message):
        Rollouts(**{**given, **change})
