"""dweight of one product: bf16 rows of dlogits that wait where the fp32 dweight was."""

import pytest
import torch
from allocations import Allocations
from loss_cases import generator, relative

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss
from grpo_fast.engine import gemm
from grpo_fast.engine.chunks import FIXED_BYTES, LinearHead, release_workspace
from grpo_fast.engine.held import held_rows

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("backend")]

V, H = 203, 48


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """dlogits in bf16 on the torch backend too, as the kernels leave them."""

    def kind(head):
        return head.weight.dtype if head.weight.dtype.itemsize == 2 else None

    monkeypatch.setattr(LinearHead, "narrow", property(kind))


@pytest.fixture
def products(monkeypatch):
    """(rows, type of dweight, whether it is written anew) of every product that gives dweight."""
    seen = []
    plain = gemm.weight_gradient

    def counted(dlogits, hidden, out, *, first):
        seen.append((dlogits.shape[0], out.dtype, first))
        plain(dlogits, hidden, out, first=first)

    monkeypatch.setattr(gemm, "weight_gradient", counted)
    return seen


def workspace(rows: int) -> int:
    return FIXED_BYTES + rows * 4 * (V + 3 * H)


def case(N, *, mask=False):
    g = generator(N)
    hidden = torch.randn(N, H, generator=g).bfloat16()
    weight = (2 * torch.randn(V, H, generator=g) / H**0.5).bfloat16()
    ids = torch.randint(V, (N,), generator=g)
    advantages = torch.randn(N, generator=g)
    # rows without a gradient lie between those that have one
    advantages[::7] = 0.0
    keep = torch.rand(N, generator=g) < 0.8 if mask else torch.ones(N, dtype=torch.bool)
    if mask:
        hidden[~keep] = torch.nan
    return hidden, weight, ids, advantages, keep


def exact(hidden, weight, ids, advantages, keep):
    """dhidden and dweight of dapo on its policy in float64: the mean of -A logp of tokens."""
    h = torch.where(keep[:, None], hidden, 0.0).double().requires_grad_()
    w = weight.double().requires_grad_()
    logp = (h @ w.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (-(advantages.double() * logp)[keep].sum() / keep.sum()).backward()
    return h.grad, w.grad


def gradients(hidden, weight, ids, advantages, keep, **options):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    config = LossConfig("dapo")
    loss, _ = linear_policy_loss(h, w, ids, advantages, config=config, mask=keep, **options)
    loss.backward()
    return h.grad, w.grad


def test_rows_that_wait_take_the_memory_of_an_fp32_dweight():
    # H = 4096: 8192 rows at once, beyond them groups of 4096, where that is two chunks or more
    assert held_rows(8192, 2048, 4096) == 8192
    assert held_rows(8193, 2048, 4096) == 4096
    assert held_rows(8193, 2112, 4096) == 0
    # one chunk needs no room
    assert held_rows(2000, 2048, 64) == 2000
    assert held_rows(0, 2048, 64) == 0


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    "N, rows, expected",
    [
        (16, 16, 1),  # one chunk, over its own logits
        (90, 16, 1),  # all wait: 90 <= 2H
        (333, 16, 7),  # groups of H = 48 rows
        (333, 64, None),  # a group would be less than two chunks: fp32, chunk by chunk
    ],
)
def test_dweight_of_waiting_rows(N, rows, expected, mask, products):
    given = case(N, mask=mask)
    got = gradients(*given, workspace_bytes=workspace(rows))
    wanted = exact(*given)
    active = int(((given[3] != 0) & given[4]).sum())
    assert sum(n for n, *_ in products) == active
    kinds = {kind for _, kind, _ in products}
    if expected == 1:
        assert kinds == {torch.bfloat16} and len(products) == 1
    else:
        assert kinds == {torch.float32}
    if expected is not None and expected > 1:
        most = max(n for n, *_ in products)
        assert 32 < most <= H and len(products) <= expected
    assert [first for *_, first in products] == [True] + [False] * (len(products) - 1)
    for name, one, want in zip(("dhidden", "dweight"), got, wanted, strict=True):
        # of a bf16 number 1.1e-3 is rounding at most; the rows were rounded too
        assert (
            relative(
                one[given[4]] if name == "dhidden" else one,
                want[given[4]] if name == "dhidden" else want,
            )
            < 4e-3
        )
    rounded = given[1].double().norm()
    assert rounded > 0 and got[1].dtype == torch.bfloat16


