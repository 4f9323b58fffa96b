"""`triton_grpo_loss` on our kernels and on Liger's, both in Triton's interpreter."""

import pytest
import torch
from liger_cases import KINDS, Options, data, from_logits, logits_of, token_truth, truth
from liger_parity import BOUND, distance, few, liger

from grpo_fast.integrations.liger.logits import triton_grpo_loss

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.triton,
    pytest.mark.usefixtures("backend"),
]


def call(function, o, d, reduce):
    keywords = {**o.keywords, "eps_low": 0.2, "eps_high": o.epsilon_high, "reduce": reduce}
    args = (None, d.ids, d.advantages, d.mask)
    return function(logits_of(o, d).requires_grad_(), d.old_logp, *args, **keywords)[0]


# Liger's backward of the one left out is wrong, see the tests below
COMPARED = [(*kind, reduce) for kind in KINDS for reduce in (True, False)]
COMPARED.remove(("luspo", "token", True))


@pytest.mark.parametrize("loss_type, level, reduce", COMPARED)
def test_function_equals_liger_and_float64(loss_type, level, reduce):
    theirs = liger("triton_grpo_loss")
    # luspo's means agree where nothing is masked
    lengths = (5, 5) if loss_type == "luspo" and reduce else (5, 1, 0)
    nan, clean = data(lengths=lengths), data(0.0, lengths=lengths)
    for o in few(loss_type, level):
        got = from_logits(triton_grpo_loss, o, nan, reduce)
        other = from_logits(theirs, o, clean, reduce)
        want = (truth if reduce else token_truth)(o, nan)
        assert got.keys() == other.keys()
        for name, value in got.items():
            assert distance(name, other[name], want[name]) <= BOUND, (name, o)
            if name == "weighted_kl" and reduce:
                # docs/liger.md: the mean is that of the plain estimate
                assert distance(name, value, want["kl"]) <= BOUND, o
                continue
            assert distance(name, value, want[name]) <= BOUND, (name, o)
            assert distance(name, value, other[name]) <= BOUND, (name, o)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_reduced_luspo_of_liger_spreads_a_length(level):
    """Liger 0.8.5: (token_loss * length).mean() over B L, at both levels."""
    theirs = liger("triton_grpo_loss")
    o, d = Options("luspo", level), data(0.0, lengths=(5, 1, 0))
    ours, other = (call(f, o, d, True) for f in (triton_grpo_loss, theirs))
    tokens = call(triton_grpo_loss, o, d, False)
    assert distance("loss", other, (tokens * d.mask.sum(1, keepdim=True)).mean()) <= BOUND
    assert distance("loss", ours, tokens.sum() / 3) <= BOUND
    assert distance("loss", ours, truth(o, d)["loss"]) <= BOUND
    assert abs(other - ours) > 0.01


def test_reduced_luspo_of_liger_reads_beyond_its_upstream_gradient():
    """At token level its kernel takes the (B, 1) upstream gradient for (B, L)."""
    theirs = liger("triton_grpo_loss")
    o, d = Options("luspo", "token"), data(0.0, lengths=(5, 5))
    loss = call(theirs, o, d, True)
    errors = pytest.importorskip("triton.runtime.errors")
    with pytest.raises(errors.InterpreterError, match="out of bounds.*DLOSS"):
        loss.backward()
    got = from_logits(triton_grpo_loss, o, d, True)
    assert distance("logits", got["logits"], truth(o, d)["logits"]) <= BOUND


def test_liger_writes_the_gradient_in_backward_and_we_in_forward():
    d = data(0.0, lengths=(5, 1))
    for function, early in ((liger("triton_grpo_loss"), False), (triton_grpo_loss, True)):
        logits = torch.randn(2, 6, 77, requires_grad=True) * 1.0
        before = logits.detach().clone()
        args = (None, None, d.ids, d.advantages, d.mask)
        loss, _ = function(logits, *args, beta=0.0, reduce=True)
        assert torch.equal(logits.detach(), before) != early
        loss.backward()
        assert not torch.equal(logits.detach(), before)
