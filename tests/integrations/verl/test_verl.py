"""The presets inside verl's `ppo_loss`, on nested tensors, against verl's own losses."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("verl", reason="needs verl, which `make test-verl` lays over the environment")
from tiny_verl import actor, batch, model, nested, run
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.workers.utils.padding import no_padding_2_padding

from grpo_fast import LossConfig, reference
from grpo_fast.integrations.verl import losses as verl_losses
from grpo_fast.integrations.verl import patch as adapter
from grpo_fast.presets import PRESETS

TOLERANCE = 1e-6
# a loss is a sum of terms near 1 of both signs
FLOOR = 0.1
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")
MODES += ("seq-mean-token-sum-norm",)
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
TV = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.06}
KL = {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02}
# ours, verl's, and options with which some tokens are clipped, some capped and some neither
SAME = {
    "fast_dapo": ("vanilla", {**CLIP, "clip_ratio_c": 1.35}),
    "fast_grpo": ("vanilla", {**CLIP, "clip_ratio_c": 1.35}),
    "fast_bnpo": ("vanilla", {**CLIP, "clip_ratio_c": 1.35}),
    "fast_dr_grpo": ("vanilla", {**CLIP, "clip_ratio_c": 1.35}),
    "fast_ppo": ("vanilla", {**CLIP, "clip_ratio_c": 1.35}),
    "fast_gspo": ("gspo", {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03}),
    "fast_gspo_token": ("gspo", {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03}),
    "fast_cispo": ("cispo", CLIP),
    "fast_gpg": ("gpg", {}),
    "fast_reinforce": ("gpg", {}),
    "fast_dppo_tv": ("dppo_tv", {**TV, "clip_ratio_c": 1.2}),
    "fast_dppo_kl": ("dppo_kl", {**KL, "clip_ratio_c": 1.2}),
}


@pytest.fixture(autouse=True)
def quiet():
    # the mode is not the preset's own in most of these
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has loss_agg_mode")
        yield


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to the largest entry."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def compare(ours: str, theirs: str, options: dict, **how) -> dict[str, float]:
    case = how.pop("case", None) or batch(token_advantages=ours != "fast_gspo")
    want, want_grad, want_metrics = run(actor(theirs, **options), case, **how)
    loss, grad, metrics = run(actor(ours, **options), case, **how)
    assert abs(loss - want) <= TOLERANCE * max(abs(want.item()), FLOOR)
    assert distance(grad, want_grad) <= TOLERANCE
    for name, value in want_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE * FLOOR), name
    assert want_grad.any()
    return metrics


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SAME)
def test_equals_the_loss_of_verl(name, mode, weights):
    theirs, options = SAME[name]
    if name == "fast_gspo" and (mode != "seq-mean-token-mean" or weights):
        pytest.skip("verl's gspo is GSPO-token, which is GSPO only where a sequence is averaged")
    metrics = compare(name, theirs, {**options, "loss_agg_mode": mode}, weights=weights)
    # a comparison on tokens that no bound touches would show nothing
    if "clip_ratio_low" in options:
        assert 0 < metrics["actor/pg_clipfrac"] < 1
    if "clip_ratio_c" in options:
        assert 0 < metrics["actor/pg_clipfrac_lower"] < 1


@pytest.mark.parametrize("weights", [False, True])
def test_sapo_equals_the_loss_of_verl(weights):
    """verl's ignores the mode."""
    options = {"tau_pos": 1.1, "tau_neg": 1.4, "loss_agg_mode": "seq-mean-token-mean"}
    compare("fast_sapo", "sapo", options, weights=weights)


def test_gmpo_equals_geo_mean_of_verl():
    """In gradient and loss; verl counts clipped tokens there and ours the ratio of the sequence."""
    options = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "loss_agg_mode": MODES[3]}
    case = batch()
    want, want_grad, _ = run(actor("geo_mean", **options), case)
    loss, grad, _ = run(actor("fast_gmpo", **options), case)
    assert abs(loss - want) <= TOLERANCE * max(abs(want.item()), FLOOR)
    assert distance(grad, want_grad) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["fast_dapo", "fast_cispo", "fast_gspo_token"])
