"""The promises of the loss, one test each, on the backend of the run.

Those of a log-prob alone, 4 and 8 and parts of 3, 5 and 7, are in `engine/test_logprob.py`. What a
promise says of an accelerator alone (no atomics, no length as a compile-time constant, int64
offsets in the compiled code) is shown by `test_aot.py`; those of the trainer by its own tests.
"""

import pytest
import torch
from loss_cases import generator, make_case, preset_config, relative

from grpo_fast import PRESETS, LossConfig, linear_logprob, linear_policy_loss, policy_loss
from grpo_fast.engine.backend import select
from grpo_fast.engine.chunks import FIXED_BYTES, LinearHead
from grpo_fast.engine.logprob import head_stats
from grpo_fast.objective.weights import count

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("backend")]


def small_workspace(V: int, H: int, rows: int = 16) -> int:
    """Bytes that hold so many rows of logits."""
    return FIXED_BYTES + rows * 4 * (V + 3 * H)


def test_promise_01_logits_are_fp32_and_backward_sees_those_of_forward(backend):
    g = generator(0)
    hidden, weight = (torch.randn(n, 64, generator=g).bfloat16() for n in (40, 300))
    exact = hidden.double() @ weight.double().T
    head = LinearHead(hidden, weight, None, select(backend.device), small_workspace(300, 64, 32))
    first = torch.cat([c.logits[0].clone() for c in head.chunks(None, 40)])
    assert first.dtype == torch.float32
    # what bf16 would have rounded away is there
    assert relative(first, exact) < 1e-6 < 1e-3 < relative(first.bfloat16(), exact)
    # backward visits the rows that still have a gradient: other chunks, the same bits
    index = torch.arange(1, 40, 3)
    again = torch.cat([c.logits[0].clone() for c in head.chunks(index, index.numel())])
    assert torch.equal(again, first[index])


def test_promise_02_accumulators_are_fp32_across_chunks():
    g = generator(1)
    hidden, weight = torch.randn(640, 32, generator=g), torch.randn(64, 32, generator=g)
    ids = torch.randint(64, (640,), generator=g)
    errors = []
    for rows in (640, 16):
        leaf = weight.bfloat16().requires_grad_()
        out = linear_logprob(
            hidden.bfloat16(), leaf, ids, workspace_bytes=small_workspace(64, 32, rows)
        )
        out.logp.sum().backward()
        exact = weight.bfloat16().double().requires_grad_()
        logits = hidden.bfloat16().double() @ exact.T
        torch.log_softmax(logits, -1).gather(1, ids[:, None]).sum().backward()
        errors.append(relative(leaf.grad, exact.grad))
    # 40 chunks cost no more than one; a bf16 accumulator would lose a digit
    assert max(errors) < 3e-3 and errors[1] < 1.1 * errors[0]


def test_promise_03_log_probs_are_never_positive():
    g = generator(2)
    hidden, weight = 30 * torch.randn(64, 16, generator=g), torch.randn(500, 16, generator=g)
    ids = (hidden @ weight.T).argmax(-1)
    logp = linear_logprob(hidden, weight, ids).logp
    assert (logp <= 0).all() and (logp == 0).any() and logp.min() < -1e-8


def test_promise_05_the_same_input_gives_the_same_bits():
    case = make_case()
    results = []
    for _ in range(3):
        weight = case.weight.clone().requires_grad_()
        loss, _ = linear_policy_loss(
            case.hidden,
            weight,
            case.ids,
            case.advantages,
            mask=case.mask,
            old_logp=case.old_logp,
            config=preset_config("gspo"),
        )
        loss.backward()
        results.append((loss.detach(), weight.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "gmpo", "vespo"])
