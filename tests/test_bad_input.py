"""Bad arguments of the loss and log-prob functions: one ValueError that names the argument, before
any work."""

import pytest
import torch
from loss_cases import make_case

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss, logprob, policy_loss

NAN = float("nan")


@pytest.fixture
def no_kernels(monkeypatch):
    """Any row function that runs is a failure: the check came too late."""

    def refuse(*args, **kwargs):
        raise AssertionError("work began before the arguments were checked")

    for name in ("logprob_fwd", "logprob_bwd", "policy"):
        monkeypatch.setattr(f"grpo_fast.engine.torch_backend.{name}", refuse)
    monkeypatch.setattr("grpo_fast.engine.gemm.project", refuse)


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


def with_id(value):
    return lambda ids: torch.where(torch.arange(9) == 0, value, ids)


BAD = [
    ("ids", with_id(77), "77"),
    ("ids", with_id(-1), "-1"),
    ("ids", with_id(2**40), "1099511627776"),
    ("ids", lambda t: t[:, :-1], r"\(4, 8\)"),
    ("ids", lambda t: t.float(), "float32"),
    ("ids", lambda t: t > 3, "bool"),
    ("ids", lambda t: t.tolist(), "list"),
    ("hidden", lambda t: t[0, 0], r"\(24,\)"),
    ("hidden", lambda t: t.long(), "int64"),
    ("weight", lambda t: t.T, r"\(24, 77\)"),
    ("weight", lambda t: t[:, :-1], r"\(77, 23\)"),
    ("weight", lambda t: t.half(), "float16"),
    ("weight", lambda t: t[:0], r"\(0, 24\)"),
    ("weight", lambda t: t.to("meta"), "meta"),
    ("bias", lambda t: torch.zeros(76), r"\(76,\)"),
    ("mask", lambda t: t[:1], r"\(1, 9\)"),
    ("mask", lambda t: t.any(1), r"\(4,\)"),
    ("advantages", lambda t: t[:3], r"\(3,\)"),
    ("advantages", lambda t: t[:, None], r"\(4, 1\)"),
    ("advantages", lambda t: torch.ones(9), r"\(9,\)"),
    ("advantages", lambda t: torch.ones(8)[::2], "strides"),
    ("advantages", lambda t: torch.ones(4, 1).expand(4, 9), "strides"),
    ("advantages", lambda t: t.long(), "int64"),
    ("advantages", lambda t: 1.0, "float"),
    ("old_logp", lambda t: t[:, :1], r"\(4, 1\)"),
    ("old_logp", lambda t: t.reshape(-1), r"\(36,\)"),
    ("ref_logp", lambda t: t[None], r"\(1, 4, 9\)"),
    ("cu_seqlens", lambda t: torch.tensor([0, 36]), "padded"),
    ("denominator", lambda t: 0, "0"),
    ("denominator", lambda t: NAN, "nan"),
    ("denominator", lambda t: torch.ones(2), r"\(2,\)"),
    ("denominator", lambda t: torch.tensor(NAN), "nan"),
    ("denominator", lambda t: torch.tensor(-4.0), "-4"),
    ("denominator", lambda t: torch.tensor(True), "bool"),
    ("softcap", lambda t: "5", "'5'"),
    ("logit_scale", lambda t: None, "None"),
    ("softcap", lambda t: 0.0, "0"),
    ("softcap", lambda t: NAN, "nan"),
    ("logit_scale", lambda t: 0.0, "0"),
    ("workspace_bytes", lambda t: 1000, "1000"),
    ("workspace_bytes", lambda t: 1e9, "1000000000"),
    ("skip_inactive_forward", lambda t: 1, "got 1"),
    ("config", lambda t: {"loss_type": "grpo"}, "dict"),
]


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


CONFIGS = [
    ({"loss_type": "gropo"}, "did you mean 'grpo'"),
    ({"loss_type": None}, "loss_type.*Known: grpo"),
    ({"importance_sampling_level": "sequnce"}, "did you mean 'sequence'"),
    ({"kl_estimator": "k4"}, "kl_estimator"),
    ({"epsilon": -0.1}, "epsilon: expected a finite number >= 0, got -0.1"),
    ({"epsilon": NAN}, "epsilon"),
    ({"epsilon_high": float("inf")}, "epsilon_high"),
    ({"delta": 1.1}, r"delta: expected a finite number > 1.2, got 1.1"),
    ({"delta": 2.0, "loss_type": "cispo", "epsilon_high": 5.0}, "delta: expected None: cispo"),
    ({"beta": -1}, "beta"),
    ({"use_bias_correction_kl": "yes"}, "use_bias_correction_kl"),
    ({"loss_type": "dr_grpo"}, "max_completion_length: expected a number of tokens: dr_grpo"),
    ({"max_completion_length": 0}, "max_completion_length"),
    ({"max_completion_length": 2.5}, "max_completion_length"),
]


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
