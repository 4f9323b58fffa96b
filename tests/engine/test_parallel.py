"""The lm_head over 2 and 4 gloo processes against one, and what needs no process group."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager

import parallel_worker
import pytest
import ranks
import torch
import vocabulary_checks
from loss_cases import generator

from grpo_fast import linear_logprob, linear_policy_loss, reference
from grpo_fast.engine import parallel, torch_backend
from grpo_fast.engine.backend import select
from grpo_fast.engine.parallel import merge_stats


@pytest.fixture(scope="module", params=(2, 4))
def said(request, tmp_path_factory) -> list[dict[str, str]]:
    """What each rank said to each check: its traceback, or nothing."""
    return ranks.ask("parallel_worker.py", tmp_path_factory.mktemp("ranks"), request.param)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.__name__ for f in parallel_worker.CHECKS])
def test_processes_agree_with_one(said, name):
    ranks.judge(said, name)


def shard_stats(logits, ids, sizes):
    """(W, 4, n) statistics of slices of the logits, and the owner of each target."""
    ends = torch.tensor(sizes).cumsum(0)
    parts = []
    for size, end in zip(sizes, ends.tolist(), strict=True):
        local = ids - (end - size)
        local = torch.where((local >= 0) & (local < size), local, 0)
        parts.append(torch.empty(4, ids.numel(), dtype=logits.dtype))
        torch_backend.logprob_fwd(logits[None, :, end - size : end], local, parts[-1])
    return torch.stack(parts), torch.bucketize(ids, ends, right=True)


@pytest.mark.parametrize("spread", (0.1, 3.0, 30.0))
@pytest.mark.parametrize("sizes", ([77], [40, 37], [20, 20, 20, 17], [1, 75, 1], [9] * 8 + [5]))
def test_merged_statistics(sizes, spread):
    """Every element, not a norm: near-certain targets, and shards hundreds of nats apart."""
    g = torch.Generator().manual_seed(0)
    n = 200
    logits = spread * torch.randn(n, 77, generator=g)
    logits[::3] += 0.5 * spread * torch.arange(77.0) - 7 * spread
    ids = torch.randint(77, (n,), generator=g)
    ids[::2] = logits[::2].argmax(1)
    logits[::4].scatter_add_(1, ids[::4, None], torch.full((n, 1), 12.0))
    got = merge_stats(*shard_stats(logits, ids, sizes)).double()
    logp, entropy, lse = reference.logprob(logits.double(), ids)
    unsharded = torch.empty(4, n)
    torch_backend.logprob_fwd(logits[None], ids, unsharded)
    for name, value, want, alone in (
        ("logp", got[0], logp, unsharded[0]),
        ("entropy", got[1], entropy, unsharded[1]),
        ("lse", got[2] + got[3], lse, unsharded[2] + unsharded[3]),
    ):
        floor = 1e-30
        error = ((value - want).abs() / want.abs().clamp(min=floor)).max()
        usual = ((alone.double() - want).abs() / want.abs().clamp(min=floor)).max()
        assert error <= 2 * usual + 1e-6, name
    assert (got[0] <= 0).all() and (got[1] >= 0).all()
    assert torch.equal(got[2], logits.amax(1).double())


@pytest.mark.parametrize("with_entropy", (False, True))
@pytest.mark.parametrize(
    "dtype", (pytest.param(torch.float32, marks=pytest.mark.kernels), torch.float64)
)
def test_gradients_of_slices(backend, dtype, with_entropy):
    """Statistics of slices of the logits, merged, and each slice's gradient from them: what the
    ranks do, in one process, with the row functions of a backend."""
    g, rows = generator(0), select(backend.device)
    n, V, sizes = 40, 77, [20, 20, 1, 36]
    logits = (3 * torch.randn(n, V, generator=g, dtype=torch.float64)).to(dtype)
    logits[1, 20:40] = -torch.inf
    ids = vocabulary_checks.edges(sizes, V, n)
    ids[1] = 5
    # finite, since autograd of -inf * 0 is NaN
    whole = logits.double().clamp(min=-1e30).requires_grad_()
    logp, entropy, lse = reference.logprob(whole, ids)
    upstream = torch.randn(3, n, generator=g, dtype=torch.float64)
    wanted = (logp, lse, entropy)[: 3 if with_entropy else 2]
    torch.autograd.backward(wanted, tuple(upstream[: len(wanted)]))
    ends = torch.tensor(sizes).cumsum(0)
    slices = [slice(end - size, end) for size, end in zip(sizes, ends.tolist(), strict=True)]
    elsewhere = [(ids < part.start) | (ids >= part.stop) for part in slices]
    parts = torch.full((len(sizes), 4, n), float("nan"), dtype=dtype)
    for part, other, stats in zip(slices, elsewhere, parts, strict=True):
        local = torch.where(other, 0, ids - part.start)
        rows.logprob_fwd(logits[None, :, part].contiguous(), local, stats)
    stats = parallel.merge_stats(parts, torch.bucketize(ids, ends, right=True))
    dlogp, dlse, dentropy = upstream.to(dtype)
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    for part, other in zip(slices, elsewhere, strict=True):
        assert 0 < other.sum() < n
        out = logits[None, :, part].contiguous()
        local = torch.where(other, -1, ids - part.start)
        dentropy = dentropy if with_entropy else None
        rows.logprob_bwd(out, local, stats, dlogp, out, dlse=dlse, dentropy=dentropy)
        vocabulary_checks.agree(out[0], whole.grad[:, part], "dlogits", bound)
    for name, got, want in (("logp", stats[0], logp), ("entropy", stats[1], entropy)):
        vocabulary_checks.agree(got, want.detach(), name, bound)


class Partitioned(torch.nn.Parameter):
    """A parameter as ZeRO-3 leaves it between modules: no data, its shape under `ds_shape`."""


@pytest.fixture
def zero3(monkeypatch):
    """A stub under the names of DeepSpeed, for environments without it (`test_zero3.py` has the
    real one): parameters with `ds_id`, `ds_shape` and `ds_status`, and a `GatheredParameters` that
    gives them their data and takes it away again, as `free_param` of DeepSpeed does, by assigning
    an empty tensor."""
    stored, entered = {}, []

    def release(p):
        p.data = torch.empty(0)
        p.ds_status = types.SimpleNamespace(name="NOT_AVAILABLE")

    @contextmanager
    def gathered(parameters):
        parameters = list(parameters)
        entered.append(len(parameters))
        for p in parameters:
            p.data = stored[p.ds_id].clone()
            p.ds_status = types.SimpleNamespace(name="AVAILABLE")
        yield
        for p in parameters:
            release(p)

    def partition(value, requires_grad):
        p = Partitioned(value.clone(), requires_grad=requires_grad)
        p.ds_id, p.ds_shape = len(stored), value.shape
        stored[p.ds_id] = value.clone()
        release(p)
        return p

    # `deepspeed.zero` is an attribute of the package and no module of its own
    zero = types.SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    return types.SimpleNamespace(partition=partition, entered=entered)


def test_zero3_is_gathered_in_both_passes(zero3):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g) for s in ((9, 8), (33, 8), (33,)))
    ids = torch.randint(33, (9,), generator=g)
    parts = zero3.partition(weight, False), zero3.partition(bias, False)
    results = []
    for w, b in ((weight, bias), parts):
        for loss in ("logprob", "policy"):
            leaf = hidden.clone().requires_grad_()
            if loss == "logprob":
                value = linear_logprob(leaf, w, ids, bias=b).logp.sum()
                gathers = len(zero3.entered)
            else:
                value, _ = linear_policy_loss(leaf, w, ids, torch.ones(9), bias=b)
            value.backward()
            results.append((value.detach(), leaf.grad))
        if w is parts[0]:
            # weight and bias forward, again backward, then once for the policy loss
            assert gathers == 2 and zero3.entered == [1] * 6
    for (loss, grad), (want_loss, want) in zip(results[2:], results[:2], strict=True):
        assert torch.equal(loss, want_loss) and torch.equal(grad, want)
    assert all(p.numel() == 0 for p in parts)


@pytest.mark.parametrize("op", (linear_logprob, linear_policy_loss))
def test_zero3_gradient_reaches_the_hook_of_the_parameter(zero3, op):
    value, hidden, ids = torch.randn(33, 8), torch.randn(9, 8), torch.arange(9)
    plain, weight, taken = value.clone().requires_grad_(), zero3.partition(value, True), []

    def hook(p):
        taken.append(p.grad)
        p.grad = None

    weight.register_post_accumulate_grad_hook(hook)
    for head in (plain, weight):
        if op is linear_logprob:
            op(hidden, head, ids).logp.sum().backward()
        else:
            op(hidden, head, ids, torch.ones(9))[0].backward()
    assert len(taken) == 1 and torch.equal(taken[0], plain.grad)
    assert weight.shape == (0,) and weight.grad is None


def test_zero3_without_a_hook_cannot_take_a_gradient(zero3):
    weight = zero3.partition(torch.randn(33, 8), True)
    hidden, ids = torch.randn(9, 8), torch.arange(9)
    with pytest.raises(ValueError, match="weight: expected a frozen parameter.* ZeRO-3"):
        linear_logprob(hidden, weight, ids)
    with torch.no_grad():
        assert torch.isfinite(linear_logprob(hidden, weight, ids).logp).all()
