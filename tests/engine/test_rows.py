"""The row functions of a backend, called directly: a temperature for each row, the entropy bonus,
the rollout factor, and every objective. Truth is float64 with autograd, written out here."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import generator, relative
from policy_arguments import arguments

from grpo_fast import policy_loss
from grpo_fast.engine import torch_backend
from grpo_fast.engine.backend import select
from grpo_fast.objective import objectives
from grpo_fast.presets import KL_ESTIMATORS, OBJECTIVES

B, T, V = 3, 7, 83
SCALE = 1.3
COEF = 0.05
LOW, HIGH = 0.8, 1.28
# fp32, gradients row by row; what is observed is 3e-7 for values and 3e-6 for the worst row, whose
# tanh is near 1
VALUES, GRADIENTS = 1e-6, 5e-6
pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("backend")]


class Rows:
    """Logits (B, T, V) and everything of shape (N,) that goes with them; a quarter is masked, and
    NaN there."""

    def __init__(self, seed: int = 0, by_row: bool = True):
        g = generator(seed)
        n = B * T
        self.logits = 2 * torch.randn(B, T, V, generator=g)
        self.ids = torch.randint(V, (n,), generator=g)
        self.logits.view(n, V)[torch.arange(n), self.ids] += 4.0
        self.active = torch.arange(n) % 4 != 2
        self.advantages, self.weights = torch.randn(n, generator=g), torch.rand(n, generator=g)
        self.inv_temperature = 1 / (0.3 + 2 * torch.rand(n, generator=g)) if by_row else 0.7
        self.noise = 0.3 * torch.randn(n, generator=g)
        self.upstream = torch.randn(3, n, generator=g)
        self.logits.view(n, V)[~self.active] = math.nan
        for vector in (self.inv_temperature, self.advantages, self.weights, self.noise):
            if isinstance(vector, torch.Tensor):
                vector[~self.active] = math.nan

    def exact(self, softcap: float | None) -> tuple[torch.Tensor, ...]:
        """float64: logits (n, V) as a leaf, logp, entropy and lse of the active rows."""
        leaf = self.logits.view(B * T, V)[self.active].double().requires_grad_()
        z = SCALE * leaf
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        by_row = isinstance(self.inv_temperature, torch.Tensor)
        inverse = self.inv_temperature[self.active][:, None] if by_row else self.inv_temperature
        z = z * inverse
        log_p = z.log_softmax(1)
        logp = log_p.gather(1, self.ids[self.active][:, None])[:, 0]
        return leaf, logp, -(log_p.exp() * log_p).sum(1), z.logsumexp(1)

    def options(self, softcap: float | None) -> dict[str, object]:
        """Keywords that all three row functions take."""
        return {
            "active": self.active,
            "inv_temperature": self.inv_temperature,
            "scale": SCALE,
            "softcap": softcap,
        }

    def policy(self, softcap: float | None, out: torch.Tensor | None, **given) -> torch.Tensor:
        """Terms of the clipped surrogate with the caller's `given`."""
        terms = torch.full((6, B * T), math.nan)
        choice = arguments("clip", "k3", "k3", (LOW, HIGH, math.inf, 0.0), beta=0.0)
        rows = (self.logits, self.ids, self.advantages, self.weights)
        select(self.logits.device).policy(
            *rows, terms, out, **choice, **given, **self.options(softcap)
        )
        return terms


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_row_temperature(softcap):
    """Statistics and dlogits of rows that have a temperature each; masked ones may be NaN."""
    rows = Rows()
    backend = select(rows.logits.device)
    leaf, *want = rows.exact(softcap)
    stats = torch.full((4, B * T), math.nan)
    backend.logprob_fwd(rows.logits, rows.ids, stats, **rows.options(softcap))
    got = (stats[0], stats[1], stats[2] + stats[3])
    for value, truth in zip(got, want, strict=True):
        assert relative(value[rows.active], truth) < VALUES and not value[~rows.active].any()
    upstream = rows.upstream[:, rows.active].double()
    sum((u * w).sum() for u, w in zip(upstream, want, strict=True)).backward()
    dlogp, dentropy, dlse = rows.upstream
    out = torch.full_like(rows.logits, math.nan)
    backend.logprob_bwd(
        rows.logits,
        rows.ids,
        stats,
        dlogp,
        out,
        dlse=dlse,
        dentropy=dentropy,
        **rows.options(softcap),
    )
    flat = out.view(B * T, V)
    # row by row: a wrong factor of a flat row must not hide behind a peaked one
    for value, truth in zip(flat[rows.active], leaf.grad, strict=True):
        assert relative(value, truth) < GRADIENTS
    assert not flat[~rows.active].any()


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_equal_row_temperatures_change_no_bit(softcap):
    """(N,) equal temperatures and the number itself: the same statistics, terms and dlogits."""
    results = []
    for by_row in (False, True):
        rows = Rows(by_row=False)
        number = torch.tensor(0.7).item()
        rows.inv_temperature = torch.full((B * T,), number) if by_row else number
        options = {**rows.options(softcap), "scale": 1.0}
        backend = select(rows.logits.device)
        stats, out = torch.empty(4, B * T), torch.empty_like(rows.logits)
        backend.logprob_fwd(rows.logits, rows.ids, stats, **options)
        backend.logprob_bwd(rows.logits, rows.ids, stats, rows.upstream[0], out, **options)
        results.append((stats, out))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_entropy_bonus_of_the_one_pass_loss(softcap, by_row):
    """`policy` with entropy_coef: weight * (clipped surrogate - coef * entropy) and its dlogits.

    A clipped row keeps the gradient of its entropy, a row of weight 0 has none.
    """
    rows = Rows(by_row=by_row)
    rows.weights[::5] = 0.0
    leaf, logp, entropy, _ = rows.exact(softcap)
    old = torch.full((B * T,), math.nan)
    old[rows.active] = logp.detach().float() + rows.noise[rows.active]
    advantages, weights = (v[rows.active].double() for v in (rows.advantages, rows.weights))
    ratio = torch.exp(logp - old[rows.active].double())
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(LOW, HIGH) * advantages)
    (dlogp,) = torch.autograd.grad((weights * surrogate).sum(), logp, retain_graph=True)
    loss = weights * (surrogate - COEF * entropy)
    loss.sum().backward()
    out = torch.full_like(rows.logits, math.nan)
    terms = rows.policy(softcap, out, entropy_coef=COEF, old_logp=old)
    want = (loss, logp, entropy, ratio, torch.zeros_like(loss), dlogp)
    for value, truth in zip(terms[:, rows.active], want, strict=True):
        assert relative(value, truth) < VALUES or not (value.any() or truth.any())
    flat = out.view(B * T, V)
    for value, truth, weight in zip(flat[rows.active], leaf.grad, weights, strict=True):
        assert relative(value, truth) < GRADIENTS if weight else not value.any()
    assert not flat[~rows.active].any()
    clipped = (dlogp == 0) & (weights > 0)
    assert 0 < clipped.sum() < clipped.numel() and flat[rows.active][clipped].any(1).all()
    assert torch.equal(rows.policy(softcap, None, entropy_coef=COEF, old_logp=old), terms)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_rollout_weight_of_the_one_pass_loss(masks, on_policy):
    """`policy` with rollout_logp: the advantage times p(old) / p(rollout), truncated to its bounds
    or 0 outside of them, 1 where the rollout's log-prob is NaN; no gradient through it."""
    rows = Rows(seed=4)
    leaf, logp, _, _ = rows.exact(None)
    old = torch.full((B * T,), math.nan)
    old[rows.active] = logp.detach().float() + rows.noise[rows.active] / 3
    base = logp.detach() if on_policy else old[rows.active].double()
    rollout = torch.full((B * T,), math.nan)
    rollout[rows.active] = base.float() + 3 * rows.noise[rows.active]
    rollout[::6] = math.nan
    low, high = 0.6, 1.5
    q = torch.exp(base - rollout[rows.active].double())
    factor = torch.where((q < low) | (q > high), 0.0, q) if masks else q.clamp(low, high)
    factor = torch.where(torch.isnan(q), 1.0, factor)
    for some in (q < low, q > high, (q > low) & (q < high), torch.isnan(q)):
        assert some.any()
    advantages = rows.advantages[rows.active].double() * factor
    ratio = torch.exp(logp - (logp.detach() if on_policy else old[rows.active].double()))
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(LOW, HIGH) * advantages)
    loss = rows.weights[rows.active].double() * surrogate
    loss.sum().backward()
    out = torch.full_like(rows.logits, math.nan)
    terms = rows.policy(
        None,
        out,
        old_logp=None if on_policy else old,
        rollout_logp=rollout,
        rollout_weight=objectives.rollout_weight,
        rollout_bounds=(low, high),
        rollout_mask=masks,
    )[:, rows.active]
    for value, truth in zip((terms[0], terms[1], terms[3]), (loss, logp, ratio), strict=True):
        assert relative(value, truth) < VALUES
    flat = out.view(B * T, V)[rows.active]
    assert relative(flat, leaf.grad) < GRADIENTS
    assert not flat[factor == 0].any() and (not masks or (factor == 0).any())


