"""GRPOConfig: `TrainingArguments` plus what GRPO needs, under TRL's names and defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from grpo_fast.advantages.reward_weights import SCHEMES, check_weighting
from grpo_fast.advantages.table import ADVANTAGES, check_estimator
from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.presets import AGGREGATIONS, KL_ESTIMATORS, LEVELS, PRESETS
from grpo_fast.rewards.checks import check_limit
from grpo_fast.rewards.combination import check_aggregation

from .inherited import check_inherited
from .kl import KLOptions
from .kl import option as _option

_SCALES = {True: "group", False: "none", "True": "group", "False": "none"}
# (option, keyword of `reward_weights`)
_WEIGHTING = (
    ("reward_weight_scheme", "scheme"),
    ("reward_weight_temperature", "temperature"),
    ("reward_weight_keep", "keep"),
)


def _listed(names: Any) -> str:
    return ", ".join(names)


@dataclass
class GRPOConfig(KLOptions, TrainingArguments):
    """Arguments of `GRPOTrainer`.

    The loss fields take their defaults from `LossConfig`, which also validates them. Batches, with
    `B = per_device_train_batch_size`, `P` ranks, `S = steps_per_generation`:

        generation_batch_size = B * P * S      completions sampled at once
        window                = S micro-batches of B completions on each rank,
                                used num_iterations times

    Advantages are those of the paper of `loss_type` (`PRESETS[loss_type].advantage`), with two
    exceptions: dr_grpo divides by the std of the group until scale_rewards="none" (or False) says
    otherwise, as in TRL, and ppo and reinforce, which name no estimator, take those of the group.
    `advantage_estimator` chooses another one, `scale_rewards` the division of the group's.

    Defaults of `TrainingArguments` that differ here: learning_rate 1e-6, logging_steps 10,
    remove_unused_columns False (reward functions get every column), logging_nan_inf_filter False
    (it hides a NaN loss and costs a host sync for each micro-batch), dataloader_pin_memory False
    (the loader yields rows of the dataset, no tensors), metric_for_best_model "reward", bf16 True
    where CUDA supports it and neither `bf16` nor `fp16` was given (False on CPU and MPS). Model
    strings load in float32 unless `model_init_kwargs` says otherwise.

    Raises:
        ValueError: for any value out of range, before anything is loaded.
    """

    fewest_generations: ClassVar[int] = 2

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    learning_rate: float = _option(1e-6, "Peak learning rate.")
    logging_steps: float = _option(10, "Log every so many optimizer steps.")
    remove_unused_columns: bool | None = _option(
        False, "Must stay False: reward functions read the dataset's columns."
    )
    logging_nan_inf_filter: bool = _option(False, "Leave NaN losses out of the logged loss.")
    dataloader_pin_memory: bool = _option(False, "Pin the memory of what the loader yields.")
    bf16: bool | None = _option(None, "bf16 autocast; default: True where CUDA supports it.")

    # policy and data
    model_init_kwargs: dict | str | None = _option(
        None, "Keyword arguments of from_pretrained when the model is a string (dict or JSON)."
    )
    disable_dropout: bool = _option(False, "Set every dropout of the policy to 0.")
    shuffle_dataset: bool = _option(True, "Shuffle the prompts in each epoch.")
    chat_template_kwargs: dict | str | None = _option(
        None, "Further arguments of the chat template for conversational prompts (dict or JSON)."
    )

    # sampling
    num_generations: int = _option(8, "Completions per prompt: the group. At least 2.")
    num_generations_eval: int | None = _option(
        None, "Completions per prompt in evaluation; default: num_generations."
    )
    max_completion_length: int = _option(512, "Tokens sampled at most.")
    generation_batch_size: int | None = _option(
        None, "Completions sampled at once over all ranks; excludes steps_per_generation."
    )
    steps_per_generation: int | None = _option(
        None, "Micro-batches sampled at once; default: gradient_accumulation_steps."
    )
    temperature: float = _option(
        LossConfig.temperature, "Sampling temperature; the loss uses it too."
    )
    top_p: float = _option(1.0, "Nucleus sampling; 1.0 switches it off.")
    top_k: int = _option(0, "Sample among the k likeliest tokens; 0 switches it off.")
    min_p: float | None = _option(None, "Smallest share of the top token's probability.")
    repetition_penalty: float = _option(1.0, "Penalty of repeated tokens; 1.0 switches it off.")
    generation_kwargs: dict | str | None = _option(
        None, "Further fields of GenerationConfig (dict or JSON)."
    )

    # loss
    loss_type: str = _option(LossConfig.loss_type, f"One of {_listed(PRESETS)}.")
    importance_sampling_level: str | None = _option(
        LossConfig.importance_sampling_level,
        f"Level of the ratio: {_listed(LEVELS)}; default: the loss type's own.",
    )
    aggregation: str | None = _option(
        LossConfig.aggregation,
        f"Mean of the token losses: {_listed(AGGREGATIONS)}; default: the loss type's own.",
    )
    epsilon: float = _option(LossConfig.epsilon, "Lower clip.")
    epsilon_high: float | None = _option(LossConfig.epsilon_high, "Upper clip; default: epsilon.")
    delta: float | None = _option(LossConfig.delta, "Cap of the ratio (two-sided clipping).")
    beta: float = _option(LossConfig.beta, "KL coefficient; 0 loads no reference policy.")
    kl_estimator: str = _option(LossConfig.kl_estimator, f"One of {_listed(KL_ESTIMATORS)}.")
    kl_gradient: str | None = _option(
        LossConfig.kl_gradient, "KL estimator that lends its gradient; default: kl_estimator."
    )
    use_bias_correction_kl: bool = _option(
        LossConfig.use_bias_correction_kl, "Multiply the KL by the importance ratio."
    )
    entropy_coef: float = _option(LossConfig.entropy_coef, "Coefficient of the entropy bonus.")
    top_entropy_quantile: float = _option(
        LossConfig.top_entropy_quantile,
        "Share of the tokens, those of highest entropy, that keep their objective.",
    )
    off_policy_mask_threshold: float | None = _option(
        LossConfig.off_policy_mask_threshold,
        "Nats from the old policy beyond which a completion of negative advantage is left out.",
    )
    rollout_correction: str = _option(
        LossConfig.rollout_correction,
        "What is done with p(policy) / p(sampler) where a sampler gives its log-probs.",
    )
    rollout_ratio_min: float | None = _option(
        LossConfig.rollout_ratio_min, "Lower bound of that ratio; default: none."
    )
    rollout_ratio_max: float | None = _option(
        LossConfig.rollout_ratio_max, "Upper bound of that ratio."
    )
    cispo_ratio_min: float = _option(LossConfig.cispo_ratio_min, "cispo: lower bound of the ratio.")
    sapo_temperature_pos: float = _option(
        LossConfig.sapo_temperature_pos, "sapo: temperature of the gate, advantage > 0."
    )
    sapo_temperature_neg: float = _option(
        LossConfig.sapo_temperature_neg, "sapo: temperature of the gate, advantage <= 0."
    )
    vespo_k_pos: float = _option(LossConfig.vespo_k_pos, "vespo: exponent, advantage >= 0.")
    vespo_lambda_pos: float = _option(LossConfig.vespo_lambda_pos, "vespo: decay, advantage >= 0.")
    vespo_k_neg: float = _option(LossConfig.vespo_k_neg, "vespo: exponent, advantage < 0.")
    vespo_lambda_neg: float = _option(LossConfig.vespo_lambda_neg, "vespo: decay, advantage < 0.")
    num_iterations: int = _option(1, "How often each window of completions is used.")
    mask_truncated_completions: bool = _option(
        False, "Leave completions that hit max_completion_length out of the loss."
    )
    workspace_bytes: int | None = _option(
        None, "Budget of the logit chunks in bytes; default: the loss's own."
    )

    # rewards
    reward_weights: list[float] | None = _option(None, "One weight per reward; default: 1.0 each.")
    reward_timeout: float | None = _option(
        1800.0, "Seconds after which a reward function that has not returned is stopped."
    )
    multi_objective_aggregation: str = _option(
        "sum_then_normalize",
        "Sum the rewards and take the group's advantages, or 'normalize_then_sum': each reward "
        "within its group first (GDPO).",
    )
    scale_rewards: str | None = _option(
        None,
        "Divide the group's advantages by the std of the 'group' (True), of the 'batch', or 'none' "
        "(False); default: 'group', for gpg 'none'.",
    )
    advantage_estimator: str | None = _option(
        None, f"Advantages: {_listed(ADVANTAGES)}; default: the loss type's own."
    )
    reward_weight_scheme: str = _option(
        "softmax", f"Weights of the completions for reward_weighted: {_listed(SCHEMES)}."
    )
    reward_weight_temperature: float = _option(
        1.0, "Temperature of the scheme softmax, in units of the reward."
    )
    reward_weight_keep: int = _option(
        1, "Completions of each group that the scheme rejection keeps."
    )

    # reference policy
    sync_ref_model: bool = _option(False, "Move the reference towards the policy (TR-DPO).")
    ref_model_mixup_alpha: float = _option(0.6, "Share of the policy in that move.")
    ref_model_sync_steps: int = _option(512, "Optimizer steps between two moves.")

    # reports
    log_completions: bool = _option(
        False, "Print a table of the training completions and write them as parquet."
    )
    num_completions_to_print: int | None = _option(
        None, "Rows of that table; default: all. The parquet files hold all."
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        judged = self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau"
        if judged and self.metric_for_best_model is None:
            # a policy loss says nothing about the policy: it is 0 at every on-policy step
            self.metric_for_best_model = "reward"
        super().__post_init__()
        for name in ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                fail(name, "a dict or a JSON object", repr(value))
        self.loss_config()
        self._check_integers()
        self.num_generations_eval = self.num_generations_eval or self.num_generations
        self._check_sampling()
        self._check_rewards()
        self._check_advantages()
        self._check_batches()
        self.check_kl()
        check_inherited(self)

    def loss_config(self) -> LossConfig:
        """The loss these arguments describe; `LossConfig` owns its defaults and its checks."""
        shared = [f.name for f in fields(LossConfig) if f.name in type(self).__dataclass_fields__]
        return LossConfig(**{name: getattr(self, name) for name in shared})

    @property
    def estimator(self) -> tuple[str, dict[str, Any]]:
        """Key of `ADVANTAGES` and its keywords: what the trainer makes of the rewards."""
        name, scale = self.advantage_estimator, self.scale_rewards
        if name is None:
            name = PRESETS[self.loss_type].advantage
            # no paper of TRL's loss types changes TRL's default, and "given" names no estimator
            if name == "given" or self.loss_type == "dr_grpo":
                name = "group"
            if name in ("group", "centered") and scale is not None:
                name = "centered" if scale == "none" else "group"
        if name == "group":
            return name, {"scale": scale or "group"}
        if name == "reward_weights":
            return name, {keyword: getattr(self, option) for option, keyword in _WEIGHTING}
        return name, {}

    @property
    def window_uses(self) -> int:
        """Micro-steps that one generation serves."""
        return self.steps_per_generation * self.num_iterations

    @property
    def on_policy(self) -> bool:
        """True when every use of a window falls in the optimizer step that sampled it."""
        return self.gradient_accumulation_steps % self.window_uses == 0

    def _check_integers(self) -> None:
        lowest = {
            "num_generations": self.fewest_generations,
            "num_generations_eval": 1,
            "num_iterations": 1,
            "generation_batch_size": 1,
            "steps_per_generation": 1,
            "ref_model_sync_steps": 1,
            "num_completions_to_print": 1,
            "workspace_bytes": 1,
            "top_k": 0,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                hint = "a group needs a baseline." if name == "num_generations" and low > 1 else ""
                fail(name, f"an integer >= {low}", repr(value), hint)

    def _check_sampling(self) -> None:
        # (name, largest value, whether 0 is allowed)
        for name, high, zero in (
            ("top_p", 1.0, False),
            ("min_p", 1.0, True),
            ("repetition_penalty", math.inf, False),
            ("ref_model_mixup_alpha", 1.0, False),
        ):
            value = getattr(self, name)
            if name == "min_p" and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (
                not number
                or not 0 <= value <= high
                or value == math.inf
                or (value == 0 and not zero)
            ):
                bounds = f"{'[' if zero else '('}0, {high:g}{']' if high < math.inf else ')'}"
                fail(name, f"a number in {bounds}", repr(value))
        owned = {"max_new_tokens", "do_sample", "num_return_sequences", "temperature"}
        clash = sorted(owned & set(self.generation_kwargs or {}))
        if clash:
            hint = (
                "set max_completion_length, num_generations and temperature of GRPOConfig, which "
                "the loss uses too."
            )
            fail("generation_kwargs", f"none of {', '.join(sorted(owned))}", clash, hint)

    def _check_rewards(self) -> None:
        check_limit("reward_timeout", self.reward_timeout)
        check_aggregation(self.multi_objective_aggregation)
        self.scale_rewards = _SCALES.get(self.scale_rewards, self.scale_rewards)
        if self.scale_rewards not in ("group", "batch", "none", None):
            fail("scale_rewards", "'group', 'batch' or 'none'", repr(self.scale_rewards))
        if self.sync_ref_model and not self.needs_reference:
            expected = "False with beta = 0, which has no reference"
            fail("sync_ref_model", expected, True, "set beta above 0.")

    def _check_advantages(self) -> None:
        if self.advantage_estimator is not None:
            check_estimator(self.advantage_estimator, "advantage_estimator")
        name, _ = self.estimator
        source = "loss_type" if self.advantage_estimator is None else "advantage_estimator"
        chosen = f"{source} = {getattr(self, source)!r}"
        scales = ("group", "batch") if name == "group" else ("none",)
        if self.scale_rewards is not None and self.scale_rewards not in scales:
            expected = " or ".join(map(repr, (None, *scales)))
            expected = f"{expected} with the {name} advantages of {chosen}"
            fail("scale_rewards", expected, repr(self.scale_rewards))
        decoupled = self.multi_objective_aggregation == "normalize_then_sum"
        if decoupled and self.estimator != ("group", {"scale": "group"}):
            expected = "'sum_then_normalize' but for advantages of the group divided by its std"
            fail("multi_objective_aggregation", expected, f"'normalize_then_sum' with {name}")
        if name == "reward_weights":
            check_weighting(
                **{keyword: getattr(self, option) for option, keyword in _WEIGHTING},
                prefix="reward_weight_",
            )
            if self.reward_weight_keep > self.num_generations:
                expected = f"at most num_generations = {self.num_generations}"
                fail("reward_weight_keep", expected, self.reward_weight_keep)
            return
        for option, _ in _WEIGHTING:
            value, default = getattr(self, option), type(self).__dataclass_fields__[option].default
            if value != default:
                expected = f"{default!r} with the {name} advantages of {chosen}, without weights"
                hint = "set advantage_estimator='reward_weights' or leave it out."
                fail(option, expected, repr(value), hint)

    def _check_batches(self) -> None:
        step = self.per_device_train_batch_size * self.world_size
        batch, steps = self.generation_batch_size, self.steps_per_generation
        if batch is not None and batch % step:
            expected = f"a multiple of per_device_train_batch_size x ranks = {step}"
            fail("generation_batch_size", expected, batch)
        # an agreeing pair is a copy of finished arguments (dataclasses.replace)
        if batch is not None and steps is not None and batch != step * steps:
            expected = f"{step * steps} with steps_per_generation = {steps}"
            fail("generation_batch_size", expected, batch, "set one of the two.")
        if steps is None:
            steps = self.gradient_accumulation_steps if batch is None else batch // step
        self.steps_per_generation, self.generation_batch_size = steps, step * steps
        if self.generation_batch_size % self.num_generations:
            expected = (
                f"a divisor of the generation batch of {self.generation_batch_size} completions "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} x ranks "
                f"{self.world_size} x steps_per_generation {self.steps_per_generation})"
            )
            fail("num_generations", expected, self.num_generations)
