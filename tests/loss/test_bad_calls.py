"""A table of bad calls. Each of them is one ValueError that names the argument, says what was
expected and what came, and comes before any row function or product."""

import pytest
import torch
from bad_input import BAD, CONFIGS, NAN, with_id
from loss_cases import make_case

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss, logprob, policy_loss
from grpo_fast.advantages.group import group_advantages
from grpo_fast.objective.weights import count

HALF = {"config": LossConfig(top_entropy_quantile=0.5)}
LORA = (torch.zeros(2, 24), torch.zeros(77, 2), 0.5)
INF = float("inf")


def _given(*names):
    case = make_case()
    known = {**vars(case), "logits": torch.zeros(4, 9, 77), "rollout_logp": case.old_logp}
    return {name: known[name] for name in names}


def _head(**more):
    return {**_given("hidden", "weight", "ids", "mask"), **more}


def _linear(**more):
    return {**_given("hidden", "weight", "ids", "mask", "advantages", "old_logp"), **more}


def _logits(**more):
    return {**_given("logits", "ids", "mask", "advantages", "old_logp"), **more}


def _rows(**more):
    return {**_given("logits", "ids", "mask"), **more}


def _packed(**more):
    mask = make_case().mask
    given = {k: v[mask] for k, v in _given("hidden", "ids", "old_logp").items()}
    return {**given, **_given("weight"), "advantages": torch.ones(16), **more}


def meta(t):
    return t.to("meta")


