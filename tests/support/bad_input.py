"""Bad arguments of `linear_policy_loss`, bad fields of `LossConfig`, and what the error says."""

import torch

NAN = float("nan")


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