def test_an_fp32_weight_and_main_grad_stay_fp32(products):
    hidden, weight, ids, advantages, keep = case(90)
    main = torch.zeros(V, H)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    more = {"config": LossConfig("dapo"), "workspace_bytes": workspace(16)}
    linear_policy_loss(h, w, ids, advantages, main_grad=main, **more)[0].backward()
    assert {kind for _, kind, _ in products} == {torch.float32} and len(products) > 1
    assert relative(main, exact(hidden, weight, ids, advantages, keep)[1]) < 3e-3


@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_log_probs_and_an_upstream_factor(upstream, products):
    hidden, weight, ids, _, keep = case(90)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob(h, w, ids, workspace_bytes=workspace(16))
    (out.logp.mean() * upstream).backward()
    want = exact(hidden, weight, ids, torch.full((90,), -upstream), keep)
    assert products == [(90, torch.bfloat16, True)]
    assert relative(w.grad, want[1]) < 4e-3 and relative(h.grad, want[0]) < 4e-3


@pytest.mark.parametrize("loss_type, old", [("gspo", True), ("dapo", True), ("vespo", False)])
def test_every_route_lets_rows_wait(loss_type, old, products, monkeypatch):
    hidden, weight, ids, advantages, _ = case(90)
    bounds = torch.tensor([0, 30, 60, 90])
    with torch.no_grad():
        logp = linear_logprob(hidden, weight, ids).logp
    config = LossConfig(loss_type)
    more = {"config": config, "cu_seqlens": bounds, "workspace_bytes": workspace(32)}
    more["old_logp"] = logp - 0.01 if old else None
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        if dtype == torch.float64:
            monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
        h, w = (x.to(dtype).detach().clone().requires_grad_() for x in (hidden, weight))
        linear_policy_loss(h, w, ids, advantages, **more)[0].backward()
        results.append((h.grad, w.grad))
    assert products[0][1:] == (torch.bfloat16, True) and len(products) >= 2
    for one, want in zip(*results, strict=True):
        assert relative(one, want) < 4e-3


def test_an_adapter_bias_and_dead_rows(products, monkeypatch):
    hidden, weight, ids, _, _ = case(90)
    g = generator(5)
    bias = torch.randn(V, generator=g).bfloat16()
    A, B = torch.randn(3, H, generator=g).bfloat16() / 7, torch.randn(V, 3, generator=g).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        if dtype == torch.float64:
            monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
        leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight, bias, A, B)]
        more = {"bias": leaves[2], "lora": (leaves[3], leaves[4], 0.5)}
        more |= {"config": LossConfig("dapo"), "workspace_bytes": workspace(40)}
        linear_policy_loss(*leaves[:2], ids, torch.ones(90), **more)[0].backward()
        results.append([leaf.grad for leaf in leaves])
    for one, want in zip(*results, strict=True):
        assert relative(one, want) < 6e-3
    # nothing to do: zeros, and not what the memory held
    w = weight.clone().requires_grad_()
    linear_policy_loss(hidden, w, ids, torch.zeros(90), config=LossConfig("dapo"))[
        0
    ].backward()
    assert w.grad is None or not w.grad.any()


def test_the_peak_does_not_grow(monkeypatch):
    """2H rows: their dlogits and a bf16 dweight, 6 V H bytes, where an fp32 dweight and its rounded
    copy were."""
    N, V, H = 512, 4096, 256
    # what a CPU upcasts of the operands is not a GPU's
    monkeypatch.setattr(gemm, "SLICE_BYTES", 1 << 14)
    g = generator(3)
    hidden = torch.randn(N, H, generator=g).bfloat16().requires_grad_()
    weight = (torch.randn(V, H, generator=g) / H**0.5).bfloat16().requires_grad_()
    ids, advantages = torch.randint(V, (N,), generator=g), torch.randn(N, generator=g)
    peaks = []
    for most in (2 * H, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("grpo_fast.engine.gradients.held_in", lambda *_, most=most: most)
            release_workspace()
            hidden.grad = weight.grad = None
            with Allocations(hidden, weight) as seen:
                budget = FIXED_BYTES + 64 * 4 * (V + 3 * H)
                loss, _ = linear_policy_loss(
                    hidden, weight, ids, advantages, workspace_bytes=budget
                )
                loss.backward()
            peaks.append(seen.peak)
    held, wide = peaks
    print(f"peak {held} B with rows that wait, {wide} B with an fp32 dweight")
    # the hidden states of a product, upcast, dhidden that is fp32 until backward, (N,) vectors
    assert held <= wide + (4 + 2) * N * H + 32 * 4 * N
