"""TRL's attributes on a trainer, and methods of TRL's trainer that a subclass may replace there."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from grpo_fast.checks import ArgumentError, fail

# method of TRL's trainer -> what a subclass replaces here
HOOKS = {
    "_compute_loss": "loss or policy_loss",
    "_calculate_rewards": "score",
    "_generate": "generate",
    "_generate_single_turn": "generate",
    "_generate_and_score_completions": "rollout",
    "_get_per_token_logps_and_entropies": "measure for old log-probs, policy_loss for the loss",
    "_tokenize_prompts": "encode",
    "_tool_call_loop": "generate, or pass a rollout_func",
    "_get_tool_suffix_ids": "generate, or pass a rollout_func",
    "_log_completion_extra": "log, or call log_extra in a reward",
    "_log_metric": "log, or call log_metric in a reward",
    "get_high_entropy_mask": "policy_loss; top_entropy_quantile is an option",
    "get_off_policy_mask": "policy_loss; off_policy_mask_threshold is an option",
    "get_gamma_weights": "policy_loss; vespo_k_pos and its fellows are options",
}

# options that are read anew at every use, so that a change of them is followed
_LIVE = ("log_completions", "num_completions_to_print")

_SAME = (
    *("num_generations", "num_generations_eval", "num_iterations", "max_completion_length"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "beta", "loss_type"),
    *("multi_objective_aggregation", "importance_sampling_level", "off_policy_mask_threshold"),
    *("mask_truncated_completions", "top_entropy_quantile", "shuffle_dataset"),
    *("pad_to_multiple_of", "use_adaptive_entropy", "log_completions", "log_multimodal"),
    *("log_unique_prompts", "num_completions_to_print", "max_tool_calling_iterations"),
    *("use_vllm", "use_transformers_continuous_batching", "scale_rewards"),
)


class _Attribute:
    """What a trainer is made of under TRL's name: read at any time, set before it is built."""

    def __init__(self, read: Callable[[Any], Any], option: str | None = None) -> None:
        self._read, self._option = read, option

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        return self if trainer is None else self._read(trainer)

    def __set__(self, trainer: Any, value: Any) -> None:
        where = f"the option {self._option} of the arguments" if self._option else "the constructor"
        expected = f"to be set through {where} before the trainer is built"
        fail(self._name, expected, f"{value!r:.60} afterwards")


def _of_args(name: str, option: str | None = None) -> _Attribute:
    option = option or name
    return _Attribute(lambda trainer: getattr(trainer.args, option), option)


def _ref_model(trainer: Any) -> Any:
    # as in TRL, a model with an adapter has no second one
    reference = trainer.reference
    return None if reference is None or reference.peft else reference.model


def _logs(trainer: Any) -> dict[str, Any]:
    rows = trainer.completions.rows
    names = trainer.rewards.names
    return {
        "prompt": [row["prompt"] for row in rows],
        "completion": [row["completion"] for row in rows],
        "rewards": {name: [row.get(name) for row in rows] for name in names},
        "advantages": [row["advantage"] for row in rows],
    }


class TRLNames:
    """Attributes of TRL's trainer, read alone, and a subclass that would replace its methods.

    `_logs` holds what `log_completions` has gathered since the last log.

    Raises:
        ValueError: an attribute is set, an option of the arguments has changed since the trainer
            was built, or a subclass replaces a method that nothing calls here; each names it.
    """

    ref_model = _Attribute(_ref_model)
    reward_funcs = _Attribute(lambda trainer: list(trainer.rewards.functions))
    reward_func_names = _Attribute(lambda trainer: list(trainer.rewards.names))
    reward_weights = _Attribute(lambda trainer: trainer.rewards.weights, "reward_weights")
    eos_token_ids = _Attribute(lambda trainer: sorted(trainer.eos_ids))
    chat_template_kwargs = _Attribute(
        lambda trainer: trainer.args.chat_template_kwargs or {}, "chat_template_kwargs"
    )
    epsilon_low = _of_args("epsilon_low", "epsilon")
    epsilon_high = _Attribute(
        lambda t: t.args.epsilon if t.args.epsilon_high is None else t.args.epsilon_high,
        "epsilon_high",
    )
    entropy_coef = _Attribute(lambda trainer: trainer.entropy.coefficient, "entropy_coef")
    tools = _Attribute(lambda trainer: [])
    environments = _Attribute(lambda trainer: None)
    _logs = _Attribute(_logs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._built_with = copy.deepcopy(_own_options(self.args))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, instead in HOOKS.items():
            if hasattr(cls, name):
                got = "one, which nothing would call"
                raise ArgumentError(
                    name, f"no such method in {cls.__name__}", got, f"replace {instead}."
                )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's.

        Raises:
            ValueError: an option has been changed since the trainer was built from it.
        """
        self.check_unchanged()
        return super().train(*args, **kwargs)

    def check_unchanged(self) -> None:
        """Refuse an option of the arguments that was set after the trainer was built from it."""
        now = _own_options(self.args)
        for name, before in self._built_with.items():
            if now[name] != before:
                expected = f"{before!r:.60}, with which the trainer was built"
                hint = "set it before that; a changed option would be followed in part."
                fail(name, expected, f"{now[name]!r:.60}", hint)


for _name in _SAME:
    _attribute = _of_args(_name)
    _attribute.__set_name__(TRLNames, _name)
    setattr(TRLNames, _name, _attribute)


def _own_options(args: Any) -> dict[str, Any]:
    """The options that are not Trainer's, which reads its own when `train` is called."""
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    names = [f.name for f in dataclasses.fields(args) if f.name not in theirs]
    return {name: getattr(args, name) for name in names if name not in _LIVE}
