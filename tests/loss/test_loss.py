"""The policy losses against the float64 reference, on the backend of the run."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import BOUND, Case, configurations, make_case, relative, truth

from grpo_fast import LossConfig, linear_policy_loss, policy_loss, reference
from grpo_fast.engine.chunks import FIXED_BYTES
from grpo_fast.presets import OBJECTIVES

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("backend")]


def name(value):
    if hasattr(value, "loss_type"):
        kl = (
            f"{value.kl_estimator}{'r' if value.use_bias_correction_kl else ''}"
            if value.beta
            else "nokl"
        )
        return f"{value.loss_type}-{value.level}-{value.weights}-{kl}"
    return None


def pack(case: Case, sequences: bool = True) -> tuple[torch.Tensor, ...]:
    """The unmasked tokens as (N, ...) tensors with cu_seqlens."""
    m = case.mask
    cu = torch.cat((torch.zeros(1, dtype=torch.long), m.sum(1).cumsum(0)))
    return case.hidden[m], case.ids[m], case.old_logp[m], case.ref_logp[m], cu


def check_linear(config: LossConfig, use_old: bool, use_ref: bool, packed: bool, **head) -> None:
    """Loss, dhidden and dweight of `linear_policy_loss` against the float64 reference."""
    case = make_case()
    want = truth(case, config, use_old=use_old, use_ref=use_ref, **head)
    weight = case.weight.clone().requires_grad_()
    if packed:
        hidden, ids, old, ref, cu = pack(case)
        mask = None
    else:
        hidden, ids, old, ref, cu = case.hidden, case.ids, case.old_logp, case.ref_logp, None
        mask = case.mask
    hidden = hidden.clone().requires_grad_()
    loss, metrics = linear_policy_loss(
        hidden,
        weight,
        ids,
        case.advantages,
        config=config,
        mask=mask,
        cu_seqlens=cu,
        old_logp=old if use_old else None,
        ref_logp=ref if use_ref else None,
        **head,
    )
    loss.backward()
    assert abs(loss.item() - want[0].item()) <= BOUND * max(abs(want[0].item()), 1e-2)
    dhidden = want[1][case.mask] if packed else want[1]
    assert relative(hidden.grad, dhidden) < BOUND
    assert relative(weight.grad, want[2]) < BOUND
    assert metrics["tokens"].item() == case.mask.sum().item()
    assert metrics["nonfinite_tokens"].item() == 0
    check_clipping(config, use_old, metrics)


def check_clipping(config: LossConfig, use_old: bool, metrics: dict) -> None:
    """With old log-probs near the policy's some tokens are clipped and some are not."""
    share = metrics["clip_ratio"].item()
    if use_old and config.ratio_bounds == (0.0, math.inf):
        # sapo, reinforce, vespo, dppo: no bound of a ratio that could be left
        assert share == 0.0
    elif use_old:
        assert 0.0 < share < 1.0
        # with a KL term a clipped token still has a gradient
        if config.beta == 0 and OBJECTIVES[config.preset.objective].through_ratio:
            assert 0 < metrics["active_rows"].item() < metrics["tokens"].item()
    else:
        assert metrics["ratio_min"].item() == metrics["ratio_max"].item() == 1.0


@pytest.mark.parametrize("config, old, ref", configurations(), ids=name)
def test_linear_policy_loss_equals_reference(backend, config, old, ref):
    # a kernel sees no difference between the two, and the interpreter takes its time
    for packed in (False, True) if backend.name == "torch" else (old,):
        check_linear(config, old, ref, packed)


