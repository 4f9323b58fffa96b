"""The custom loss and the head for prime-rl; against prime-rl itself where it is installed."""

from __future__ import annotations

import subprocess
import sys
import types

import prime_rl_standin
import pytest
import torch
from loss_cases import configurations, relative

from grpo_fast import PRESETS, reference

prime_rl_standin.install()
from prime_rl.trainer.models.layers import lm_head  # noqa: E402
from prime_rl.trainer.rl.loss import LossInputs, LossOutputs  # noqa: E402

from grpo_fast.integrations import prime_rl as adapter  # noqa: E402

BOUND = 2e-5
# prime-rl's own business
THEIRS = ("loss_type", "aggregation", "temperature", "max_completion_length", "text")


@pytest.fixture(autouse=True)
def patched():
    adapter.patch_prime_rl()
    yield
    lm_head._SequenceChunkedLogProbEntropyFn = adapter._Theirs
    adapter.patch_prime_rl()


def sample(
    T: int = 12, seed: int = 0, advantage: float | None = 1.1, spread: float = 0.3
) -> LossInputs:
    """Old log-probs near the policy's; three tokens are masked, and what they hold is NaN."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(T, generator=g) * 3 - 0.05
    old, ref = ((logp + spread * torch.randn(T, generator=g)).clamp(max=-0.01) for _ in range(2))
    mask = torch.ones(T, dtype=torch.bool)
    mask[[0, 5, 6]] = False
    drawn = torch.randn(T, generator=g)
    advantages = drawn if advantage is None else torch.full((T,), advantage)
    nan = torch.where(mask, 0.0, torch.nan)
    return LossInputs(
        (logp + nan).requires_grad_(),
        old + nan,
        ref + nan,
        advantages + nan,
        mask,
        torch.rand(T, generator=g) + nan,
    )


def options_of(config) -> dict:
    default = type(config)(config.loss_type, aggregation="token_mean")
    names = [n for n in vars(config) if n not in THEIRS]
    if PRESETS[config.loss_type].objective not in (
        "clip",
        "cispo",
        "surrogate",
        "dppo_tv",
        "dppo_kl",
    ):
        # they have no bound, and the reference, which gets all of the configuration, agrees
        names.remove("epsilon_high")
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(default, n)}


def want(config, given: LossInputs, ref) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of weight * token loss and its gradient, in float64."""
    mask = given.loss_mask[None]
    logp, old, advantages, factor = (
        torch.where(mask, t.detach()[None].double(), 0.0)
        for t in (
            given.trainer_logprobs,
            given.inference_logprobs,
            given.advantages,
            given.loss_weights,
        )
    )
    logp.requires_grad_()
    tokens, ratio = reference._objective(config, logp, old, advantages, mask, None)
    if config.beta:
        ref = torch.where(mask, ref[None].double(), logp.detach())
        kl = reference.kl_divergence(logp, ref, config.kl_estimator)
        if config.kl_gradient is not None:
            other = reference.kl_divergence(logp, ref, config.kl_gradient)
            kl = other + (kl - other).detach()
        tokens = tokens + config.beta * (ratio * kl if config.use_bias_correction_kl else kl)
    loss = (torch.where(mask, tokens, 0.0) * factor).sum()
    loss.backward()
    return loss.detach(), logp.grad[0]


CONFIGURATIONS = [
    (config, use_ref)
    for config, old, use_ref in configurations()
    if old and config.weights == PRESETS[config.loss_type].weights
]


@pytest.mark.filterwarnings("ignore:loss_type='cispo' without")
@pytest.mark.parametrize("config, use_ref", CONFIGURATIONS)
def test_equals_the_float64_reference(config, use_ref):
    for seed, advantage in ((0, 1.1), (1, -0.8)):
        given = sample(seed=seed, advantage=advantage)
        out = adapter.policy_loss(given, loss_type=config.loss_type, **options_of(config))
        assert isinstance(out, LossOutputs) and out.loss.dim() == 0
        out.loss.backward()
        loss, grad = want(config, given, given.ref_logprobs)
        assert abs(out.loss - loss) <= BOUND * max(abs(loss), 0.1)
        assert relative(given.trainer_logprobs.grad, grad) < BOUND
        assert not given.trainer_logprobs.grad[~given.loss_mask].any()
        assert ("kl" in out.metrics) == use_ref
        assert all(t.dim() == 0 and t.isfinite() for t in out.metrics.values())


