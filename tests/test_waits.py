"""How often a call waits for an accelerator: never with max_rows, else once, and once more for the
rows that have a derivative. Values are those of a CPU."""

import sys

import pytest
import torch
from device import Device, OnDevice, kernels, to_device
from loss_cases import make_case, preset_config, relative

from grpo_fast import PRESETS, LossConfig, linear_logprob, linear_policy_loss, logprob, policy_loss
from grpo_fast.chunks import COLUMNS_FIRST, FIXED_BYTES
from grpo_fast.reference import head_logits
from grpo_fast.token_losses import token_losses

GIVEN = ("", "old", "old ref", "rollout", "old rollout ref")
CAPACITY = 20


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """Calls with tensors of the device use kernels; the others do what they always do."""
    from grpo_fast import backend

    def select(device):
        return kernels(device) if torch.device(device).type == "meta" else backend.select(device)

    for name in ("loss", "logits_loss", "logprob", "attach"):
        monkeypatch.setattr(sys.modules[f"grpo_fast.{name}"], "select", select)


def options_of(case, given: str) -> dict:
    """Keyword arguments of a call, on the host."""
    options = {"mask": case.mask}
    for name in given.split():
        options[f"{name}_logp"] = case.ref_logp if name == "ref" else case.old_logp + 0.01
    return options


def moved(options: dict) -> dict:
    return {k: to_device(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def both(function, leaves, wanted, fixed, options, expected_waits):
    """A call on the host and one on the device: the same loss, metrics and gradients."""
    results = []
    for place in (lambda t: t.clone(), to_device):
        mine = [place(t).requires_grad_(flag) for t, flag in zip(leaves, wanted, strict=True)]
        on_device = place is to_device
        rest = [place(t) for t in fixed]
        given = moved(options) if on_device else options
        with Device() as device:
            loss, metrics = function(*mine, *rest, **given)
            waits = list(device.waits)
            if any(wanted):
                (loss * 2.0).backward()
            # backward adds none
            assert device.waits == waits
        assert not on_device or len(waits) == expected_waits, waits
        found = [loss, *metrics.values(), *(m.grad for m in mine if m.grad is not None)]
        results.append([t.value if isinstance(t, OnDevice) else t.detach() for t in found])
    assert len(results[0]) == len(results[1])
    for want, got in zip(*results, strict=True):
        assert got.dtype == want.dtype
        same = torch.equal(got.isnan(), want.isnan())
        assert same and relative(got.nan_to_num(), want.nan_to_num()) < 1e-5


def linear(case, config, given, wanted, waits, **more):
    leaves = [torch.nan_to_num(case.hidden), case.weight]
    options = {"config": config, **options_of(case, given), **more}
    both(linear_policy_loss, leaves, wanted, (case.ids, case.advantages), options, waits)


def from_logits(case, config, given, waits, **more):
    leaf = torch.nan_to_num(head_logits(case.hidden, case.weight))
    options = {"config": config, **options_of(case, given), **more}
    fixed = (case.ids, case.advantages)
    both(policy_loss, [leaf], [True], fixed, options, waits)
    both(policy_loss, [leaf], [False], fixed, options, waits)


def tight(case) -> int:
    """Workspace of 16 rows."""
    V, H = case.weight.shape
    return FIXED_BYTES + 16 * 4 * (V + 3 * H)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("loss_type", PRESETS)
def test_nothing_is_read_back_with_max_rows(loss_type, given):
    case = make_case()
    config = preset_config(loss_type, beta=0.1 if "ref" in given else 0.0)
    for wanted in ([True, True], [True, False], [False, False]):
        linear(case, config, given, wanted, 0, max_rows=CAPACITY, workspace_bytes=tight(case))
    from_logits(case, config, given, 0, max_rows=CAPACITY)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_nothing_is_read_back_where_backward_goes_through_the_vocabulary(loss_type, monkeypatch):
    monkeypatch.setitem(COLUMNS_FIRST, "meta", 1024)
    case = make_case(lengths=(9, 9, 9, 9))
    config = preset_config(loss_type)
    more = {"workspace_bytes": tight(case)}
    linear(case, config, "old", [True, True], 0, max_rows=36, **more)
    linear(case, config, "old", [True, True], 2, **more)


MORE = [
    {"top_entropy_quantile": 0.5},
    {"entropy_coef": 0.1},
    {"off_policy_mask_threshold": 0.1, "importance_sampling_level": "sequence"},
    {"rollout_correction": "token_truncate"},
    {"rollout_correction": "geometric_mask"},
]


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("given", GIVEN)
def test_nothing_is_read_back_with_max_rows_whatever_the_option(more, given):
    case = make_case()
    config = preset_config("dapo", **more)
    for wanted in ([True, True], [True, False]):
        linear(case, config, given, wanted, 0, max_rows=CAPACITY)
    from_logits(case, config, given, 0, max_rows=CAPACITY)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo", "gmpo", "vespo", "rloo"])
def test_a_call_waits_once_and_two_passes_twice(loss_type, given):
    case = make_case()
    config = preset_config(loss_type)
    for workspace in (None, tight(case)):
        for wanted in ([True, True], [True, False], [False, False]):
            options = {**options_of(case, given), "workspace_bytes": workspace}
            hidden, weight = case.hidden.clone(), case.weight.clone()
            head = (hidden.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1]))
            args = (*head, case.ids, case.advantages)
            plan = linear_policy_loss(*args, config=config, explain=True, **options)
            waits = 2 if plan.route == "two_passes" else 1
            linear(case, config, given, wanted, waits, workspace_bytes=workspace)
    from_logits(case, config, given, 1)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo"])