# function, its good arguments, the bad one and what makes it bad, what came
CALLS = [
    (linear_logprob, _head, "ids", with_id(77), "77"),
    (linear_logprob, _head, "ids", with_id(-1), "-1"),
    (linear_logprob, _head, "ids", with_id(-100), "-100"),
    (linear_logprob, _head, "ids", with_id(2**40), "1099511627776"),
    (linear_logprob, _head, "ids", lambda t: t[0], r"\(9,\)"),
    (linear_logprob, _head, "ids", meta, "meta"),
    (linear_logprob, _head, "ids", lambda t: None, "None"),
    (linear_logprob, _head, "hidden", meta, "meta"),
    (linear_logprob, _head, "hidden", lambda t: t.tolist(), "list"),
    (linear_logprob, _head, "weight", lambda t: t[0], r"\(24,\)"),
    (linear_logprob, _head, "weight", lambda t: t.double(), "float64"),
    (linear_logprob, _head, "mask", lambda t: t[:, 1:], r"\(4, 8\)"),
    (linear_logprob, _head, "mask", meta, "meta"),
    (linear_logprob, _head, "mask", lambda t: t.tolist(), "list"),
    (linear_logprob, _head, "bias", lambda _: torch.zeros(77, 1), r"\(77, 1\)"),
    (linear_logprob, _head, "bias", lambda _: torch.zeros(77).long(), "int64"),
    (linear_logprob, _head, "temperature", lambda _: torch.ones(9), r"\(9,\)"),
    (linear_logprob, _head, "temperature", lambda _: torch.zeros(4), "0.0"),
    (linear_logprob, _head, "temperature", lambda _: torch.tensor([1, 1, 1, -0.5]), "-0.5"),
    (linear_logprob, _head, "temperature", lambda _: torch.full((4, 9), NAN), "nan"),
    (linear_logprob, _head, "temperature", lambda _: torch.ones(4).long(), "int64"),
    (linear_logprob, _head, "temperature", lambda _: torch.ones(4, device="meta"), "meta"),
    (linear_logprob, _head, "softcap", lambda _: -3.0, "-3.0"),
    (linear_logprob, _head, "softcap", lambda _: True, "True"),
    (linear_logprob, _head, "logit_scale", lambda _: INF, "inf"),
    (linear_logprob, _head, "logit_scale", lambda _: torch.ones(()), "tensor"),
    (linear_logprob, _head, "workspace_bytes", lambda _: 0, "0"),
    (linear_logprob, _head, "workspace_bytes", lambda _: "1 GiB", "1 GiB"),
    (linear_logprob, _head, "lora", lambda _: LORA[:2], "tuple"),
    (linear_logprob, _head, "lora", lambda _: [*LORA], "list"),
    (linear_logprob, _head, "lora A", lambda _: (torch.zeros(2, 23), *LORA[1:]), r"\(2, 23\)"),
    (linear_logprob, _head, "lora A", lambda _: (torch.zeros(0, 24), *LORA[1:]), r"\(0, 24\)"),
    (linear_logprob, _head, "lora B", lambda _: (LORA[0], torch.zeros(76, 2), 1.0), r"\(76, 2\)"),
    (linear_logprob, _head, "lora B", lambda _: (LORA[0], torch.zeros(77, 3), 1.0), r"\(77, 3\)"),
    (linear_logprob, _head, "lora scale", lambda _: (*LORA[:2], NAN), "nan"),
    (logprob, _rows, "logits", lambda t: t[0, 0], r"\(77,\)"),
    (logprob, _rows, "logits", meta, "meta"),
    (logprob, _rows, "logits", lambda t: t.bool(), "bool"),
    (logprob, _rows, "logits", lambda t: t.transpose(1, 2), "strides"),
    (logprob, _rows, "ids", with_id(-1), "-1"),
    (logprob, _rows, "ids", lambda t: t.T, r"\(9, 4\)"),
    (logprob, _rows, "mask", lambda t: t[0], r"\(9,\)"),
    (logprob, _rows, "temperature", lambda _: torch.ones(4, 1), r"\(4, 1\)"),
    (logprob, _rows, "temperature", lambda _: -2, "-2"),
    (linear_policy_loss, _linear, "temperature", lambda _: 0.7, "0.7"),
    (linear_policy_loss, _linear, "temperature", lambda _: torch.ones(36), r"\(36,\)"),
    (linear_policy_loss, _linear, "temperature", lambda _: torch.full((4,), INF), "inf"),
    (linear_policy_loss, _linear, "advantages", lambda t: t.expand(4, 4), r"\(4, 4\)"),
    (linear_policy_loss, _linear, "advantages", meta, "meta"),
    (linear_policy_loss, _linear, "old_logp", meta, "meta"),
    (linear_policy_loss, _linear, "old_logp", lambda t: t.long(), "int64"),
    (linear_policy_loss, _linear, "rollout_logp", lambda _: torch.zeros(4), r"\(4,\)"),
    (linear_policy_loss, _linear, "rollout_logp", lambda _: [0.0], "list"),
    (linear_policy_loss, _linear, "ref_weight", lambda _: torch.zeros(77, 3), r"\(77, 3\)"),
    (linear_policy_loss, _linear, "ref_hidden", lambda _: torch.zeros(4, 9, 23), r"\(4, 9, 23\)"),
    (linear_policy_loss, _linear, "ref_hidden", lambda _: torch.zeros(4, 9, 24).half(), "float16"),
    (linear_policy_loss, _linear, "entropy_threshold", lambda _: 0.5, "0.5"),
    (
        linear_policy_loss,
        lambda **more: _linear(**HALF, **more),
        "entropy_threshold",
        lambda _: torch.ones(2),
        r"\(2,\)",
    ),
    (linear_policy_loss, lambda **more: _linear(**HALF, **more), "entropy_threshold", str, "str"),
    (
        linear_policy_loss,
        lambda **more: _linear(**HALF, **more),
        "entropy_threshold",
        lambda _: NAN,
        "nan",
    ),
    (
        linear_policy_loss,
        lambda **more: _linear(**HALF, **more),
        "skip_inactive_forward",
        lambda _: True,
        "True",
    ),
    (
        linear_policy_loss,
        lambda **more: _linear(max_rows=36, **more),
        "skip_inactive_forward",
        lambda _: True,
        "True",
    ),
    (linear_policy_loss, _linear, "max_rows", lambda _: 0, "0"),
    (linear_policy_loss, _linear, "max_rows", lambda _: 37, "37"),
    (linear_policy_loss, _linear, "max_rows", lambda _: 1.5, "1.5"),
    (linear_policy_loss, _linear, "max_rows", lambda _: True, "True"),
    (linear_policy_loss, _linear, "denominator", lambda _: -1.0, "-1.0"),
    (linear_policy_loss, _linear, "denominator", lambda _: INF, "inf"),
    (linear_policy_loss, _linear, "denominator", lambda _: True, "True"),
    (linear_policy_loss, _linear, "denominator", lambda _: "16", "16"),
    (linear_policy_loss, _linear, "config", lambda _: "grpo", "grpo"),
    (linear_policy_loss, _packed, "advantages", lambda _: torch.ones(4), r"\(4,\)"),
    (linear_policy_loss, _packed, "cu_seqlens", lambda _: [0, 16], "list"),
    (linear_policy_loss, _packed, "cu_seqlens", lambda _: torch.tensor([[0, 16]]), r"\(1, 2\)"),
    (linear_policy_loss, _packed, "cu_seqlens", lambda _: torch.tensor([0, 17]), "17"),
    (linear_policy_loss, _packed, "cu_seqlens", lambda _: meta(torch.tensor([0, 16])), "meta"),
    (policy_loss, _logits, "logits", lambda t: t.tolist(), "list"),
    (policy_loss, _logits, "ids", with_id(-100), "-100"),
    (policy_loss, _logits, "advantages", lambda t: t[:0], r"\(0,\)"),
    (policy_loss, _logits, "mask", lambda t: t[:3], r"\(3, 9\)"),
    (policy_loss, _logits, "old_logp", lambda t: t[:3], r"\(3, 9\)"),
    (policy_loss, _logits, "rollout_logp", lambda _: torch.zeros(4, 9).bool(), "bool"),
    (policy_loss, _logits, "temperature", lambda _: 2.0, "2.0"),
    (policy_loss, _logits, "denominator", lambda _: 0.0, "0.0"),
    (policy_loss, _logits, "max_rows", lambda _: -1, "-1"),
]