@pytest.mark.parametrize("weights", [True, False])
def test_gradient_of_the_default_loss_of_version_0_8_0(weights):
    """A ratio * A inside the trust region of DPPO, and kl_tau times the squared log-ratio."""
    for seed in range(10):
        given = sample(T=200, seed=seed, advantage=None, spread=0.6)
        if not weights:
            given.loss_weights = None
        options = {"loss_type": "dppo_tv", "epsilon": 0.2, "beta": 0.002, "kl_estimator": "k2"}
        options |= {"use_bias_correction_kl": False, "kl_against": "inference"}
        adapter.policy_loss(given, **options).loss.backward()

        mask = given.loss_mask
        logp = given.trainer_logprobs.detach()[mask].double().requires_grad_()
        old, a = given.inference_logprobs[mask].double(), given.advantages[mask].double()
        gap = logp.exp() - old.exp()
        drop = torch.where(a > 0, gap > 0.2, gap < -0.2).detach()
        assert drop.any() and not drop.all()
        tokens = -torch.where(drop, 0.0, a) * (logp - old).exp() + 1e-3 * (logp - old) ** 2
        factor = given.loss_weights[mask].double() if weights else 1.0
        (tokens * factor).sum().backward()
        assert relative(given.trainer_logprobs.grad[mask], logp.grad) < 1e-6


def test_metrics():
    given = sample(T=40, advantage=None)
    out = adapter.policy_loss(given, "dapo", epsilon=0.2, epsilon_high=0.28, beta=0.1)
    mask, a = given.loss_mask, given.advantages
    ratio = (given.trainer_logprobs.detach() - given.inference_logprobs).exp()
    clipped = mask & torch.where(a > 0, ratio > 1.28, ratio < 0.8)
    assert out.metrics["importance_ratio"] == pytest.approx(ratio[mask].mean().item(), rel=1e-6)
    assert out.metrics["is_clipped"] == pytest.approx((clipped.sum() / mask.sum()).item())
    assert 0 < out.metrics["is_clipped"] < 1 and out.metrics["kl"] > 0
    assert not any(t.requires_grad for t in out.metrics.values())


def test_a_sample_without_a_token():
    given = sample()
    given.loss_mask = torch.zeros_like(given.loss_mask)
    out = adapter.policy_loss(given, beta=0.1)
    out.loss.backward()
    assert out.loss == 0 and not given.trainer_logprobs.grad.any()
    assert all(t == 0 for t in out.metrics.values())


def test_inputs_of_older_versions():
    """With teacher_logprobs and without loss_weights."""
    given = sample()
    given.loss_weights = None
    want = adapter.policy_loss(given, beta=0.1).loss
    given.teacher_logprobs = given.ref_logprobs
    del given.ref_logprobs, given.loss_weights
    # the default of the class would stand in for the one that is missing
    given = types.SimpleNamespace(**vars(given))
    assert torch.equal(adapter.policy_loss(given, beta=0.1).loss, want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "dppo"}, "loss_type: .*did you mean 'ppo'|loss_type: "),
        ({"epsilon_hi": 0.3}, "epsilon_hi: .* did you mean 'epsilon_high'"),
        ({"temperature": 0.7}, "temperature: expected an option of this adapter"),
        ({"aggregation": "sequence_mean"}, "aggregation: expected an option of this adapter"),
        ({"epsilon": -0.1}, "epsilon: expected"),
        ({"beta": 0.1}, "ref_logprobs: expected them with beta > 0"),
        ({"kl_against": "old"}, "kl_against: expected 'reference' or 'inference'"),
        ({"epsilon": [0.1, 0.2]}, "epsilon: expected a number, a string or a bool"),
        (
            {"loss_type": "gpg", "epsilon": 0.1},
            "epsilon: expected no value with gpg, which has no use for it",
        ),
    ],
)
def test_wrong_options(options, words):
    given = sample()
    given.ref_logprobs = None
    with pytest.raises(ValueError, match=words):
        adapter.policy_loss(given, **options)


