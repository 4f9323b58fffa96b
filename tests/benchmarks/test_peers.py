"""The contestants of the benchmarks compute what grpo_fast computes, or say why they cannot run."""

import pytest
import torch

from benchmarks.cases import Case, make
from benchmarks.peers import PEERS, LogitsBatch, Peer, reason, version
from grpo_fast import reference

SHAPE = {"B": 4, "T": 32, "H": 64, "V": 301, "lengths": "alternate"}
CASES = (
    Case("off-policy", active=0.5, old=True, beta=0.1, **SHAPE),
    Case("frozen", trainable=False, flat=True, **SHAPE),
)
# Each compilation takes seconds on a CPU, so these have one case and one level.
COMPILED = ("torch.compile", "Liger compiled", "CCE torch")
TOLERANCE = 2e-5


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def double(tensor):
    return None if tensor is None else tensor.double()


def truth(case, batch, logits):
    """The loss of float64 logits (B, T, V)."""
    return reference.policy_loss(
        logits,
        batch.ids,
        batch.advantages.double(),
        case.config,
        mask=batch.mask,
        old_logp=double(batch.old_logp),
        ref_logp=double(batch.ref_logp),
    )


def leaves(case, batch):
    hidden = batch.hidden.detach().double().requires_grad_()
    weight = batch.weight.detach().double().requires_grad_(case.trainable)
    return hidden, weight, reference.head_logits(hidden, weight)


def head_errors(batch, hidden, weight):
    errors = {"dhidden": relative(batch.hidden.grad, hidden.grad)}
    if weight.grad is None:
        assert batch.weight.grad is None
    else:
        errors["dweight"] = relative(batch.weight.grad, weight.grad)
    return errors


def linear_errors(case, function):
    batch = make(case)
    hidden, weight, logits = leaves(case, batch)
    want = truth(case, batch, logits)
    want.backward()
    loss = function(batch)
    loss.backward()
    return {"loss": relative(loss.detach(), want.detach()), **head_errors(batch, hidden, weight)}


def logits_errors(case, function):
    batch = make(case)
    with torch.no_grad():
        logits = torch.nn.functional.linear(batch.hidden, batch.weight)
        logits = torch.cat([logits, torch.randn(case.B, 1, case.V)], 1)
    exact = logits[:, :-1].double().requires_grad_()
    want = truth(case, batch, exact)
    want.backward()
    before = logits.clone()
    loss, leaf = function(LogitsBatch(logits, *batch[2:]))
    loss.backward()
    assert torch.equal(logits, before) and leaf.data_ptr() == logits.data_ptr()
    return {
        "loss": relative(loss.detach(), want.detach()),
        "dlogits": relative(leaf.grad[:, : case.T], exact.grad),
    }


def logprob_errors(case, function):
    batch = make(case)
    upstream = torch.randn(case.B, case.T)[batch.mask]
    hidden, weight, logits = leaves(case, batch)
    want = reference.logprob(logits, batch.ids)[0][batch.mask]
    (want * upstream.double()).sum().backward()
    logp = function(batch)
    logp = logp[batch.mask] if logp.dim() == 2 else logp
    (logp * upstream).sum().backward()
    return {"logp": relative(logp.detach(), want.detach()), **head_errors(batch, hidden, weight)}


ERRORS = {"linear": linear_errors, "logits": logits_errors, "logprob": logprob_errors}


@pytest.mark.parametrize(
    ("peer", "level"),
    [(p, level) for p in PEERS for level in p.build if p.name not in COMPILED or level == "linear"],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_agrees_with_float64(peer, level):
    for case in CASES[:1] if peer.name in COMPILED else CASES:
        why = reason(peer, case, level, "cpu")
        if why is not None:
            pytest.skip(why)
        for name, error in ERRORS[level](case, peer.build[level](case)).items():
            assert error <= TOLERANCE, (case.name, name)


def test_case_clips_some_tokens_and_not_others():
    case = CASES[0]
    batch = make(case)
    logp = reference.logprob(leaves(case, batch)[2], batch.ids)[0]
    counted = batch.mask & (batch.advantages != 0)[:, None]
    ratio = (logp - batch.old_logp).exp()[counted]
    low, high = case.config.ratio_bounds
    assert (ratio < low).any() and (ratio > high).any() and ((ratio > low) & (ratio < high)).any()


def test_every_contestant_is_listed_and_says_why_it_cannot_run():
    assert PEERS[0].name == "grpo_fast"
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    for peer in PEERS:
        for level in ERRORS:
            why = reason(peer, CASES[0], level, "cpu")
            assert why is None or (why.endswith(".") and why.count(" ") > 3), why


def test_missing_package_is_a_reason():
    def build(case):
        import no_such_package_as_this  # noqa: F401

    peer = Peer("nobody", "no-such-package-as-this", "nothing", {"linear": build})
    why = reason(peer, CASES[0], "linear", "cpu")
    assert why == (
        "no-such-package-as-this cannot be imported: No module named 'no_such_package_as_this'."
    )
    assert (
        reason(peer, CASES[0], "logits", "cpu") == "nobody offers nothing for the level 'logits'."
    )
    assert version(peer) is None
