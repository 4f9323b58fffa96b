"""Bad arguments of the loss and log-prob functions: one ValueError that names the argument, before
any work."""

import pytest
import torch
from bad_input import BAD, CONFIGS, NAN, with_id
from loss_cases import make_case

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss, logprob, policy_loss


def arguments(**changes):
    case = make_case()
    given = {
        "hidden": case.hidden,
        "weight": case.weight,
        "ids": case.ids,
        "advantages": case.advantages,
        "mask": case.mask,
        "old_logp": case.old_logp,
        "ref_logp": case.ref_logp,
    }
    for name, change in changes.items():
        given[name] = change(given.get(name)) if callable(change) else change
    return given


@pytest.mark.parametrize("name, change, got", BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_linear_policy_loss_names_the_argument(name, change, got, no_kernels):
    with pytest.raises(ValueError, match=rf"{name}: .*expected.*{got}"):
        linear_policy_loss(**arguments(**{name: change}))


PACKED = [
    ("cu_seqlens", [1, 16], "from 0"),
    ("cu_seqlens", [0, 15], "N = 16"),
    ("cu_seqlens", [0, 9, 3, 16], "rising"),
    ("cu_seqlens", None, "boundaries for grpo"),
]


@pytest.mark.parametrize("name, value, text", PACKED)
def test_packed_boundaries(name, value, text, no_kernels):
    case = make_case()
    m = case.mask
    cu = None if value is None else torch.tensor(value)
    with pytest.raises(ValueError, match=rf"{name}: .*{text}"):
        linear_policy_loss(
            case.hidden[m],
            case.weight,
            case.ids[m],
            torch.ones(16),
            cu_seqlens=cu,
            config=LossConfig(loss_type="grpo"),
        )
    with pytest.raises(ValueError, match="cu_seqlens: .*integer"):
        linear_policy_loss(
            case.hidden[m], case.weight, case.ids[m], torch.ones(16), cu_seqlens=torch.ones(3)
        )


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, NAN, float("inf"), "1", True, None])
def test_temperature(temperature, no_kernels):
    case = make_case()
    logits = torch.zeros(4, 9, 77)
    with pytest.raises(ValueError, match="temperature"):
        LossConfig(temperature=temperature)
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        linear_logprob(case.hidden, case.weight, case.ids, mask=case.mask, temperature=temperature)
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        logprob(logits, case.ids, mask=case.mask, temperature=temperature)


def test_logits(no_kernels):
    case = make_case()
    for bad in (torch.zeros(77), torch.zeros(4, 9, 77, dtype=torch.long), torch.zeros(4, 9, 0)):
        with pytest.raises(ValueError, match="logits: expected"):
            policy_loss(bad, case.ids, case.advantages, mask=case.mask)
    with pytest.raises(ValueError, match="logits: expected stride 1 over V"):
        logprob(torch.zeros(4, 77, 9).transpose(1, 2), case.ids, mask=case.mask)
    with pytest.raises(ValueError, match="ids: expected .*77"):
        policy_loss(torch.zeros(4, 9, 77), with_id(77)(case.ids), case.advantages, mask=case.mask)


def test_reference_is_needed_for_beta(no_kernels):
    with pytest.raises(ValueError, match="ref_logp: .*beta = 0.1"):
        linear_policy_loss(**arguments(config=LossConfig(beta=0.1), ref_logp=None))


@pytest.mark.parametrize("fields, text", CONFIGS)
def test_loss_config(fields, text):
    with pytest.raises(ValueError, match=text):
        LossConfig(**fields)


def test_cispo_without_a_bound_warns():
    with pytest.warns(UserWarning, match="set epsilon_high"):
        LossConfig(loss_type="cispo")


def test_backend_choice(monkeypatch):
    from grpo_fast.engine.backend import explain, select

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("GRPO_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="auto, torch or triton"):
        select("cpu")
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1|not installed"):
        select("cpu")
    monkeypatch.setenv("GRPO_FAST_BACKEND", "auto")
    assert select("cpu").name == "torch"
    assert explain("cpu").startswith("torch on cpu (")


def test_ambiguous_packed_advantages(no_kernels):
    cu = torch.tensor([0, 2, 2])
    with pytest.raises(ValueError, match="advantages: .*S = N = 2 with an empty sequence"):
        linear_policy_loss(
            torch.ones(2, 4), torch.ones(5, 4), torch.zeros(2).long(), torch.ones(2), cu_seqlens=cu
        )


def test_inplace_needs_rows_of_its_own(no_kernels):
    leaf = torch.zeros(2, 3, 9, requires_grad=True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="logits: expected a non-leaf tensor"):
        policy_loss(leaf, ids, torch.ones(2), inplace=True)
    shared = (leaf[:1] * 1.0).expand(2, 3, 9)
    with pytest.raises(ValueError, match="logits: expected rows that do not overlap"):
        policy_loss(shared, ids, torch.ones(2), inplace=True)
