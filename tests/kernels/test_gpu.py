"""What only a real GPU can show of the kernels. `--backend cuda` runs the tests marked `kernels`
there too.

`GRPO_FAST_REHEARSAL=1` runs what also makes sense on a CPU there, with the torch backend: a mistake
in this file is then found without a GPU.
"""

import os

import pytest
import torch
from loss_cases import make_case, preset_config, relative, truth

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss, logprob
from grpo_fast.engine import chunks
from grpo_fast.engine.backend import select

REHEARSAL = os.environ.get("GRPO_FAST_REHEARSAL") == "1"
pytestmark = [] if REHEARSAL else pytest.mark.gpu
needs_gpu = pytest.mark.skipif(REHEARSAL, reason="shows something of a GPU alone")


@pytest.fixture(autouse=True)
def on_gpu():
    if REHEARSAL:
        yield
        return
    assert select("cuda").name == "triton"
    with torch.device("cuda"):
        yield


@needs_gpu
def test_more_elements_than_int32_holds():
    """16,384 rows of 151,936 logits: 2.5e9 elements; the last rows against float64."""
    n, V = 16384, 151936
    logits = torch.randn(n, V, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(V, (n,))
    out = logprob(logits, ids)
    want = torch.log_softmax(logits[-64:].detach().double(), -1).gather(1, ids[-64:, None])[:, 0]
    torch.testing.assert_close(out.logp[-64:].double(), want, rtol=1e-5, atol=1e-5)
    out.logp[-1].backward()
    assert not logits.grad[:-1].any() and logits.grad[-1, ids[-1]] > 0


def test_repeats_are_bit_equal():
    case = make_case(V=32001, H=64, dtype=torch.bfloat16)
    first = None
    for _ in range(50):
        weight = case.weight.clone().requires_grad_()
        loss, _ = linear_policy_loss(
            case.hidden, weight, case.ids, case.advantages, mask=case.mask, old_logp=case.old_logp
        )
        loss.backward()
        first = weight.grad if first is None else first
        assert torch.equal(weight.grad, first)


@needs_gpu
def test_peak_memory_stays_within_the_workspace():
    N, V, H, workspace = 8192, 65536, 1024, 512 << 20
    hidden = torch.randn(N, H, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=True)
    ids, advantages = torch.randint(V, (N,)), torch.randn(N)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = linear_policy_loss(hidden, weight, ids, advantages, workspace_bytes=workspace)
    loss.backward()
    used = torch.cuda.max_memory_allocated() - before
    # fp32 accumulators and the downcast gradients
    assert used <= 1.1 * ((4 + 2) * (N + V) * H + workspace)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_equal_weights_give_a_ratio_of_exactly_one(loss_type, dtype):
    """Old log-probs of `linear_logprob` and those inside the loss come from other kernels, which
    have to add up a row in the same order."""
    case = make_case(V=32001, H=64, lengths=(40, 30, 7), dtype=dtype)
    with torch.no_grad():
        old = linear_logprob(case.hidden, case.weight, case.ids, mask=case.mask).logp
    weight = case.weight.clone().requires_grad_()
    _, metrics = linear_policy_loss(
        case.hidden,
        weight,
        case.ids,
        case.advantages,
        mask=case.mask,
        old_logp=old,
        ref_logp=old,
        config=LossConfig(loss_type=loss_type, beta=0.1),
    )
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0 and metrics["kl"] == 0.0


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_by_slices_of_the_vocabulary(loss_type, dtype, monkeypatch):
    """What chunks of under 1,024 rows lead to, with dweight straight into a main gradient."""
    monkeypatch.setitem(chunks.COLUMNS_FIRST, "cpu", 10**6)
    case = make_case(V=5000, H=64, lengths=(40, 30, 7, 40), dtype=dtype)
    want = truth(case, preset_config(loss_type), use_old=True, use_ref=False)
    hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    main = torch.zeros_like(weight, dtype=torch.float32)
    given = {
        "config": preset_config(loss_type),
        "mask": case.mask,
        "old_logp": case.old_logp,
        "workspace_bytes": chunks.FIXED_BYTES + 64 * 4 * (5000 + 3 * 64),
        "main_grad": main,
    }
    plan = linear_policy_loss(hidden, weight, case.ids, case.advantages, **given, explain=True)
    assert plan.route == "two_passes" and "slices of the vocabulary" in plan.reason
    loss, _ = linear_policy_loss(hidden, weight, case.ids, case.advantages, **given)
    loss.backward()
    bound = 2e-5 if dtype == torch.float32 else 1e-2
    assert relative(hidden.grad, want[1]) < bound and relative(main, want[2]) < bound


@needs_gpu
def test_a_loss_in_a_cuda_graph():
    """`max_rows` reads nothing back: captured once, replayed with other values."""
    case = make_case(V=5000, H=64, lengths=(40, 30, 7), dtype=torch.bfloat16)
    hidden, weight = torch.nan_to_num(case.hidden), case.weight.clone().requires_grad_()
    advantages = case.advantages.clone()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss, _ = linear_policy_loss(
            hidden,
            weight,
            case.ids,
            advantages,
            mask=case.mask,
            old_logp=case.old_logp,
            denominator=77,
            max_rows=96,
        )
        return loss, torch.autograd.grad(loss, weight)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    advantages.copy_(torch.tensor([0.3, -1.0, 2.0]))
    graph.replay()
    torch.cuda.synchronize()
    want_loss, want_grad = step()
    assert torch.equal(loss, want_loss) and torch.equal(grad, want_grad)


@needs_gpu
def test_nothing_waits_for_the_device():
    """`max_rows` under torch's own sync detector."""
    case = make_case(V=5000, H=64, lengths=(40, 30, 7))
    weight = case.weight.clone().requires_grad_()
    for loss_type in ("dapo", "gspo", "vespo"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = linear_policy_loss(
                case.hidden,
                weight,
                case.ids,
                case.advantages,
                mask=case.mask,
                old_logp=case.old_logp,
                config=preset_config(loss_type),
                denominator=77,
                max_rows=96,
            )
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(loss)
