"""RULES: the verifiable rewards by name; a row says what it computes and builds it from options."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .checks import nearest


@dataclass(frozen=True)
class Rule:
    """One row: where its factory is, and what a reader wants to know of it."""

    factory: str
    """`module:function` below `grpo_fast.rewards`; imported when the rule is built."""
    equation: str
    range: str
    needs: str
    """Dataset columns that it reads by default."""
    source: str
    """The paper (title, year) or the convention that it comes from."""


_R1 = "DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning (2025)"
_COSINE = "Demystifying Long Chain-of-Thought Reasoning in LLMs (2025)"
_DAPO = "DAPO: An Open-Source LLM Reinforcement Learning System at Scale (2025)"
_L1 = "L1: Controlling How Long A Reasoning Model Thinks With Reinforcement Learning (2025)"
_GSM8K = "Training Verifiers to Solve Math Word Problems (2021)"
_MATH = "Measuring Mathematical Problem Solving With the MATH Dataset (2021); math-verify"
_GYM = "Reasoning Gym: Reasoning Environments for RL with Verifiable Rewards (2025)"
_CODE = "Evaluating Large Language Models Trained on Code (2021)"
_JUDGE = "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena (2023)"

RULES: dict[str, Rule] = {
    "format": Rule(
        "matching:format_reward",
        "1 if each tag stands exactly once, in order, nothing outside, the answer not empty",
        "0, 1",
        "-",
        _R1,
    ),
    "exact": Rule(
        "matching:exact_reward", "1 if final answer = gold answer, as text", "0, 1", "answer", _R1
    ),
    "number": Rule(
        "matching:number_reward",
        "1 if the final number = the gold one; `partial` if the gold one is a step's result",
        "0, partial, 1",
        "answer",
        _GSM8K,
    ),
    "math": Rule(
        "mathematics:math_reward",
        "1 if final answer = gold answer, as mathematics; `partial` as for number",
        "0, partial, 1",
        "answer",
        _MATH,
    ),
    "length": Rule(
        "shaping:length_reward", "-min(1, max(0, n - target) / target)", "[-1, 0]", "-", _L1
    ),
    "cosine": Rule(
        "shaping:cosine_reward",
        "end + (start - end) (1 + cos(pi min(n, L) / L)) / 2, start and end by right or wrong",
        "[-1, 1]",
        "answer",
        _COSINE,
    ),
    "repetition": Rule(
        "shaping:repetition_reward",
        "-penalty (1 - distinct n-grams / n-grams)",
        "[-penalty, 0]",
        "-",
        _COSINE,
    ),
    "overlong": Rule(
        "shaping:overlong_reward",
        "-min(1, max(0, n - (L - cache)) / cache)",
        "[-1, 0]",
        "-",
        _DAPO,
    ),
    "language": Rule(
        "shaping:language_reward", "letters of the language's scripts / letters", "[0, 1]", "-", _R1
    ),
    "self_correction": Rule(
        "shaping:self_correction_reward",
        "a measure: share of completions that correct themselves; 1 or 0 with reward=true",
        "None, or 0, 1",
        "-",
        _R1,
    ),
    "reasoning_gym": Rule(
        "reasoning:reasoning_gym_reward", "the task's own score_answer", "[0, 1]", "entry", _GYM
    ),
    "code": Rule(
        "code:code_reward", "passed cases / cases, in a sandbox", "[0, 1]", "see docs", _CODE
    ),
    "judge": Rule(
        "judge:judge_reward",
        "(score - low) / (high - low), or the share of won comparisons",
        "[0, 1]",
        "-",
        _JUDGE,
    ),
}


def build(name: str, texts: Mapping[str, str], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The reward function of a rule.

    Args:
        name: key of `RULES`.
        texts: options as texts, converted by the annotations of the factory.
        options: options as values; they win.

    Raises:
        ValueError: for an unknown rule or option (the nearest is suggested), or a wrong value.
    """
    if name not in RULES:
        raise ValueError(f"reward 'rule:{name}': no such rule; {nearest(name, list(RULES))}")
    factory = factory_of(name)
    spec = f"rule:{name}"
    known = _options(factory)
    unknown = [key for key in options if key not in known and not _variadic(factory)]
    if unknown:
        raise ValueError(_unknown(spec, unknown[0], known))
    values = {**converted(spec, factory, texts), **options}
    missing = [
        key for key, parameter in known.items() if _is_required(parameter) and key not in values
    ]
    if missing:
        raise ValueError(
            f"reward {spec!r}: expected option {missing[0]}, as in {spec}?{missing[0]}=..."
        )
    try:
        function = factory(**values)
    except ValueError as error:
        raise ValueError(f"reward {spec!r}: {error}") from error
    function.__name__ = getattr(function, "__name__", name) if name == "reasoning_gym" else name
    return function


