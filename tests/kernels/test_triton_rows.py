"""The row kernels, called directly, against float64: sizes, types, limits, and who shares a row."""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from interpreter import CheckedBuilder, program_order
from loss_cases import relative
from policy_arguments import arguments
from triton.runtime.errors import InterpreterError

from grpo_fast import policy_loss
from grpo_fast.kernels import configs, logprob, row_parts, scale
from grpo_fast.kernels import policy as one_pass

pytestmark = [pytest.mark.kernels, pytest.mark.triton]

BANNED = -math.inf
LOWEST = torch.finfo(torch.float32).min
# two rows of three segments are all that the interpreter has time for at the widest
SIZES = [(1, 1), (8, 1), (64, 77), (8, 1003), (3, 32001), (2, 50257), (1, 151936)]


def rows(n: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Peaked logits (1, n, V), ids that include the first and last column, upstream (3, n)."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, n, V, generator=g)
    ids = torch.randint(V, (n,), generator=g)
    ids[0], ids[-1] = V - 1, 0
    logits[0, torch.arange(n), ids] += torch.linspace(-4, 12, n)
    return logits.to(dtype), ids, torch.randn(3, n, generator=g)


def exact(logits, ids, *, scale=1.0, inv_temperature=1.0, softcap=None):
    """float64 leaf (n, V), logp with its small end, entropy and lse."""
    leaf = logits[0].double().requires_grad_()
    z = leaf * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z * inv_temperature
    top = z.detach().amax(1)
    # finite, since autograd of -inf * 0 is NaN
    z = (z - top[:, None]).clamp(min=-1e30)
    others = z.scatter(1, ids[:, None], -2e30).logsumexp(1)
    logp = -torch.nn.functional.softplus(others - z.gather(1, ids[:, None])[:, 0])
    log_p = z.log_softmax(1)
    return leaf, logp, -(log_p.exp() * log_p).sum(1), top + z.logsumexp(1)


def forward(logits, ids, **options):
    stats = torch.full((4, ids.numel()), math.nan)
    logprob.logprob_fwd(logits, ids, stats, **options)
    return stats


def backward(logits, ids, stats, upstream, out=None, **options):
    dlogp, dlse, dentropy = upstream
    out = torch.full_like(logits, math.nan) if out is None else out
    logprob.logprob_bwd(logits, ids, stats, dlogp, out, dlse=dlse, dentropy=dentropy, **options)
    return out


def check(logits, ids, upstream, bound=1e-6, gradient=3e-6, **options):
    """Statistics and gradients of all rows, each row by itself."""
    leaf, logp, entropy, lse = exact(logits, ids, **options)
    stats = forward(logits, ids, **options)
    assert (stats[0] <= 0).all()
    for row in range(ids.numel()):
        assert abs(stats[0, row] - logp[row]) <= bound * abs(logp[row]), row
        error = abs(stats[2, row].double() + stats[3, row] - lse[row])
        assert error <= bound * max(1.0, abs(lse[row])), row
        assert abs(stats[1, row] - entropy[row]) <= 1e-5 * entropy[row] + 1e-9, row
    for used in ((True, False, False), (True, True, False), (True, True, True)):
        mine = [u if wanted else None for u, wanted in zip(upstream, used, strict=True)]
        leaf.grad = None
        pairs = zip(mine, (logp, lse, entropy), strict=True)
        sum((u * v).sum() for u, v in pairs if u is not None).backward(retain_graph=True)
        out = backward(logits, ids, stats, mine, **options)
        for row in range(ids.numel()):
            assert relative(out[0, row], leaf.grad[row]) < gradient or not leaf.grad[row].any(), row
    return stats


@pytest.mark.parametrize("n, V", SIZES)
def test_sizes(n, V):
    logits, ids, upstream = rows(n, V)
    check(logits, ids, upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, V", [(8, 1000), (3, 77), (1, 32768)])
def test_half_precision(n, V, dtype):
    logits, ids, upstream = rows(n, V, dtype)
    check(logits, ids, upstream, gradient=4e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("V", [77, 5003])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": -1.3, "inv_temperature": 0.7},
        {"scale": 0.6, "softcap": 5.0, "inv_temperature": 1.3},
        {"scale": -0.6, "softcap": 5.0},
        {"softcap": 3e6},
    ],
    ids=["negative", "softcap", "negative softcap", "softcap beyond all"],
)
def test_transforms(options, V):
    logits, ids, upstream = rows(5, V)
    check(logits, ids, upstream, bound=2e-6, gradient=5e-6, **options)


def test_both_ends_of_a_log_prob():
    """logp of -5e-18 and of -100: relative 1e-6, and the gradient of the target with it."""
    logits, ids, upstream = rows(4, 3001)
    logits[0, 0, ids[0]], logits[0, 1, ids[1]] = 60.0, -100.0
    logits[0, 2] += 3e4
    logits[0, 3] -= 3e4
    stats = check(logits, ids, upstream, gradient=1e-5)
    assert -1e-16 < stats[0, 0] < 0 and stats[0, 1] < -90
    leaf, logp, *_ = exact(logits[:, :1], ids[:1])
    logp.sum().backward()
    out = backward(logits[:, :1], ids[:1], stats[:, :1], (torch.ones(1), None, None))
    target = leaf.grad[0, ids[0]]
    assert abs(out[0, 0, ids[0]] - target) <= 1e-6 * target


@pytest.mark.parametrize("dtype, offset", [(torch.float32, 3e4), (torch.bfloat16, 500.0)])
def test_backward_sees_the_logits_of_forward(dtype, offset):
    """The probabilities that backward makes of the forward's statistics add up to 1: a logit that
    was rounded otherwise would show at an offset, where an ulp is 2e-3."""
    logits, ids, _ = rows(6, 9001)
    logits = (logits + offset).to(dtype)
    stats = forward(logits, ids, inv_temperature=0.7)
    out = torch.empty(logits.shape)
    # dlse alone: out = p / T
    backward(logits, ids, stats, (torch.zeros(6), torch.ones(6), None), out, inv_temperature=0.7)
    assert (out.double().sum(2) / 0.7 - 1).abs().max() < 1e-6


@pytest.mark.parametrize("V", [61, 9001])
@pytest.mark.parametrize("low", [BANNED, LOWEST, -1e9])
def test_banned_tokens(low, V):
    """Beside the target, all but the target, the target itself."""
    logits, ids, upstream = rows(4, V)
    logits[0, 0, ::3] = low
    logits[0, 1] = low
    logits[0, :2][torch.arange(2), ids[:2]] = 1.0
    logits[0, 2, : V // 2] = low
    check(logits[:, [0, 2, 3]], ids[[0, 2, 3]], upstream[:, [0, 2, 3]])
    stats = forward(logits, ids)
    assert stats[0, 1] == 0 and stats[1, 1].abs() < 1e-30
    assert backward(logits, ids, stats, upstream)[0, 1].abs().max() < 2
    logits[0, 3, ids[3]] = low
    stats = forward(logits, ids)
    assert stats[0, 3] <= (BANNED if low == BANNED else -9e8)
    assert stats[1].isfinite().all()
    out = backward(logits, ids, stats, upstream)
    assert out.isfinite().all()
    assert relative(out[0, 3, ids[3]], upstream[0, 3].double()) < 1e-6


@pytest.mark.parametrize("V", [61, 9001])
@pytest.mark.parametrize("value", [LOWEST, -1e9, 1e12, 3e38])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_rows_that_are_large_throughout(value, scale, V):
    """Equal logits are a uniform distribution whatever they are; half an ulp lower, none."""
    logits, ids, upstream = rows(2, V)
    logits[:] = value * scale
    ids[1] = V - 1
    low = math.nextafter(torch.tensor(value).item(), -math.inf)
    logits[0, 1, : V // 2] = max(LOWEST, low - abs(value) * 2**-22) * scale
    uneven = value != LOWEST
    n = 2 if uneven else 1
    stats = check(logits[:, :n], ids[:n], upstream[:, :n], scale=scale)
    assert abs(stats[0, 0] + math.log(V)) < 1e-6 * math.log(V)
    if uneven:
        assert abs(stats[0, 1] + math.log(V - V // 2)) < 1e-5


def test_a_softcap_beyond_all_reason():
    logits, ids, upstream = rows(1, 301)
    logits[:] = 1e12
    check(logits, ids, upstream, softcap=1e9)


def test_a_row_of_nothing_is_nan_and_keeps_its_maximum():
    """What `parallel.merge_stats` takes of a shard without a token."""
    logits = torch.full((1, 1, 300), BANNED)
    stats = forward(logits, torch.tensor([3]))
    assert stats[2] == BANNED and stats[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("place", [0, 5, 8999])
def test_a_nan_or_an_infinity_is_nan(place):
    for bad in (math.nan, math.inf):
        logits, ids, upstream = rows(3, 9001)
        logits[0, 1, place] = bad
        stats = forward(logits, ids)
        assert stats[0, 1].isnan() and stats[0, [0, 2]].isfinite().all()
        out = backward(logits, ids, stats, upstream)
        assert out[0, 1].isnan().all() and out[0, [0, 2]].isfinite().all()


def test_without_the_entropy_no_other_bit_changes():
    logits, ids, _ = rows(3, 9001)
    full, bare = forward(logits, ids), forward(logits, ids, entropy=False)
    assert torch.equal(full[[0, 2, 3]], bare[[0, 2, 3]]) and not bare[1].any() and full[1].all()


@pytest.mark.parametrize("V", [77, 20_000, 32_001])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32])
def test_in_place_and_narrower_in_place(low, V):
    """Over the logits, and at the front of their bytes: the bits of a buffer of its own."""
    logits, ids, upstream = rows(2, V)
    stats = forward(logits, ids)
    want = backward(logits, ids, stats, upstream, torch.empty(logits.shape, dtype=low))
    out = logits.view(low)[..., :V]
    assert torch.equal(backward(logits, ids, stats, upstream, out), want)


def test_a_far_row_narrower_in_place():
    logits, ids, upstream = rows(2, 1003)
    logits[0, 1] = LOWEST
    stats = forward(logits, ids)
    want = backward(logits, ids, stats, upstream, torch.empty(logits.shape, dtype=torch.bfloat16))
    out = logits.view(torch.bfloat16)[..., :1003]
    assert torch.equal(backward(logits, ids, stats, upstream, out), want)


def test_absent_target():
    """-1: the target is a column of other logits, and no column of these is special."""
    logits, ids, upstream = rows(3, 9001)
    stats = forward(logits, ids)
    whole = backward(logits, ids, stats, upstream)
    own = torch.where(torch.arange(3) == 1, ids, -1)
    out = backward(logits, own, stats, upstream)
    assert torch.equal(out[0, 1], whole[0, 1])
    beside = torch.arange(9001) != ids[:, None]
    assert torch.equal(out[0][beside], whole[0][beside])
    p = torch.exp(stats[0] - 0.0)
    want = -(upstream[0] - upstream[1]) * p - upstream[2] * p * (stats[0] + stats[1])
    got = out[0, torch.arange(3), ids]
    assert relative(got[[0, 2]], want[[0, 2]].double()) < 3e-6


@pytest.mark.parametrize("V", [1003, 9001])
@pytest.mark.parametrize("pad", [2, 4])
def test_rows_that_start_anywhere(pad, V):
    """Strides and addresses that break 16 bytes, of logits and of the gradient."""
    logits, ids, upstream = rows(3, V)
    wide = torch.full((1, 3, V + pad), math.nan)
    wide[..., :V] = logits
    view = wide[..., :V]
    assert not configs.is_aligned(view) and configs.forward_launch(view, None)["VEC"] == 1
    check(view, ids, upstream)
    out = torch.full((1, 3, V + pad), math.nan)
    got = backward(view, ids, forward(view, ids), upstream, out[..., :V])
    assert got.isfinite().all() and out[..., V:].isnan().all() and wide[..., V:].isnan().all()


def test_aligned_rows_are_read_16_bytes_at_a_time():
    for dtype, vec in ((torch.float32, 4), (torch.bfloat16, 8)):
        logits = torch.empty(1, 2, 64, dtype=dtype)
        assert configs.forward_launch(logits, None)["VEC"] == vec
        padded = torch.empty(1, 2, 80, dtype=dtype)[..., :77]
        assert configs.forward_launch(padded, None)["VEC"] == vec


def policy(logits, ids, out, **given):
    n = ids.numel()
    g = torch.Generator().manual_seed(3)
    advantages, weights = torch.randn(n, generator=g), torch.rand(n, generator=g)
    old = torch.full((n,), -3.0)
    weights[0] = 0.0
    terms = torch.full((6, n), math.nan)
    choice = arguments("clip", "k3", "k3", (0.8, 1.2, math.inf, 0.0), beta=0.0)
    options = {"entropy_coef": 0.01, "old_logp": old, **given}
    one_pass.policy(logits, ids, advantages, weights, terms, out, **choice, **options)
    return terms


def test_programs_that_share_a_row_change_no_bit(monkeypatch):
    """One program for a row or one for each segment and column block, in any order: the same bits,
    so a row does not know how many others there are (promise 4)."""
    logits, ids, upstream = rows(3, 140_001)
    active = torch.tensor([True, False, True])
    results = []
    for few, order in ((0, "forward"), (264, "forward"), (264, "reverse")):
        monkeypatch.setattr(row_parts, "FEW_ROWS", few)
        monkeypatch.setattr(configs, "GRADIENT_PROGRAMS", 1056 if few else 1)
        monkeypatch.setattr(configs, "GRADIENT_TILES", 4 if few else 1000)
        assert row_parts.is_shared(logits) == (few > 0)
        with program_order(order):
            stats = forward(logits, ids, active=active)
            gradient = backward(logits, ids, stats, upstream, active=active)
            out = torch.full_like(logits, math.nan)
            terms = policy(logits, ids, out, active=active)
        assert not stats[:, 1].any() and not out[0, :2].any() and not gradient[0, 1].any()
        results.append((stats, gradient, terms, out))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_pass_and_two_passes_have_the_same_statistics():
    logits, ids, _ = rows(3, 70_003)
    stats = forward(logits, ids, inv_temperature=0.7)
    terms = policy(logits, ids, None, inv_temperature=0.7)
    assert torch.equal(terms[1:3], stats[:2])


def test_rows_of_a_gradient_are_shared():
    launch = configs.gradient_launch(*[torch.empty(1, 1, 151936, dtype=torch.bfloat16)] * 2, None)
    assert configs.gradient_tiles(2048, 151936, launch) == (3, 8)
    assert configs.gradient_tiles(1, 151936, launch) == (19, 1)
    for n, V in ((1, 1), (3, 500), (64, 262144), (4096, 50257)):
        programs, tiles = configs.gradient_tiles(n, V, launch)
        width = tiles * launch["STRIPS"] * launch["THREADS"] * launch["VEC"]
        assert programs * width >= V > (programs - 1) * width


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 77), (5003,), (700, 13)])
def test_scale(shape, dtype, out_dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype)
    for factor in (1.0, 0.3, 65536.0, -1.0, math.nan):
        want = (x.float() * torch.tensor(factor)).to(out_dtype)
        mine = x.clone()
        out = mine if dtype == out_dtype else torch.empty(shape, dtype=out_dtype)
        scale.scale(mine, torch.tensor(factor), out)
        assert torch.equal(out.nan_to_num(7.0), want.nan_to_num(7.0))
        assert out is mine or torch.equal(mine, x)


def test_scale_of_rows_apart():
    """Rows of a wider tensor: what lies between them is left alone."""
    wide = torch.full((2, 3, 5010), math.nan, dtype=torch.bfloat16)
    x = wide[:, :, :5003]
    x[:] = torch.randn(2, 3, 5003, generator=torch.Generator().manual_seed(0))
    want = (x.float() * 0.3).bfloat16()
    scale.scale(x, torch.tensor(0.3), x)
    assert torch.equal(x, want) and wide[..., 5003:].isnan().all()


def test_a_factor_of_1_writes_nothing(monkeypatch):
    """And few programs go over many blocks where it is another."""
    monkeypatch.setattr(scale, "SCALE_PROGRAMS", 2)
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    with monkeypatch.context() as patch:
        patch.setattr(CheckedBuilder, "create_masked_store", None)
        scale.scale(x, torch.tensor(1.0), x)
        with pytest.raises(InterpreterError):
            scale.scale(x, torch.tensor(2.0), x)
    x.copy_(before)
    scale.scale(x, torch.tensor(2.0), x)
    assert torch.equal(x, 2 * before)


def test_a_loss_scale_of_65536_through_autograd(monkeypatch):
    """In fp16 the factor itself is inf; the gradients come out of the kernels as finite numbers."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    logits = torch.randn(2, 5, 77, generator=torch.Generator().manual_seed(0)).half()
    ids = torch.randint(77, (2, 5), generator=torch.Generator().manual_seed(1))
    grads = []
    for factor in (1.0, 65536.0):
        leaf = logits.clone().requires_grad_()
        loss, _ = policy_loss(leaf, ids, torch.ones(2), denominator=1e4)
        (loss * factor).backward()
        grads.append(leaf.grad.float())
    assert grads[1].isfinite().all()
    assert relative(grads[1] / 65536, grads[0].double()) < 2e-3
