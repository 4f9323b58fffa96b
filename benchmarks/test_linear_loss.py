"""The on-policy dapo loss from hidden states, forward and backward: ours against plain torch, fp32.

`make bench`; `--benchmark-json=FILE` saves. A correctness gate comes before every timing.
"""

import pytest
from cases import CPU_CASES, tensors

from grpo_fast import LossConfig, linear_policy_loss, reference


def plain_torch(hidden, weight, ids, advantages):
    logits = reference.head_logits(hidden, weight)[None]
    return reference.policy_loss(logits, ids[None], advantages[None], LossConfig())


def fused(hidden, weight, ids, advantages):
    return linear_policy_loss(hidden, weight, ids, advantages)[0]


def step(loss, case_tensors):
    hidden, weight, ids, advantages = case_tensors
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss(hidden, weight, ids, advantages).backward()
    return hidden.grad, weight.grad


@pytest.mark.parametrize("loss", [plain_torch, fused], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: c.name)
def test_linear_loss(benchmark, case, loss):
    given = tensors(case)
    sample = slice(0, 64)
    small = (given[0][sample], given[1], given[2][sample], given[3][sample])
    want = step(plain_torch, [t.double() if t.is_floating_point() else t for t in small])
    for got, exact in zip(step(loss, small), want, strict=True):
        assert (got.double() - exact).norm() <= 2e-5 * exact.norm()
    benchmark.group = case.name
    benchmark.pedantic(step, args=(loss, given), rounds=5, warmup_rounds=1)
