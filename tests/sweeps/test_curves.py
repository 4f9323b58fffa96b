"""The first 30 steps of `full_curves.py`, and whether its statistic can fail."""

import functools

import full_curves
import numpy as np
import pytest
import torch
from full_curves import REFERENCE_SEEDS, STEPS, Job, distance, judge, run
from toy_rl import COMPLETION, LAYERS, PROMPT, STOPS, Tiny, sample, score


@functools.cache
def short(setting, arm):
    # 30 steps where bf16 is compared, enough for the paired comparison elsewhere
    return run(Job(setting, arm, 0), 30 if setting == "dapo" else 12)


def gap(setting, arm, curve, steps):
    """Largest difference from the reference's run of the same seed over the first steps."""
    ours, theirs = (np.array(getattr(short(setting, a), curve)) for a in (arm, "reference"))
    return abs(ours - theirs)[:steps].max()


@pytest.mark.parametrize("setting", full_curves.SETTINGS)
def test_fp32_follows_the_reference(setting):
    # the loss is about 0.1 and the entropy 5 nats; ten steps are five batches of sampled tokens
    assert gap(setting, "fp32", "reward", 10) == 0
    assert gap(setting, "fp32", "loss", 10) < 2e-5
    assert gap(setting, "fp32", "entropy", 10) < 2e-4
    clipped = short(setting, "fp32").clipped
    # the first step on a batch is on-policy, the second is not
    assert max(clipped[::2]) == 0 and 0 < max(clipped[1::2]) < 1
    # completions of unequal length: the mask matters
    assert 0 < short(setting, "fp32").length[0] < COMPLETION


def test_bf16_weights_stay_near_and_a_wrong_loss_does_not():
    near, far = (
        gap("dapo", arm, "entropy", 30) for arm in ("bf16", "gradient of the target logit only")
    )
    assert near < 0.5 * far, (near, far)


def test_sampling_with_a_cache_is_the_full_forward():
    torch.manual_seed(3)
    model = Tiny(tied=False)
    ids = torch.randint(200, (3, PROMPT + COMPLETION))
    caches = [[] for _ in range(LAYERS)]
    parts = [model(ids[:, :PROMPT], caches)]
    parts += [model(ids[:, i : i + 1], caches, i) for i in range(PROMPT, ids.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-5)


def test_reward_ends_at_a_stop_token():
    generator = torch.Generator().manual_seed(0)
    completions, mask = sample(Tiny(tied=False), torch.full((64, PROMPT), 20), generator)
    stops = completions < STOPS
    first = torch.where(stops.any(1), stops.float().argmax(1) + 1, COMPLETION)
    assert torch.equal(mask.sum(1), first) and mask[:, 0].all() and not mask.all()
    ids = torch.full((1, COMPLETION), STOPS)
    ids[0, 4] = 0
    mask = torch.arange(COMPLETION)[None] < 5
    assert score(ids, mask, torch.tensor([0])).item() == 4 / 16
    assert score(ids, mask, torch.tensor([1])).item() == 0


def curves(seeds, shift=0.0):
    """Runs that differ from each other by slow noise of deviation 1, plus a shift."""
    generator = np.random.default_rng(sum(seeds))
    slow = full_curves.smooth(generator.normal(size=(len(seeds), STEPS + 19)) * 20**0.5)
    return slow + generator.normal(size=(len(seeds), STEPS)) * 0.1 + shift


def test_the_band_holds_its_own_kind_and_no_other():
    held = [judge(distance(curves(REFERENCE_SEEDS), curves((s, 50, 70, 90)))) for s in range(200)]
    assert np.mean(held) > 0.85
    for shift in (6.0, -6.0):
        assert not judge(distance(curves(REFERENCE_SEEDS), curves((10, 50, 70, 90), shift)))
    # a run that breaks off at the end only, and one that is wrong throughout and ends well
    late = curves((10, 50, 70, 90))
    late[:, -10:] += 60
    assert not judge(distance(curves(REFERENCE_SEEDS), late))
    early = curves((10, 50, 70, 90))
    early[:, :200] += 8
    assert not judge(distance(curves(REFERENCE_SEEDS), early))


def test_nan_is_outside():
    broken = curves((10, 50))
    broken[0, 100:] = np.nan
    assert not judge(distance(curves(REFERENCE_SEEDS), broken))
