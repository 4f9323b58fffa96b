"""What the losses say of each token, on every route, against float64."""

import pytest
import torch
from device import Device, to_device
from loss_cases import configurations, make_case, preset_config, relative, tight

from grpo_fast import linear_policy_loss, policy_loss, reference
from grpo_fast.objective.terms import TokenTerms

BOUND = 2e-5
pytestmark = pytest.mark.usefixtures("accelerator")


def want(case, config, use_old: bool, use_ref: bool) -> TokenTerms:
    mask = case.mask
    finite = torch.where(mask[..., None], case.hidden, torch.zeros_like(case.hidden)).double()
    logits = reference.head_logits(finite, case.weight.double())
    ids = torch.where(mask, case.ids, torch.zeros_like(case.ids))
    logp, entropy, _ = reference.logprob(logits, ids, config.temperature)
    zero = torch.zeros_like(logp)
    old = torch.where(mask, case.old_logp.double(), zero) if use_old else logp
    advantages = case.advantages.double()[:, None].expand(mask.shape)
    _, ratio = reference._objective(config, logp, old, advantages, mask, None)
    if config.level == "sequence_clipped" or config.preset.objective == "vespo":
        ratio = (logp - old).exp()
    kl = zero
    if use_ref:
        kl = reference.kl_divergence(logp, case.ref_logp.double(), config.kl_estimator)
    found = [torch.where(mask, t, zero) for t in (logp, entropy, kl)]
    ones = torch.ones_like(ratio)
    return TokenTerms(found[0], found[1], torch.where(mask, ratio.expand_as(ones), ones), found[2])


def close(got: TokenTerms, exact: TokenTerms, mask) -> None:
    for name in TokenTerms._fields:
        mine, theirs = getattr(got, name), getattr(exact, name)
        assert mine.shape == mask.shape and not mine.requires_grad
        assert relative(mine, theirs) < BOUND, name
        fill = 1.0 if name == "ratio" else 0.0
        assert (mine[~mask] == fill).all(), name


@pytest.mark.parametrize("config, use_old, use_ref", configurations())
def test_equal_float64(config, use_old, use_ref):
    case = make_case()
    exact = want(case, config, use_old, use_ref)
    options = {"config": config, "mask": case.mask, "per_token": True}
    options |= {"old_logp": case.old_logp} if use_old else {}
    options |= {"ref_logp": case.ref_logp} if use_ref else {}
    routes = set()
    for trained in ((True, True), (True, False), (False, False)):
        for more in ({}, {"workspace_bytes": tight(case)}, {"max_rows": 20}, {"max_rows": 36}):
            leaves = [
                t.clone().requires_grad_(f)
                for t, f in zip((case.hidden, case.weight), trained, strict=True)
            ]
            args = (*leaves, case.ids, case.advantages)
            plan = linear_policy_loss(*args, explain=True, **options, **more)
            routes.add(plan.route)
            loss, metrics, got = linear_policy_loss(*args, **options, **more)
            close(got, exact, case.mask)
    assert len(routes) >= 2
    del options["per_token"]
    same = linear_policy_loss(*args, **options, **more)
    assert len(same) == 2 and torch.equal(same[0], loss) and same[1].keys() == metrics.keys()
    options["per_token"] = True
    logits = reference.head_logits(case.hidden, case.weight)
    _, _, got = policy_loss(logits, case.ids, case.advantages, **options)
    close(got, exact, case.mask)


def test_packed():
    case = make_case()
    m = case.mask
    config = preset_config("gspo", beta=0.1)
    exact = want(case, config, True, True)
    cu = torch.cat((torch.zeros(1, dtype=torch.long), m.sum(1).cumsum(0)))
    per_token = {"old_logp": case.old_logp[m], "ref_logp": case.ref_logp[m], "per_token": True}
    args = (case.hidden[m], case.weight, case.ids[m], case.advantages)
    got = linear_policy_loss(*args, config=config, cu_seqlens=cu, **per_token)[2]
    for name in TokenTerms._fields:
        assert relative(getattr(got, name), getattr(exact, name)[m]) < BOUND
        assert getattr(got, name).shape == (int(m.sum()),)


def test_rows_that_were_left_out_are_as_if_masked():
    case = make_case()
    advantages = torch.where(torch.arange(len(case.advantages)) == 0, 0.0, case.advantages)
    args = (case.hidden, case.weight, case.ids, advantages)
    given = {"mask": case.mask, "old_logp": case.old_logp, "per_token": True}
    whole = linear_policy_loss(*args, **given)[2]
    part = linear_policy_loss(*args, skip_inactive_forward=True, **given)[2]
    assert not part.logp[0].any() and (part.ratio[0] == 1).all() and whole.logp[0].any()
    for mine, theirs in zip(part, whole, strict=True):
        assert torch.equal(mine[1:], theirs[1:])


def test_log_probs_are_the_old_ones_of_the_next_step():
    """With equal weights the ratio of that step is exactly 1."""
    case = make_case()
    args = (case.hidden, case.weight, case.ids, case.advantages)
    logp = linear_policy_loss(*args, mask=case.mask, per_token=True)[2].logp
    _, metrics = linear_policy_loss(*args, mask=case.mask, old_logp=logp)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "gmpo"])
def test_they_cost_no_wait(loss_type):
    case = make_case()
    hidden = to_device(torch.nan_to_num(case.hidden))
    args = [hidden, *(to_device(t) for t in (case.weight, case.ids, case.advantages))]
    options = {"mask": to_device(case.mask), "old_logp": to_device(case.old_logp)}
    options["config"] = preset_config(loss_type)
    for more in ({}, {"max_rows": 20}):
        with Device() as device:
            linear_policy_loss(*args, **options, **more)
            waits = len(device.waits)
            linear_policy_loss(*args, per_token=True, **options, **more)
            assert len(device.waits) == 2 * waits


def test_not_under_compile():
    case = make_case()
    call = torch.compile(
        lambda h: linear_policy_loss(h, case.weight, case.ids, case.advantages, per_token=True),
        fullgraph=True,
        backend="eager",
    )
    with pytest.raises(Exception, match="per_token: expected False under torch.compile, got True"):
        call(case.hidden)