def factory_of(name: str) -> Callable[..., Any]:
    """The factory of a row of `RULES`, imported."""
    module, _, attribute = RULES[name].factory.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)


def converted(
    spec: str, factory: Callable[..., Any], texts: Mapping[str, str], skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Options given as texts, as the annotations of the factory's parameters want them.

    Raises:
        ValueError: for an unknown option (the nearest is suggested) or a text of another kind.
    """
    known = {key: p for key, p in _options(factory).items() if key not in skip}
    hints = typing.get_type_hints(factory)
    values: dict[str, Any] = {}
    for key, text in texts.items():
        if key in known:
            values[key] = _convert(spec, key, text, hints.get(key, str))
        elif _variadic(factory):
            values[key] = _literal(text)
        else:
            raise ValueError(_unknown(spec, key, known))
    return values


def _options(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(factory).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: p for key, p in parameters.items() if p.kind in by_name}


def _variadic(factory: Callable[..., Any]) -> bool:
    parameters = inspect.signature(factory).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def _unknown(spec: str, key: str, known: Mapping[str, Any]) -> str:
    hint = nearest(key, list(known)) if known else "it has none."
    return f"reward {spec!r}: no option {key!r}; {hint}"


def _convert(spec: str, key: str, text: str, hint: Any) -> Any:
    kinds = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = list(typing.get_args(hint))
        if type(None) in kinds and text.lower() in ("none", "null"):
            return None
    for kind in (kind for kind in kinds if kind is not type(None)):
        try:
            return _one(text, kind)
        except ValueError:
            continue
    names = " or ".join(_kind_name(kind) for kind in kinds if kind is not type(None))
    raise ValueError(f"reward {spec!r}: {key}: expected {names}, got {text!r}.")


def _one(text: str, kind: Any) -> Any:
    if kind is bool:
        values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in values:
            raise ValueError(text)
        return values[text.lower()]
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(_one(part.strip(), inner) for part in text.split(",") if part.strip())
    return kind(text)


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"{_kind_name(typing.get_args(kind)[0])} values with commas"
    return {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "a text")


def _literal(text: str) -> Any:
    for kind in (int, float, bool):
        try:
            return _one(text, kind)
        except ValueError:
            continue
    return None if text.lower() in ("none", "null") else text


def table() -> str:
    """RULES as a Markdown table, for docs/rewards.md."""
    lines = ["| rule | reward | values | columns | source |", "|---|---|---|---|---|"]
    lines += [
        f"| `{name}` | {r.equation} | {r.range} | {r.needs} | {r.source} |"
        for name, r in RULES.items()
    ]
    return "\n".join(lines) + "\n"


def option_table(name: str) -> str:
    """The options of a rule with their defaults, one line of Markdown, for docs/rewards.md."""
    shown = [
        key if _is_required(parameter) else f"{key}={_shown(parameter.default)}"
        for key, parameter in _options(factory_of(name)).items()
    ]
    return ", ".join(f"`{text}`" for text in shown) or "none"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