def test_kl_entropy_and_the_global_batch_stay_those_of_verl(name, mode):
    theirs, options = SAME[name]
    extra = {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coeff": 0.01}
    window = {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9}
    options = {**options, **extra, "loss_agg_mode": mode, "loss_scale_factor": 11}
    metrics = compare(name, theirs, options, window=window, weights=True)
    assert metrics["kl_loss"] > 0 and metrics["actor/entropy_loss"] > 0


@pytest.mark.parametrize("name", [name for name in SAME if not name.startswith("fast_gspo")])
def test_bit_for_bit(name):
    """The loss; its gradient is rounded once or twice elsewhere."""
    theirs, options = SAME[name]
    for seed in range(10):
        case = batch(seed=seed, token_advantages=True)
        want, want_grad, _ = run(actor(theirs, **options), case, weights=True)
        loss, grad, _ = run(actor(name, **options), case, weights=True)
        assert torch.equal(loss, want) and distance(grad, want_grad) <= 2e-7


@pytest.mark.parametrize("loss_type", PRESETS)
def test_equals_the_float64_reference(loss_type):
    case = batch(token_advantages=False)
    config = actor(f"fast_{loss_type}", **CLIP, clip_ratio_c=1.4, tau_pos=1.2, tau_neg=1.3)
    loss, grad, _ = run(config, case, weights=True)

    data = case.data.clone().double()
    old, advantages, mask, factor = (
        data[name].to_padded_tensor(0.0)
        for name in ("old_log_probs", "advantages", "response_mask", "rollout_is_weights")
    )
    output, leaf = case.output(torch.float64, entropy=False)
    logp = no_padding_2_padding(output["log_probs"], data)
    settings = verl_losses.loss_config(loss_type, config, {})
    tokens, _ = reference._objective(settings, logp, old, advantages, mask.bool(), None)
    want = (tokens * factor * mask).sum() / mask.sum()
    want.backward()
    assert abs(loss - want) <= 1e-5 * max(abs(want.item()), FLOOR)
    assert distance(grad, leaf.grad.float()) <= 1e-5


def test_masked_tokens_change_nothing():
    case = batch(token_advantages=True)
    config = actor("fast_dapo", **CLIP)
    want = run(config, case, weights=True)
    for name in ("old_log_probs", "advantages", "rollout_is_weights"):
        parts = list(case.data[name].unbind())
        masks = case.data["response_mask"].unbind()
        poisoned = [torch.where(m > 0, p, torch.nan) for p, m in zip(parts, masks, strict=True)]
        case.data[name] = nested(poisoned)
    got = run(config, case, weights=True)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_own_losses_by_name():
    adapter.register("narrow", "dapo", epsilon=0.05, epsilon_high=0.06)
    options = {"loss_agg_mode": "token-mean"}
    case = batch(token_advantages=True)
    got = run(actor("narrow", **options), case)
    want = run(actor("vanilla", clip_ratio_low=0.05, clip_ratio_high=0.06, **options), case)
    assert torch.equal(got[0], want[0]) and distance(got[1], want[1]) <= TOLERANCE
    other = run(actor("fast_dapo", **options), case)
    assert not torch.equal(got[0], other[0])
    adapter.register("capped", "dapo", delta=1.35)
    got = run(actor("capped", **options), case)
    want = run(actor("vanilla", clip_ratio_c=1.35, **options), case)
    assert torch.equal(got[0], want[0])


def test_patching_again_keeps_what_was_registered():
    adapter.register("fast_dapo", "dapo", epsilon=0.01)
    adapter.patch_verl()
    assert POLICY_LOSS_REGISTRY["fast_dapo"].args == ("dapo", {"epsilon": 0.01})
    adapter.register("fast_dapo", "dapo")


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("mine", "dappo"), {}, "loss_type: .*'dapo'"),
        (("mine", "dapo"), {"beta": 0.1}, "beta: expected an option of this adapter"),
        (
            ("mine", "gpg"),
            {"epsilon": 0.1},
            "epsilon: expected no value with gpg, which has no use",
        ),
        (
            ("mine", "cispo"),
            {"epsilon": 0.1},
            "epsilon: expected no value with cispo, which has no use",
        ),
        (
            ("mine", "sapo"),
            {"epsilon_high": 0.1},
            "epsilon_high: expected no value with sapo, which has no use",
        ),
        (
            ("mine", "cispo"),
            {"delta": 3.0},
            "delta: expected no value with cispo, which has no use",
        ),
        (("mine", "dapo"), {"delta": 1.1}, "delta: expected a finite number > 1.2"),
        (("mine", "dapo"), {"epsilon": -1.0}, "epsilon: expected"),
        (
            ("mine", "dapo"),
            {"vespo_k_pos": 1.0},
            "vespo_k_pos: expected 2.0 with dapo, since only vespo",
        ),
        (("vanilla", "dapo"), {}, "name: expected one that verl does not have yet, got 'vanilla'"),
    ],
)
def test_wrong_registrations(arguments, options, words):
    before = dict(POLICY_LOSS_REGISTRY)
    with pytest.raises(ValueError, match=words):
        adapter.register(*arguments, **options)
    assert before == POLICY_LOSS_REGISTRY


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fast_dapo", {"clip_ratio_c": 1.1}, "^clip_ratio_c: expected a finite number > 1.2"),
        ("fast_dapo", {"clip_ratio_low": -0.1}, "^clip_ratio_low: expected"),
        ("fast_sapo", {"tau_pos": 0.0}, "^tau_pos: expected"),
    ],
)
def test_wrong_options_by_their_names_in_verl(name, options, words):
    with pytest.raises(ValueError, match=words):
        run(actor(name, **options), batch())