def check_logits(config: LossConfig, use_old: bool, use_ref: bool, inplace: bool) -> None:
    """Loss and dlogits of `policy_loss` on `logits[:, :-1]`, NaN in every masked place."""
    case = make_case()
    want = truth(case, config, use_old=use_old, use_ref=use_ref)
    B, T = case.ids.shape
    full = torch.full((B, T + 1, case.weight.shape[0]), float("nan"))
    full[:, :T] = reference.head_logits(case.hidden, case.weight)
    leaf = full.requires_grad_()
    # (leaf + 0) so that an in-place gradient does not touch a leaf
    logits = (leaf + 0)[:, :-1]
    loss, _ = policy_loss(
        logits,
        case.ids,
        case.advantages,
        config=config,
        mask=case.mask,
        old_logp=case.old_logp if use_old else None,
        ref_logp=case.ref_logp if use_ref else None,
        inplace=inplace,
    )
    loss.backward()
    assert abs(loss.item() - want[0].item()) <= BOUND * max(abs(want[0].item()), 1e-2)
    got = leaf.grad[:, :-1]
    assert relative(got, want[3]) < BOUND
    assert torch.equal(got[~case.mask], torch.zeros_like(got[~case.mask]))


@pytest.mark.parametrize("config, old, ref", configurations(), ids=name)
def test_policy_loss_equals_reference(backend, config, old, ref):
    for inplace in (False, True) if backend.name == "torch" else (old,):
        check_logits(config, old, ref, inplace)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("objective", ["dapo", "grpo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_everything_together(level, objective, frozen):
    """Bias, softcap, scale, KL and per-token advantages, a third of them exactly 0: values,
    gradients and metrics."""
    case = make_case(lengths=(9, 4, 0, 6))
    mask = case.mask
    g = torch.Generator(torch.get_default_device()).manual_seed(7)
    bias = torch.randn(77, generator=g)
    advantages = torch.randn(4, 9, generator=g)
    advantages[:, ::3] = 0.0
    config = LossConfig(
        loss_type=objective,
        importance_sampling_level=level,
        epsilon_high=0.28 if objective != "cispo" else 1.2,
        beta=0.2,
        temperature=0.9,
    )
    head = {"softcap": 6.0, "logit_scale": 0.7}
    finite = torch.where(mask[..., None], case.hidden, torch.zeros_like(case.hidden))
    exact = [t.double().clone().requires_grad_() for t in (finite, case.weight, bias)]
    logits = reference.head_logits(*exact, **head)
    ids = torch.where(mask, case.ids, torch.zeros_like(case.ids))
    logp, entropy, _ = (t.detach() for t in reference.logprob(logits, ids, 0.9))
    old, ref = ((logp + 0.3 * torch.randn(4, 9, generator=g)).float() for _ in range(2))
    given = {"config": config, "mask": mask}
    want = reference.policy_loss(
        logits,
        case.ids,
        advantages.double(),
        **given,
        old_logp=old.double(),
        ref_logp=ref.double(),
    )
    want.backward()
    leaves = [case.hidden.clone().requires_grad_(), case.weight.clone(), bias.clone()]
    if not frozen:
        leaves[1:] = [leaf.requires_grad_() for leaf in leaves[1:]]
    loss, metrics = linear_policy_loss(
        *leaves[:2],
        case.ids,
        advantages,
        **given,
        old_logp=old,
        ref_logp=ref,
        bias=leaves[2],
        **head,
    )
    loss.backward()
    assert abs(loss.item() - want.item()) <= BOUND * max(abs(want.item()), 1e-2)
    for leaf, truth_ in zip(leaves, exact, strict=True):
        if leaf.requires_grad:
            assert relative(leaf.grad, truth_.grad) < BOUND

    gap = torch.where(mask, logp - old, torch.zeros_like(logp))
    if level == "sequence":
        gap = (gap.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand(4, 9)
    kl = reference.kl_divergence(logp, ref.double(), "k3")
    _metrics_agree(metrics, config, gap.exp()[mask], advantages[mask], entropy[mask], kl[mask])


def _metrics_agree(metrics, config, ratio, advantages, entropy, kl) -> None:
    """`metrics` against their definitions on the unmasked tokens, float64."""
    low, high = config.ratio_bounds
    expected = {
        "entropy": entropy.mean(),
        "kl": kl.mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "ratio_min": ratio.min(),
        "clip_low": ((ratio < low) & (advantages < 0)).double().mean(),
        "clip_high": ((ratio > high) & (advantages > 0)).double().mean(),
    }
    for name, value in expected.items():
        assert abs(metrics[name].item() - value.item()) <= 1e-5 * max(1.0, abs(value.item())), name
    assert metrics["clip_ratio"] == metrics["clip_low"] + metrics["clip_high"]


@pytest.mark.parametrize("use_old", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_many_chunks(level, use_old):
    """45 tokens, 16 rows at a time: the same loss and gradients as the reference; and 47 of which
    some are masked, with a sequence that does not fit a chunk."""
    for lengths in ((9, 9, 9, 9, 9), (40, 0, 7)):
        case = make_case(lengths=lengths)
        config = LossConfig(importance_sampling_level=level, beta=0.1)
        want = truth(case, config, use_old=use_old, use_ref=True)
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        V, H = weight.shape
        loss, metrics = linear_policy_loss(
            hidden,
            weight,
            case.ids,
            case.advantages,
            config=config,
            mask=case.mask,
            old_logp=case.old_logp if use_old else None,
            ref_logp=case.ref_logp,
            workspace_bytes=FIXED_BYTES + 16 * 4 * (V + 3 * H),
        )
        loss.backward()
        assert metrics["active_rows"] == sum(lengths)
        for got, exact in zip((loss, hidden.grad, weight.grad), want[:3], strict=True):
            assert relative(got, exact) < BOUND


def test_zero_advantages_leave_the_backward():
    """Without a KL a token of advantage 0 is counted inactive; with one it keeps its gradient."""
    case = make_case()
    advantages = torch.where(torch.arange(9) % 2 == 0, 0.0, 1.0).expand(4, 9).contiguous()
    args = (torch.nan_to_num(case.hidden), case.weight.clone().requires_grad_(), case.ids)
    _, metrics = linear_policy_loss(*args, advantages, mask=case.mask)
    assert metrics["active_rows"] == (case.mask & (advantages != 0)).sum()
    config = LossConfig(beta=0.1)
    _, metrics = linear_policy_loss(
        *args, advantages, mask=case.mask, ref_logp=case.ref_logp, config=config
    )
    assert metrics["active_rows"] == case.mask.sum()


@pytest.mark.parametrize("objective", ["grpo", "cispo"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_skipped_rows(level, per_token, objective):
    """Without the rows that cannot matter: the same loss and gradients; what they hold is not read.

    Means of metrics are those of the rows that are left, and `tokens` counts all.
    """
    case = make_case(lengths=(9, 4, 7, 6))
    advantages = torch.tensor([1.3, 0.0, -0.7, 0.0])
    alive = (advantages != 0)[:, None].expand(4, 9)
    if per_token:
        advantages = advantages[:, None].repeat(1, 9)
        advantages[0, ::2] = 0.0
        # a sequence-level ratio is made of all tokens of its sequence
        alive = advantages != 0 if level == "token" else alive
    config = LossConfig(
        loss_type=objective,
        importance_sampling_level=level,
        epsilon_high=5.0 if objective == "cispo" else None,
        temperature=0.9,
    )
    given = {"config": config, "mask": case.mask, "old_logp": case.old_logp}
    results = []
    for skip in (False, True):
        hidden, weight = case.hidden.clone(), case.weight.clone().requires_grad_()
        if skip:
            hidden[~alive] = float("nan")
        hidden.requires_grad_()
        loss, metrics = linear_policy_loss(
            hidden, weight, case.ids, advantages, **given, skip_inactive_forward=skip
        )
        loss.backward()
        results.append((loss.detach(), weight.grad, hidden.grad, metrics))
    (loss, dweight, dhidden, full), (loss_, dweight_, dhidden_, fewer) = results
    assert relative(loss_, loss) < 1e-6 and relative(dweight_, dweight) < 1e-6
    assert relative(dhidden_, dhidden) < 1e-6 and not dhidden_[~alive].any()
    assert full["tokens"] == fewer["tokens"] == case.mask.sum()
    assert full["active_rows"] == fewer["active_rows"]
    _, entropy, _ = reference.logprob(
        reference.head_logits(torch.nan_to_num(case.hidden).double(), case.weight.double()),
        torch.where(case.mask, case.ids, torch.zeros_like(case.ids)),
        0.9,
    )
    want = entropy[case.mask & alive].mean()
    assert abs(fewer["entropy"] - want) < 1e-5 * want and fewer["entropy"] != full["entropy"]
    logits = reference.head_logits(torch.nan_to_num(case.hidden), case.weight)
    logits[~(case.mask & alive)] = float("nan")
    leaf = logits.requires_grad_()
    loss_, fewer = policy_loss(leaf, case.ids, advantages, **given, skip_inactive_forward=True)
    loss_.backward()
    assert relative(loss_, loss) < 1e-5 and not leaf.grad[~alive].any()


@pytest.mark.parametrize("beta, weighted", [(0.0, False), (1e-9, False), (1e-9, True)])
def test_beyond_the_clamp(beta, weighted):
    """Log-ratios of +-22 nats: value e^20 and e^-20, no gradient through the ratio, as in
    reference."""
    case = make_case(lengths=(9, 6, 4, 6))
    shift = torch.tensor([22.0, -22.0, 19.0, -19.0])[:, None]
    # exp(19) * 1e-8 is near 1: beyond the clamp a gradient through the ratio would be seen
    advantages = torch.tensor([-1e-8, -0.5, -1e-8, 0.7])
    config = LossConfig(beta=beta, use_bias_correction_kl=weighted, temperature=0.9)
    old, ref = case.old_logp - shift, case.ref_logp + 21.0
    batch = type(case)(
        case.hidden, case.weight, case.ids, case.mask, advantages, old.float(), ref.float()
    )
    want = truth(batch, config, use_old=True, use_ref=beta > 0)
    weight = case.weight.clone().requires_grad_()
    loss, metrics = linear_policy_loss(
        case.hidden,
        weight,
        case.ids,
        advantages,
        config=config,
        mask=case.mask,
        old_logp=batch.old_logp,
        ref_logp=batch.ref_logp if beta > 0 else None,
    )
    loss.backward()
    # exp(20) magnifies the rounding of a log-prob to some 1e-5
    assert relative(loss, want[0]) < 1e-4 and relative(weight.grad, want[2]) < 1e-4
    assert 0 < metrics["clamped_ratios"] < metrics["tokens"]


@pytest.mark.parametrize("upstream", [1 / 7, 32768.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype, upstream):
    """`policy_loss` of half-precision logits with an odd or a huge upstream factor: promise 8."""
    case = make_case(V=500, H=64, lengths=(30, 1, 24, 17), seed=5)
    clean = torch.where(case.mask[..., None], case.hidden, torch.zeros_like(case.hidden))
    logits = reference.head_logits(clean, case.weight).to(dtype)
    config = LossConfig(epsilon_high=0.28, temperature=0.9)
    args = {"config": config, "mask": case.mask, "old_logp": case.old_logp}
    denominator = 1e6
    grads = []
    for kind in ("exact", "torch", "ours"):
        leaf = (logits.double() if kind == "exact" else logits.clone()).requires_grad_()
        if kind == "ours":
            loss, _ = policy_loss(leaf, case.ids, case.advantages, denominator=denominator, **args)
        else:
            loss = reference.policy_loss(
                leaf if kind == "exact" else leaf.float(),
                case.ids,
                case.advantages,
                denominator=denominator,
                **args,
            )
        (loss * upstream).backward()
        grads.append(leaf.grad)
    assert torch.isfinite(grads[2]).all()
    assert relative(grads[2], grads[0]) <= 1.5 * relative(grads[1], grads[0])


def test_steep_ratios_in_fp16():
    """A negative advantage at a log-ratio of 12 has a derivative that fp16 cannot hold."""
    case = make_case(dtype=torch.float16)
    weight = case.weight.float().requires_grad_()
    loss, _ = linear_policy_loss(
        torch.nan_to_num(case.hidden),
        weight.half(),
        case.ids,
        -torch.ones(4),
        mask=case.mask,
        old_logp=case.old_logp - 12.0,
    )
    (loss / 1e4).backward()
    assert torch.isfinite(loss) and torch.isfinite(weight.grad).all() and weight.grad.any()
