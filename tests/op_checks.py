"""Log-prob operations of a backend against float64: shapes, extremes, strides, precision."""

from __future__ import annotations

import math

import torch
from checks import BOUND
from loss_cases import make_case, relative, truth

from grpo_fast import (
    LossConfig,
    linear_logprob,
    linear_policy_loss,
    logprob,
    policy_loss,
    reference,
)
from grpo_fast.backend import select
from grpo_fast.chunks import FIXED_BYTES


def generator(seed: int) -> torch.Generator:
    """On the default device, which `test_gpu.py` sets."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def peaked_logits(n: int, V: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows from flat to near-certain, float64: half of them give the target over 7 nats of lead."""
    g = generator(seed)
    logits = 2 * torch.randn(n, V, generator=g, dtype=torch.float64)
    ids = torch.randint(V, (n,), generator=g)
    lead = torch.linspace(0, 16, n, dtype=torch.float64)[torch.randperm(n, generator=g)]
    logits[torch.arange(n), ids] += lead
    return logits, ids


def check_logprob(n: int, V: int, dtype: torch.dtype = torch.float32) -> None:
    """logp, entropy, lse and the gradient from random upstream gradients of all three."""
    logits, ids = peaked_logits(n, V)
    logits = logits.to(dtype)
    exact = logits.double().requires_grad_()
    want = reference.logprob(exact, ids, 0.7)
    g = generator(1)
    upstream = [torch.randn(n, generator=g, dtype=torch.float64) for _ in want]
    upstream[0][::3] = 0.0
    sum((u * w).sum() for u, w in zip(upstream, want, strict=True)).backward()

    leaf = logits.clone().requires_grad_()
    got = logprob(leaf, ids, temperature=0.7, entropy=True)
    sum((u.float() * w).sum() for u, w in zip(upstream, got, strict=True)).backward()
    assert (got.logp <= 0).all()
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-6, V
    # bf16 keeps 8 bits of the gradient, fp16 11
    bound = {torch.float32: BOUND, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert relative(leaf.grad, exact.grad) < bound


def check_stable_ends() -> None:
    """A target 30 nats ahead, one 30 behind, a common offset of 3e4, and -inf beside and at
    targets."""
    logits = torch.zeros(6, 50)
    logits[0, 3] = 30.0
    logits[1] = 30.0
    logits[1, 3] = 0.0
    logits[2] = torch.linspace(-3, 3, 50) + 3e4
    logits[3, 5:] = -torch.inf
    logits[4, 3] = -torch.inf
    logits[5, :40] = -torch.inf
    ids = torch.tensor([3, 3, 3, 3, 3, 45])
    leaf = logits.clone().requires_grad_()
    got = logprob(leaf, ids, entropy=True)
    got.logp[:4].sum().backward()
    exact = logits.double().requires_grad_()
    want = reference.logprob(exact, ids)
    want[0][:4].sum().backward()
    assert torch.isneginf(got.logp[4])
    # log1p form: -49 exp(-30) = -4.6e-12, which float64 log_softmax itself has only to 3e-6
    # the kernels' exponent is x times a rounded log2(e): |x| * 1.3e-8, and on a GPU exp2 adds 1e-7
    bound = 1e-6 if select(logits.device).name == "triton" else 2e-7
    assert abs(got.logp[0].item() / -math.log1p(49 * math.exp(-30)) - 1) < bound
    keep = [1, 2, 3, 5]
    assert torch.allclose(got.logp.double()[keep], want[0][keep], rtol=4e-7, atol=0)
    assert torch.allclose(got.entropy.double(), want[1], rtol=1e-5, atol=1e-9)
    for row in (1, 2, 3):
        assert relative(leaf.grad[row], exact.grad[row]) < 2e-6
    assert abs(leaf.grad[0, 3].item() / (49 * math.exp(-30)) - 1) < bound
    # entropy and its gradient with banned tokens
    leaf = logits[3:].clone().requires_grad_()
    logprob(leaf, ids[3:], entropy=True).entropy.sum().backward()
    assert torch.isfinite(leaf.grad).all()


def check_nan_is_seen() -> None:
    """A NaN in an unmasked input reaches the loss and `nonfinite_tokens`; a masked one changes no
    bit."""
    case = make_case()
    config = LossConfig(epsilon_high=0.28)
    results = []
    for place in (None, "masked", "unmasked"):
        hidden = torch.nan_to_num(case.hidden)
        if place:
            hidden[(1, 3) if place == "masked" else (0, 2)] = float("nan")
        hidden.requires_grad_()
        out = linear_policy_loss(
            hidden, case.weight, case.ids, case.advantages, config=config, mask=case.mask
        )
        out[0].backward()
        results.append((out, hidden.grad))
    (clean, clean_grad), (masked, masked_grad), (poisoned, _) = results
    assert torch.equal(clean[0], masked[0]) and torch.equal(clean_grad, masked_grad)
    assert clean[1]["nonfinite_tokens"] == 0
    assert torch.isnan(poisoned[0]) and poisoned[1]["nonfinite_tokens"] == 1
    # a banned token was sampled: its clamped ratio and its loss are finite
    bias = torch.zeros(case.weight.shape[0])
    bias[case.ids[0, 2]] = -torch.inf
    banned = (case.ids == case.ids[0, 2]) & case.mask
    args = (torch.nan_to_num(case.hidden), case.weight, case.ids)
    given = {"config": config, "mask": case.mask, "old_logp": case.old_logp}
    _, metrics = linear_policy_loss(*args, case.advantages, bias=bias, **given)
    assert metrics["nonfinite_tokens"] == banned.sum() > 0
    advantages = case.advantages.clone()
    advantages[3] = torch.nan
    loss, metrics = linear_policy_loss(*args, advantages, **given)
    assert torch.isnan(loss) and metrics["nonfinite_tokens"] == case.mask[3].sum() > 0


def check_row_statistics_do_not_depend_on_batch() -> None:
    """A token alone, in a batch, padded, permuted and re-chunked: the same bits, so ratio is
    exactly 1."""
    g = generator(3)
    hidden, weight = torch.randn(200, 64, generator=g), torch.randn(1000, 64, generator=g)
    ids = torch.randint(1000, (200,), generator=g)
    whole = linear_logprob(hidden, weight, ids, entropy=True)
    small = linear_logprob(hidden, weight, ids, entropy=True, workspace_bytes=FIXED_BYTES + 80000)
    order = torch.randperm(200, generator=g)
    permuted = linear_logprob(hidden[order], weight, ids[order], entropy=True)
    mask = torch.arange(200) % 3 == 0
    masked = linear_logprob(hidden, weight, ids, mask=mask, entropy=True)
    for i in range(3):
        assert torch.equal(whole[i], small[i])
        assert torch.equal(whole[i][order], permuted[i])
        assert torch.equal(whole[i][mask], masked[i][mask])
        for n in (1, 2, 3, 7, 17):
            alone = linear_logprob(hidden[5 : 5 + n], weight, ids[5 : 5 + n], entropy=True)
            assert torch.equal(alone[i], whole[i][5 : 5 + n])
    _, metrics = linear_policy_loss(
        hidden[:7],
        weight,
        ids[:7],
        torch.ones(7),
        old_logp=whole.logp[:7],
        ref_logp=whole.logp[:7],
        config=LossConfig(beta=0.1),
    )
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0 and metrics["kl"] == 0.0


def check_extreme_ratios_are_clamped_and_counted() -> None:
    """exp(+-200) and a KL gap of 300 nats stay finite, also times a zero advantage."""
    case = make_case()
    old = case.old_logp + torch.tensor([200.0, -200.0, 0.0, 200.0])[:, None]
    ref = case.ref_logp + 300.0
    weight = case.weight.clone().requires_grad_()
    advantages = torch.tensor([1.0, 0.0, 1.0, -1.0])
    loss, metrics = linear_policy_loss(
        torch.nan_to_num(case.hidden),
        weight,
        case.ids,
        advantages,
        config=LossConfig(beta=1e-3),
        mask=case.mask,
        old_logp=old,
        ref_logp=ref,
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(weight.grad).all()
    assert metrics["clamped_ratios"] == metrics["tokens"] and metrics["nonfinite_tokens"] == 0


def torch_bf16_errors(case, config, dtype, **kw) -> list[float]:
    """Errors of plain torch with inputs of this dtype and fp32 logits maths, for the same
    tensors."""
    weight = case.weight.clone().requires_grad_()
    hidden = torch.where(case.mask[..., None], case.hidden, torch.zeros_like(case.hidden))
    hidden = hidden.requires_grad_()
    logits = (hidden @ weight.T).float()
    args = {k: v for k, v in kw.items() if v is not None}
    loss = reference.policy_loss(logits, case.ids, case.advantages, config, mask=case.mask, **args)
    loss.backward()
    want = truth(case, config, use_old="old_logp" in args, use_ref=False)
    return [
        (loss.double() - want[0]).abs().item(),
        relative(hidden.grad, want[1]),
        relative(weight.grad, want[2]),
    ]


def check_low_precision(dtype: torch.dtype, level: str, V: int = 500) -> None:
    """Promise 8: error of the loss at most 1.0x, of bf16 gradients at most 1.5x, that of torch."""
    case = make_case(V=V, H=64, lengths=(30, 1, 0, 24, 17, 9), seed=5, dtype=dtype)
    config = LossConfig(importance_sampling_level=level, epsilon_high=0.28, temperature=0.9)
    theirs = torch_bf16_errors(case, config, dtype, old_logp=case.old_logp)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss, metrics = linear_policy_loss(
        hidden,
        weight,
        case.ids,
        case.advantages,
        config=config,
        mask=case.mask,
        old_logp=case.old_logp,
    )
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype and loss.dtype == torch.float32
    assert 0 < metrics["clip_ratio"] < 1
    want = truth(case, config, use_old=True, use_ref=False)
    ulp = torch.finfo(torch.float32).eps * abs(want[0].item())
    assert (loss.double() - want[0]).abs().item() <= max(theirs[0], 4 * ulp)
    assert relative(hidden.grad, want[1]) <= 1.5 * theirs[1]
    assert relative(weight.grad, want[2]) <= 1.5 * theirs[2]


def check_small_gradients_survive_fp16() -> None:
    """A global denominator of 1e7 tokens puts every dlogit under fp16's smallest number."""
    case = make_case(dtype=torch.float16)
    config = LossConfig(epsilon_high=0.28, temperature=0.9)
    grads = []
    for denominator in (16.0, 16.0 * 2**20):
        hidden = case.hidden.float().requires_grad_()
        loss, _ = linear_policy_loss(
            hidden.half(),
            case.weight,
            case.ids,
            case.advantages,
            config=config,
            mask=case.mask,
            old_logp=case.old_logp,
            denominator=denominator,
        )
        # the upstream factor brings dhidden itself back into fp16's range
        (loss * (denominator / 16.0)).backward()
        grads.append(hidden.grad[case.mask])
    assert relative(grads[1], grads[0]) < 1e-2


def check_half_precision_logits(dtype: torch.dtype, upstream: float) -> None:
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


def check_steep_ratios_in_fp16() -> None:
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


def check_transforms() -> None:
    """Softcap, logit scale, bias and entropy together against float64, with their gradients."""
    g = generator(9)
    hidden = torch.randn(40, 32, generator=g)
    weight, bias = torch.randn(300, 32, generator=g), torch.randn(300, generator=g)
    ids = torch.randint(300, (40,), generator=g)
    mask = torch.arange(40) % 4 != 1
    exact = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    logits = reference.head_logits(*exact, logit_scale=0.6, softcap=5.0)
    want = reference.logprob(logits, ids, 1.3)
    upstream = torch.randn(3, 40, generator=g).double()
    sum((u * w)[mask].sum() for u, w in zip(upstream, want, strict=True)).backward()
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    got = linear_logprob(
        leaves[0],
        leaves[1],
        ids,
        bias=leaves[2],
        mask=mask,
        temperature=1.3,
        softcap=5.0,
        logit_scale=0.6,
        entropy=True,
    )
    sum((u.float() * w).sum() for u, w in zip(upstream, got, strict=True)).backward()
    for a, b in zip(got, want, strict=True):
        assert relative(a[mask], b[mask]) < 2e-6 and (a[~mask] == 0).all()
    for leaf, e in zip(leaves, exact, strict=True):
        assert relative(leaf.grad, e.grad) < BOUND


def check_int64_rows() -> None:
    """Rows further apart than 2^31 elements: a (2, 1, V) view whose batch stride is 2^31 + 64."""
    V, stride = 64, 2**31 + 64
    # fp16 and untouched pages: 4 GiB of address space, a few KiB of memory
    storage = torch.empty(stride + V, dtype=torch.float16)
    logits = storage.as_strided((2, 1, V), (stride, V, 1))
    logits.copy_(torch.randn(2, 1, V, generator=generator(2)))
    ids = torch.tensor([[3], [60]])
    want = reference.logprob(logits.double(), ids)[0]
    assert relative(logprob(logits, ids).logp, want) < 1e-6