PARAMETERS = {
    "clip": (LOW, HIGH, 1.6, 0.0),
    "surrogate": (0.0,) * 4,
    "sapo": (1.0, 1.05, 0.0, 0.0),
    "cispo": (0.9, 1.2, 0.0, 0.0),
    "reinforce": (0.0,) * 4,
    "vespo": (2.0, 3.0, 3.0, 2.0),
    "dppo_tv": (0.03, 0.04, 20.0, 0.0),
    "dppo_kl": (0.002, 0.003, 20.0, 0.0),
}


def test_every_objective_is_compared():
    assert set(PARAMETERS) == set(OBJECTIVES)


@pytest.mark.triton
@pytest.mark.parametrize("objective", PARAMETERS)
def test_objective_equals_the_torch_backend(objective):
    """Terms and dlogits of an objective with each KL estimator and none: tokens near the old and
    reference policies, tokens 25 nats away, and one whose logits hold a NaN."""
    g = generator(9)
    n = 24
    logits, ids = torch.randn(1, n, V, generator=g), torch.randint(V, (n,), generator=g)
    logits[0, torch.arange(n), ids] += 3.0
    logp = logits[0].log_softmax(1)[torch.arange(n), ids]
    logits[0, 3, 0] = math.nan
    near, bad = torch.arange(n) < 18, torch.arange(n) == 3
    away = torch.tensor([25.0, -25.0]).repeat(n // 2)
    old, ref, rollout = (
        logp + torch.where(near, 0.3 * torch.randn(n, generator=g), sign * away)
        for sign in (1.0, -1.0, 1.0)
    )
    given = (logits, ids, torch.randn(n, generator=g), torch.rand(n, generator=g))
    extras = {
        "rollout_logp": rollout,
        "rollout_weight": objectives.rollout_weight,
        "rollout_bounds": (0.5, 2.0),
        "entropy_coef": COEF,
    }
    for i, kl in enumerate((None, *KL_ESTIMATORS)):
        # each estimator stands for another one's gradient too
        gradient = kl and KL_ESTIMATORS[i % len(KL_ESTIMATORS)]
        choice = arguments(
            objective, kl or "k3", gradient or "k3", PARAMETERS[objective], 0.1 if kl else 0.0
        )
        choice |= {"old_logp": old, "ref_logp": ref if kl else None}
        if i % 2:
            choice |= {**extras, "rollout_mask": i == 1}
        results = []
        for policy in (select(logits.device).policy, torch_backend.policy):
            terms, out = torch.full((6, n), math.nan), torch.full_like(logits, math.nan)
            policy(*given, terms, out, **choice)
            results.append((*terms, *out[0].T))
            assert terms[[0, 5]][:, bad].isnan().all() and out[0, bad].isnan().all()
            assert terms[:, ~bad].isfinite().all() and out[0, ~bad].isfinite().all()
        for term, (ours, theirs) in enumerate(zip(*results, strict=True)):
            # exp(d) - d - 1 of a small d loses a digit
            bound = 4 * VALUES if term == 4 else VALUES
            for some in (near & ~bad, ~near):
                if theirs[some].any() or ours[some].any():
                    assert relative(ours[some], theirs[some]) < bound, (kl, term)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_gradient_over_packed_logits_of_a_padded_vocabulary(factor):
    """(N, V) rows with a gap between them: written in place and scaled where they are."""
    ids, advantages = torch.arange(6), torch.linspace(-1, 1, 6)
    grads = []
    for inplace in (False, True):
        base = torch.linspace(-3, 3, 6 * 48).view(6, 48).requires_grad_()
        logits = (base * 1.0)[:, :40]
        loss, _ = policy_loss(logits, ids, advantages, inplace=inplace)
        (loss * factor).backward()
        grads.append(base.grad)
    assert torch.equal(*grads) and grads[0].any() and not grads[0][:, 40:].any()