@pytest.mark.parametrize("function, good, name, change, got", CALLS)
def test_one_clear_error(function, good, name, change, got, no_kernels):
    arguments = good()
    key = name.split()[0]
    arguments[key] = change(arguments.get(key))
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .*{got}") as raised:
        function(**arguments)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("good, function", [(_linear, linear_policy_loss), (_logits, policy_loss)])
def test_the_table_starts_from_a_good_call(good, function):
    function(**good())
    function(**good(max_rows=36))
    function(**good(**HALF))


def test_the_reference_is_given_once(no_kernels):
    both = {"ref_hidden": torch.zeros(4, 9, 24), "ref_logp": torch.zeros(4, 9)}
    with pytest.raises(ValueError, match="^ref_hidden: expected None where ref_logp is given, got"):
        linear_policy_loss(**_linear(**both))
    odd = {"ref_hidden": torch.zeros(4, 9, 3), "ref_weight": torch.zeros(76, 3)}
    with pytest.raises(ValueError, match=r"^ref_weight: expected .*\(77, 3\).*, got .*\(76, 3\)"):
        linear_policy_loss(**_linear(**odd))


OPTIONS = [
    ("loss_type", {"loss_type": "GRPO"}, "'GRPO'"),
    ("aggregation", {"aggregation": "mean"}, "'mean'"),
    ("kl_gradient", {"kl_gradient": "k5"}, "'k5'"),
    ("rollout_correction", {"rollout_correction": "token"}, "'token'"),
    (
        "importance_sampling_level",
        {"loss_type": "gmpo", "importance_sampling_level": "token"},
        "'token'",
    ),
    (
        "importance_sampling_level",
        {"loss_type": "reinforce", "importance_sampling_level": "token"},
        "'token'",
    ),
    ("rollout_ratio_min", {"rollout_ratio_min": 4.0}, "4"),
    ("rollout_ratio_max", {"rollout_ratio_max": 0.0}, "0.0"),
    ("top_entropy_quantile", {"top_entropy_quantile": 0.0}, "0.0"),
    ("top_entropy_quantile", {"top_entropy_quantile": 1.1}, "1.1"),
    ("entropy_coef", {"entropy_coef": -1e-3}, "-0.001"),
    ("off_policy_mask_threshold", {"off_policy_mask_threshold": -0.1}, "-0.1"),
    ("vespo_lambda_pos", {"loss_type": "vespo", "vespo_lambda_pos": 0.0}, "0.0"),
    ("sapo_temperature_neg", {"loss_type": "sapo", "sapo_temperature_neg": "1"}, "'1'"),
    ("sapo_temperature_pos", {"sapo_temperature_pos": 2.0}, "2.0"),
    ("vespo_k_neg", {"loss_type": "sapo", "vespo_k_neg": 1.0}, "1.0"),
    ("cispo_ratio_min", {"cispo_ratio_min": 0.5}, "0.5"),
    ("cispo_ratio_min", {"loss_type": "cispo", "epsilon_high": 1.2, "cispo_ratio_min": 1.3}, "1.3"),
    ("delta", {"loss_type": "sapo", "delta": 2.0}, "2.0"),
    ("delta", {"delta": True}, "True"),
    ("max_completion_length", {"aggregation": "constant_length"}, "None"),
    ("max_completion_length", {"max_completion_length": True}, "True"),
    ("beta", {"beta": INF}, "inf"),
    ("temperature", {"temperature": 0}, "0"),
]


@pytest.mark.parametrize("name, options, got", OPTIONS)
def test_loss_config_names_the_option(name, options, got):
    with pytest.raises(ValueError, match=rf"^{name}\b.*got {got}"):
        LossConfig(**options)


def test_weights_and_advantages():
    with pytest.raises(ValueError, match="^cu_seqlens: .* got None"):
        count(LossConfig(loss_type="grpo"), torch.ones(5))
    with pytest.raises(ValueError, match=r"^mask: expected .* got \(2, 3, 1\)"):
        count(LossConfig(loss_type="grpo"), torch.ones(2, 3, 1))
    for bad in (torch.ones(4), torch.ones(2, 2).long(), torch.tensor([[1.0, INF]])):
        with pytest.raises(ValueError, match="^rewards: expected .*got"):
            group_advantages(bad)
    with pytest.raises(ValueError, match="^scale: expected .*got 'std'"):
        group_advantages(torch.ones(1, 2), "std")


def test_there_are_at_least_sixty_of_them():
    assert len(CALLS) >= 60 and len(CALLS) + len(OPTIONS) + len(BAD) + len(CONFIGS) >= 160
    assert {f.__name__ for f, *_ in CALLS} == {
        "linear_logprob",
        "logprob",
        "linear_policy_loss",
        "policy_loss",
    }
