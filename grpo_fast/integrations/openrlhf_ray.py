"""`install` of `grpo_fast.integrations.openrlhf` in every Ray worker of an OpenRLHF run.

    ray job submit --runtime-env-json '{"worker_process_setup_hook":
        "grpo_fast.integrations.openrlhf_ray.setup"}' -- python3 -m openrlhf.cli.train_ppo_ray ...
    RAY_RUNTIME_ENV_HOOK=grpo_fast.integrations.openrlhf_ray.runtime_env \
        python3 -m openrlhf.cli.train_ppo_ray ...

GRPO_FAST_OPENRLHF holds the arguments of `install` as a JSON object, `{"loss_type": "dapo"}`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from grpo_fast.checks import fail

__all__ = ["VARIABLE", "runtime_env", "setup"]

VARIABLE = "GRPO_FAST_OPENRLHF"
_HOOK = "worker_process_setup_hook"
_PATCHED = "openrlhf.models"


def setup() -> None:
    """Call `install` in this process once it imports `openrlhf.models`.

    Not before: the workers of vLLM never do, and OpenRLHF keeps DeepSpeed out of them.

    Raises:
        ValueError: `GRPO_FAST_OPENRLHF` is no JSON object.
    """
    options = _options()
    if _PATCHED in sys.modules:
        _install(options)
    else:
        sys.meta_path.insert(0, _Finder(options))


def runtime_env(given: dict[str, Any] | None) -> dict[str, Any]:
    """What `RAY_RUNTIME_ENV_HOOK` names: the driver's runtime environment, with `setup` in it.

    Installs in the driver too, so that an option that cannot be honoured ends the run here.

    Raises:
        ValueError: see `install`; or another setup hook is there already.
    """
    _install(_options())
    env, ours = dict(given or {}), f"{__name__}.{setup.__name__}"
    if env.setdefault(_HOOK, ours) != ours:
        fail(_HOOK, "none: it can hold one hook, which may call setup() itself", env[_HOOK])
    if VARIABLE in os.environ:
        env["env_vars"] = {**env.get("env_vars", {}), VARIABLE: os.environ[VARIABLE]}
    return env


def _options() -> dict[str, Any]:
    text = os.environ.get(VARIABLE) or "{}"
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        fail(VARIABLE, 'a JSON object such as {"loss_type": "dapo"}', repr(text))
    return options


def _install(options: dict[str, Any]) -> None:
    from .openrlhf.actor import install

    install(**options)


class _Finder(MetaPathFinder):
    """Finds one module as Python does, and installs behind its execution."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's own spec, whose loader does one thing more."""
        if name != _PATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _install(self.options)

        spec.loader.exec_module = exec_module
        return spec