def test_promise_06_what_is_masked_changes_no_bit(loss_type):
    case = make_case()
    results = []
    for junk in (0.0, float("nan"), float("inf"), -3e38):
        fields = {}
        for name in ("hidden", "old_logp", "ref_logp"):
            value = getattr(case, name).clone()
            value[~case.mask] = junk
            fields[name] = value
        rollout = fields["old_logp"] - 0.1
        hidden = fields["hidden"].requires_grad_()
        weight = case.weight.clone().requires_grad_()
        loss, metrics = linear_policy_loss(
            hidden,
            weight,
            case.ids,
            case.advantages,
            mask=case.mask,
            old_logp=fields["old_logp"],
            ref_logp=fields["ref_logp"],
            rollout_logp=rollout,
            config=preset_config(loss_type, beta=0.1, off_policy_mask_threshold=0.05),
        )
        loss.backward()
        results.append((loss.detach(), weight.grad, hidden.grad, *metrics.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    assert torch.isfinite(results[0][0])


def test_promise_07_banned_tokens():
    case = make_case()
    bias = torch.zeros(77)
    bias[60:] = -torch.inf
    weight = case.weight.clone().requires_grad_()
    ids = case.ids.clamp(max=59)
    loss, metrics = linear_policy_loss(
        case.hidden, weight, ids, case.advantages, mask=case.mask, bias=bias
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(weight.grad).all()
    assert not weight.grad[60:].any() and metrics["nonfinite_tokens"] == 0


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("ids", torch.full((4, 9), 77)),
        ("mask", torch.ones(4, 8)),
        ("old_logp", torch.zeros(36)),
        ("advantages", torch.zeros(5)),
        ("temperature", torch.zeros(4, 9)),
        ("denominator", -1.0),
        ("workspace_bytes", 10),
    ],
)
def test_promise_09_bad_input_is_named_before_any_work(backend, name, wrong, monkeypatch):
    case = make_case()
    given = {"hidden": case.hidden, "weight": case.weight, "ids": case.ids.clamp(min=0)}
    given |= {"advantages": case.advantages, "config": LossConfig(), name: wrong}

    def launched(*_, **__):
        raise AssertionError("a row function ran")

    bad = select(backend.device)._replace(
        logprob_fwd=launched, logprob_bwd=launched, policy=launched
    )
    monkeypatch.setattr("grpo_fast.loss.linear.select", lambda _: bad)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got "):
        linear_policy_loss(**given)


def test_promise_10_the_log_probs_are_those_of_the_logits(backend):
    """What the trainer compares when it attaches to a model: fused and plain log-probs."""
    case = make_case(lengths=(9, 9, 9, 9))
    stats = head_stats(
        LinearHead(case.hidden.view(-1, 24), case.weight, None, select(backend.device)),
        case.ids.view(-1),
        None,
        36,
    )
    logits = case.hidden.double() @ case.weight.double().T
    want = torch.log_softmax(logits, -1).gather(-1, case.ids[..., None])
    assert relative(stats[0], want.view(-1)) < 1e-6


def test_promise_11_an_option_without_effect_is_refused():
    for options, name in (
        ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 2.0}, "delta"),
        ({"loss_type": "reinforce", "importance_sampling_level": "token"}, "importance_sampling"),
        ({"loss_type": "gspo", "importance_sampling_level": "token"}, "importance_sampling_level"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            LossConfig(**options)
    case = make_case()
    args = (case.hidden, case.weight, case.ids, case.advantages)
    for options, name in (
        ({"entropy_threshold": 0.5}, "entropy_threshold"),
        ({"ref_weight": case.weight}, "ref_weight"),
        ({"grad_scale": 2.0}, "grad_scale"),
        ({"max_rows": 36, "skip_inactive_forward": True}, "skip_inactive_forward"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            linear_policy_loss(*args, mask=case.mask, **options)


@pytest.mark.parametrize("loss_type", list(PRESETS))
def test_promise_12_micro_batches_add_up_to_the_batch(loss_type):
    """Losses and gradients of two micro-batches over the count of both: exactly those of one."""
    case = make_case(lengths=(9, 4, 2, 6))
    config = preset_config(loss_type)
    total = count(config, case.mask)
    weight = case.weight.clone().requires_grad_()

    def loss_of(rows: slice) -> torch.Tensor:
        fields = (case.hidden, case.ids, case.mask, case.old_logp)
        hidden, ids, mask, old = (t[rows] for t in fields)
        advantages = case.advantages[rows].contiguous()
        options = {"config": config, "mask": mask, "old_logp": old, "denominator": total}
        loss, _ = linear_policy_loss(hidden, weight, ids, advantages, **options)
        loss.backward()
        return loss.detach()

    whole = loss_of(slice(0, 4))
    want, weight.grad = weight.grad, None
    parts = [loss_of(part) for part in (slice(0, 1), slice(1, 4))]
    # the parts may cancel
    assert abs(sum(parts) - whole) < 1e-6 * max(p.abs() for p in parts)
    assert relative(weight.grad, want) < 1e-6


def test_packed_padded_and_from_logits_agree():
    case = make_case(lengths=(9, 4, 2, 6))
    config = preset_config("gspo", beta=0.1)
    m = case.mask
    bounds = torch.cat((torch.zeros(1, dtype=torch.long), m.sum(1).cumsum(0)))
    padded, _ = linear_policy_loss(
        case.hidden,
        case.weight,
        case.ids,
        case.advantages,
        mask=m,
        old_logp=case.old_logp,
        ref_logp=case.ref_logp,
        config=config,
    )
    fields = {"old_logp": case.old_logp[m], "ref_logp": case.ref_logp[m], "cu_seqlens": bounds}
    packed, _ = linear_policy_loss(
        case.hidden[m], case.weight, case.ids[m], case.advantages, **fields, config=config
    )
    logits = case.hidden[m] @ case.weight.T
    plain, _ = policy_loss(logits, case.ids[m], case.advantages, **fields, config=config)
    assert relative(packed, padded) < 1e-6 and relative(plain, padded) < 1e-6
