"""A reward by its name: a rule, a function of the user's, a reasoning-gym task, a worker."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from .checks import nearest

RULE, REASONING_GYM, WORKER = "rule:", "reasoning_gym:", "worker:"
PREFIXES = (RULE, REASONING_GYM, WORKER)


def load_reward(spec: str, **options: Any) -> Callable[..., Any]:
    """The reward function that a text names, the same in Python, YAML and the shell.

        rule:math                          a row of `RULES`
        rule:format?tags=think,answer      with options, as in a URL; %26 is an ampersand
        module:function                    a function that can be imported
        worker:module:function?workers=4   the same in processes that can be stopped
        reasoning_gym:chain_sum            the scorer of a reasoning-gym task

    Args:
        spec: the name.
        options: further options of a rule or a worker; they win over those in the text.

    Returns:
        A function of TRL's convention: keywords in, one number or None for each completion out.

    Raises:
        ValueError: for a malformed name, an unknown rule or option (the nearest is suggested), a
            value of the wrong kind, or a package that is not installed.
    """
    if not isinstance(spec, str):
        raise ValueError(f"reward: expected a name such as 'rule:math', got {spec!r}.")
    if spec.startswith(RULE):
        from .rules import build

        name, texts = split_options(spec, spec.removeprefix(RULE))
        function = build(name, texts, options)
    elif spec.startswith(WORKER):
        from .rules import converted
        from .workers import in_worker

        name, texts = split_options(spec, spec.removeprefix(WORKER))
        values = {**converted(spec, in_worker, texts, skip=("function",)), **options}
        function = in_worker(load_function(name), **values)
    elif options:
        raise ValueError(f"reward {spec!r}: only rules and workers have options, got {options}.")
    elif spec.startswith(REASONING_GYM):
        from .reasoning import reasoning_gym_reward

        function = reasoning_gym_reward(spec.removeprefix(REASONING_GYM))
    else:
        return load_function(spec)
    function.spec = spec
    return function


def split_options(spec: str, rest: str) -> tuple[str, dict[str, str]]:
    """`name?a=1&b=2` -> the name and the options as texts; a plus sign stays one.

    Raises:
        ValueError: for an option without a value, or given twice.
    """
    name, separator, query = rest.partition("?")
    options: dict[str, str] = {}
    for part in query.split("&") if separator else []:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ValueError(f"reward {spec!r}: expected option=value after '?', got {part!r}.")
        if key in options:
            raise ValueError(f"reward {spec!r}: expected {key} once, got it twice.")
        options[key] = unquote(value)
    return name, options


def load_function(spec: str) -> Callable[..., Any]:
    """The callable that `module:function` names; `module:Class.method` works too.

    Raises:
        ValueError: for a malformed name, a module that cannot be imported, or an attribute that is
            missing or no callable.
    """
    module_name, separator, attribute = spec.partition(":")
    if not separator or not module_name or not attribute:
        raise ValueError(
            f"reward {spec!r}: expected 'module:function', for example 'rewards:length'."
        )
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise ValueError(
            f"reward {spec!r}: expected a module name, not a path; write '{dotted}:{attribute}'."
        )
    try:
        module = importlib.import_module(module_name)
    # any error of the user's own module is reported under the name that asked for it
    except Exception as error:
        raise ValueError(
            f"reward {spec!r}: importing {module_name!r} raised {type(error).__name__}: {error}"
        ) from error
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        names = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        raise ValueError(
            f"reward {spec!r}: {module_name!r} has no {attribute!r}; {nearest(attribute, names)}"
        ) from error
    if not callable(function):
        raise ValueError(
            f"reward {spec!r}: expected a callable, got {type(function).__name__} {function!r}."
        )
    return function