def test_another_mode_than_the_presets_own_is_said():
    with warnings.catch_warnings(), pytest.warns(UserWarning, match="grpo has loss_agg_mode=seq"):
        warnings.simplefilter("always")
        run(actor("fast_grpo", loss_agg_mode="token-mean"), batch())


def test_importing_registers_and_unpatching_takes_back():
    names = {f"fast_{name}" for name in PRESETS}
    assert names <= set(adapter.registered()) and all(map(get_policy_loss_fn, names))
    adapter.unpatch_verl()
    try:
        assert not adapter.registered()
        with pytest.raises(ValueError, match="Unsupported loss mode"):
            get_policy_loss_fn("fast_dapo")
    finally:
        adapter.patch_verl()
    with adapter.patch_verl():
        assert names <= set(adapter.registered())
    assert not adapter.registered()
    adapter.patch_verl()


def test_by_the_configuration_of_a_model(tmp_path):
    """As a worker does it: verl imports what external_lib names when it reads its model's config,
    before it builds the model."""
    model("Gemma2").save_pretrained(tmp_path)
    code = f"""
from verl.models.transformers import dense_common
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import HFModelConfig
config = HFModelConfig(
    path={str(tmp_path)!r}, load_tokenizer=False, external_lib="grpo_fast.integrations.verl"
)
print(get_policy_loss_fn("fast_vespo").args, dense_common.forward_with_torch_backend.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    wanted = "('vespo', {}) grpo_fast.integrations.verl.head"
    assert done.stdout.strip().endswith(wanted), done.stderr


def test_another_version_warns():
    code = "import verl; verl.__version__ = '0.8.0'\nimport grpo_fast.integrations.verl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserWarning: grpo_fast.integrations.verl works with verl 0.9.1; 0.8.0" in done.stderr


def test_without_verl():
    code = "import sys; sys.modules['verl'] = None\nimport grpo_fast.integrations.verl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: grpo_fast.integrations.verl works with verl 0.9.1 (pip")


def test_presets_need_no_more_than_the_actor_has():
    for loss_type in PRESETS:
        settings = verl_losses.loss_config(loss_type, actor("vanilla"), {})
        assert isinstance(settings, LossConfig) and settings.loss_type == loss_type
