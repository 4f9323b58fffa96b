"""What both backends must show; `test_loss.py` runs it on torch, `test_triton_loss.py` on the
kernels."""

from __future__ import annotations

import torch
from loss_cases import Case, make_case, relative, truth

from grpo_fast import LossConfig, linear_policy_loss, policy_loss, reference

# fp32 inputs; what is observed is near 3e-7
BOUND = 2e-5


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
    if use_old:
        assert 0.0 < share < 1.0
        # with a KL term a clipped token still has a gradient
        if config.beta == 0 and config.preset.through_ratio:
            assert 0 < metrics["active_rows"].item() < metrics["tokens"].item()
    else:
        assert metrics["ratio_min"].item() == metrics["ratio_max"].item() == 1.0


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
