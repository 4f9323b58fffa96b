"""100 bad inputs of a run: options, data, rewards, models and YAML, and what the sentence names."""

from __future__ import annotations

NAN, INF = float("nan"), float("inf")

# option of GRPOConfig -> values that it may not have
OPTIONS = [
    *(("num_generations", v) for v in (0, 1, 3, 2.0, "8", True)),
    *(("num_generations_eval", v) for v in (0, -1, 1.5)),
    *(("num_iterations", v) for v in (0, 1.5)),
    *(("steps_per_generation", v) for v in (0, "2")),
    *(("generation_batch_size", v) for v in (6, 0)),
    *(("max_completion_length", v) for v in (0, -5, 2.5)),
    *(("temperature", v) for v in (0.0, -1.0, NAN, INF, "hot")),
    *(("top_p", v) for v in (0.0, 1.5, "0.9")),
    *(("top_k", v) for v in (-1, 2.5)),
    *(("min_p", v) for v in (2, -0.1)),
    *(("repetition_penalty", v) for v in (0.0, INF)),
    *(("loss_type", v) for v in ("dappo", "", None)),
    *(("importance_sampling_level", v) for v in ("seq", 3)),
    *(("epsilon", v) for v in (-0.1, NAN, "0.2")),
    ("epsilon_high", INF),
    ("delta", 1.1),
    *(("beta", v) for v in (-0.1, NAN, "small")),
    ("kl_estimator", "k4"),
    *(("entropy_coef", v) for v in (NAN, -1.0)),
    ("top_entropy_quantile", 0.0),
    ("off_policy_mask_threshold", NAN),
    ("scale_rewards", "groups"),
    ("multi_objective_aggregation", "sum"),
    ("advantage_estimator", "grop"),
    ("sync_ref_model", True),
    ("reward_timeout", -1),
    ("workspace_bytes", 0),
    ("num_completions_to_print", 0),
    ("learning_rate", INF),
    ("weight_decay", -1.0),
    ("label_smoothing_factor", 0.1),
    ("neftune_noise_alpha", 5.0),
    ("remove_unused_columns", True),
    ("auto_find_batch_size", True),
    ("generation_kwargs", {"topk": 1}),
    ("generation_kwargs", {"temperature": 2}),
    ("sampler", "vlm"),
    ("sampler_url", "http://here"),
    ("old_logp_source", "both"),
    ("kl_controller", "adaptiv"),
    ("router_aux_loss_coef", -1),
    ("pad_to_multiple_of", 0),
    ("entropy_target", -1),
    ("use_vllm", True),
]
GOOD = {"prompt": "w1 w2", "target": "w1"}
# name of the case -> rows
DATA = {
    "no rows": [],
    "no column prompt": [{"text": "w1"}],
    "rows that are strings": ["w1"],
    "a string": "w1",
    "an empty prompt": [{"prompt": "", "target": "w1"}],
    "a prompt that is a number": [{"prompt": 3, "target": "w1"}],
    "no prompt": [{"prompt": None, "target": "w1"}],
    "no messages": [{"prompt": [], "target": "w1"}],
    "a message without content": [{"prompt": [{"role": "user"}], "target": "w1"}],
    "content in parts": [{"prompt": [{"role": "user", "content": [1]}], "target": "w1"}],
    "two kinds": [GOOD, {"prompt": [{"role": "user", "content": "w1"}], "target": "w1"}],
    "another row's columns": [GOOD, {"prompt": "w1"}],
    "too long": [{"prompt": "w1 " * 80, "target": "w1"}],
    "half a pair": [{"prompt": "\ud800", "target": "w1"}],
    "an image": [{**GOOD, "image": 1}],
    "a name of the caller's": [{**GOOD, "completions": "w1"}],
}
# name of the case -> what a reward returns for four completions
RETURNS = {
    "nothing": None,
    "one number": 1.0,
    "too few": [1.0] * 3,
    "too many": [1.0] * 5,
    "words": ["good"] * 4,
    "infinity": [1.0, INF, 0.0, 0.0],
    "lists": [[1.0]] * 4,
    "a dict": {"reward": [1.0] * 4},
}
# what stands where a reward should
REWARDS = {"none": None, "no rewards": [], "a number": 3, "unknown rule": "rule:maths"}
YAML = {
    "unknown key": "learning_rte: 3",
    "a list": "[1]",
    "not closed": "a: [",
    "a word for a number": "seed: abc",
    "a list for a number": "seed: [1]",
    "null": "seed: null",
    "a word for a yes": "bf16: perhaps",
    "half a step": "max_steps: 2.5",
    "unknown choice": "eval_strategy: never",
    "empty": "",
    "twice": "seed: 1\nseed: 2",
    "a word in a list": "reward_weights: [a]",
}