def test_wrong_tensors_by_their_names_in_prime_rl():
    given = sample()
    given.inference_logprobs = given.inference_logprobs[:-1]
    with pytest.raises(ValueError, match="^inference_logprobs: "):
        adapter.policy_loss(given)
    for shape in ((12, 1), (1,)):
        given = sample()
        given.loss_weights = torch.ones(shape)
        with pytest.raises(
            ValueError, match=r"^loss_weights: expected floating-point tensor \(12,\)"
        ):
            adapter.policy_loss(given)
    given = sample()
    given.loss_mask = given.loss_mask[1:]
    with pytest.raises(ValueError, match="^loss_mask"):
        adapter.policy_loss(given)


def head_case(dtype=torch.float32):
    torch.manual_seed(0)
    head = lm_head.FusedOutputLinear(24, 77, 5).to(dtype)
    hidden = torch.randn(2, 9, 24, dtype=dtype, requires_grad=True)
    ids = torch.randint(77, (2, 9))
    temperature = torch.rand(2, 9) + 0.5
    return head, hidden, ids, temperature


def test_head_equals_float64():
    """With a temperature for each token, and through the layer that prime-rl puts in."""
    head, hidden, ids, temperature = head_case()
    out = head(hidden, labels=ids, temperature=temperature)
    upstream = torch.randn(2, 9)
    (out["logprobs"] * upstream).sum().backward()
    double = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    log_p = (double @ weight.T / temperature[..., None].double()).log_softmax(-1)
    logp = log_p.gather(-1, ids[..., None])[..., 0]
    (logp * upstream).sum().backward()
    assert (out["logprobs"] - logp).abs().max() < 1e-5
    assert (out["entropy"] + (log_p.exp() * log_p).sum(-1)).abs().max() < 1e-5
    assert relative(hidden.grad, double.grad) < 1e-6
    assert relative(head.weight.grad, weight.grad) < 1e-6


def test_head_is_ours_until_unpatched():
    head, hidden, ids, temperature = head_case()
    with adapter.patch_prime_rl():
        assert lm_head._SequenceChunkedLogProbEntropyFn is adapter._FastLogProb
        ours = head(hidden, labels=ids, temperature=temperature)
    assert lm_head._SequenceChunkedLogProbEntropyFn is adapter._Theirs
    theirs = head(hidden, labels=ids, temperature=temperature)
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
    lm_head._SequenceChunkedLogProbEntropyFn = object
    with pytest.raises(ValueError, match="head has been replaced since"):
        adapter.unpatch_prime_rl()


def test_a_head_of_other_arguments_stays_as_it_is(monkeypatch):
    class Newer(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, hidden, weight, labels, inv_temperature, chunk_size, sampling_mask, both=False
        ):
            raise NotImplementedError

    monkeypatch.setattr(adapter, "_Theirs", Newer)
    monkeypatch.setattr(lm_head, "_SequenceChunkedLogProbEntropyFn", Newer)
    with pytest.warns(UserWarning, match="0.8.0's head; this one has other arguments"):
        adapter.patch_prime_rl()
    assert lm_head._SequenceChunkedLogProbEntropyFn is Newer


def test_wrong_labels_by_name():
    head, hidden, ids, temperature = head_case()
    with pytest.raises(ValueError, match="^labels: "):
        head(hidden, labels=ids + 77, temperature=temperature)


def test_without_prime_rl():
    code = "import sys; sys.modules['prime_rl'] = None\nimport grpo_fast.integrations.prime_rl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: grpo_fast.integrations.prime_rl works with prime-rl 0.8, ")