@pytest.mark.parametrize("max_rows", [None, CAPACITY])
def test_boundaries_on_the_device_cost_no_wait(loss_type, max_rows):
    case = make_case()
    m, config = case.mask, preset_config(loss_type)
    cu = torch.cat((torch.zeros(1, dtype=torch.long), m.sum(1).cumsum(0)))
    leaves = [case.hidden[m], case.weight]
    options = {"config": config, "cu_seqlens": cu, "old_logp": case.old_logp[m]}
    fixed = (case.ids[m], case.advantages)
    options["max_rows"] = None if max_rows is None else int(m.sum())
    both(linear_policy_loss, leaves, [True, True], fixed, options, int(max_rows is None))


@pytest.mark.parametrize("cu", [[0, 4, 3, 9], [1, 4, 6, 9], [0, 4, 6, 8], [0, 40, 41, 9], [0]])
def test_bad_boundaries_on_the_device_are_named_or_poison(cu):
    case = make_case(lengths=(9,))
    cu = torch.tensor(cu)
    hidden, ids = to_device(case.hidden[0]), to_device(case.ids[0])
    args = (hidden, to_device(case.weight), ids, to_device(torch.randn(9)))
    given = {"config": LossConfig(loss_type="gspo"), "cu_seqlens": to_device(cu)}
    with Device(), pytest.raises(ValueError, match="cu_seqlens: expected boundaries rising from 0"):
        linear_policy_loss(*args, **given)
    if cu.numel() > 1:
        with Device() as device:
            loss, _ = linear_policy_loss(*args, max_rows=9, **given)
        assert loss.value.isnan() and device.waits == []


def test_as_many_sequences_as_tokens_and_an_empty_one():
    case = make_case(lengths=(3,))
    hidden, ids = to_device(case.hidden[0]), to_device(case.ids[0])
    args = (hidden, to_device(case.weight), ids, to_device(torch.randn(3)))
    for cu, good in (([0, 1, 2, 3], True), ([0, 0, 2, 3], False)):
        given = {"cu_seqlens": to_device(torch.tensor(cu))}
        with Device() as device:
            loss, _ = linear_policy_loss(*args, max_rows=3, **given)
            assert loss.value.isfinite() == good and device.waits == []
            if good:
                linear_policy_loss(*args, **given)
                continue
            with pytest.raises(ValueError, match=r"advantages: expected \(N,\) or \(S,\), which"):
                linear_policy_loss(*args, **given)


def test_log_probs_wait_once_and_backward_once_more():
    case = make_case()
    logits = head_logits(torch.nan_to_num(case.hidden), case.weight)
    hidden = to_device(torch.nan_to_num(case.hidden)).requires_grad_()
    weight, ids, mask = (to_device(t) for t in (case.weight, case.ids, case.mask))
    weight.requires_grad_()
    with Device() as device:
        out = linear_logprob(hidden, weight, ids, mask=mask)
        assert len(device.waits) == 1
        out.logp.sum().backward()
        assert len(device.waits) == 2
    logits = to_device(logits).requires_grad_()
    with Device() as device:
        logprob(logits, ids, mask=mask).logp.sum().backward()
        assert len(device.waits) == 1


@pytest.mark.parametrize("value", [torch.tensor(7.0), torch.tensor(7), 7])
def test_numbers_on_the_host_cost_no_wait(value):
    case = make_case()
    config = LossConfig(top_entropy_quantile=0.5)
    more = {"max_rows": CAPACITY, "entropy_threshold": 1.0}
    hidden, weight = to_device(torch.nan_to_num(case.hidden)), to_device(case.weight)
    given = moved(options_of(case, "old"))
    with Device() as device:
        args = (hidden, weight, to_device(case.ids), to_device(case.advantages))
        linear_policy_loss(*args, config=config, denominator=value, **given, **more)
        linear_policy_loss(
            *args, config=config, **given, **more | {"entropy_threshold": torch.tensor(1.0)}
        )
    assert device.waits == []


def test_the_count_counts():
    """What a device would wait for is seen."""
    value = to_device(torch.arange(4.0))
    with Device() as device:
        value.sum().item()
        value[value > 1]
        value.nonzero()
        value.cpu()
        value.tolist()
        torch.tensor([1.0, 2.0]).to(value.device)
        torch.tensor([1.0, 2.0]).to(value.device, non_blocking=True)
        torch.repeat_interleave(value, value.long())
        torch.repeat_interleave(value, value.long(), output_size=6)
        bool((value == 1).any())
    assert len(device.waits) == 8


@pytest.mark.parametrize("given", ["", "old", "old ref", "rollout"])
@pytest.mark.parametrize("loss_type", PRESETS)
def test_token_losses_wait_for_nobody(loss_type, given):
    """Trainers call them for each sample."""
    case = make_case()
    config = preset_config(loss_type, beta=0.1 if "ref" in given else 0.0)
    leaf = (case.old_logp + 0.05).nan_to_num(-1.0)

    def losses(logp, advantages, **options):
        out = token_losses(logp, advantages, config=config, **options)
        return out.loss.sum(), {"kl": out.kl, "ratio": out.ratio}

    both(losses, [leaf], [True], (case.advantages,), options_of(case, given), 0)
