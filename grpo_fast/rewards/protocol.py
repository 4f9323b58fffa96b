"""RewardSet: calls every reward of a run under one convention and checks what comes back."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_fast.checks import nearest

from .checks import check_kinds, check_values, check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    RewardFunc = str | PreTrainedModel | Callable[..., Any]

logger = logging.getLogger(__name__)

# keywords that every function may take beside the dataset's columns
RESERVED = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)


def weighted(rewards: Tensor, weights: Tensor) -> Tensor:
    """r_i = sum over k of weights_k * rewards_ik without the NaNs; NaN where all K are NaN.

    Args:
        rewards: (B, K) floating, NaN = unscorable.
        weights: (K,) floating.

    Returns:
        (B,), dtype of `rewards`.

    Raises:
        ValueError: when the shapes do not fit.
    """
    if rewards.dim() != 2 or weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"weights: expected shape (K,) for rewards (B, K), got {tuple(weights.shape)} for "
            f"{tuple(rewards.shape)}."
        )
    missing = rewards.isnan()
    total = torch.where(missing, 0.0, rewards) @ weights.to(rewards)
    return torch.where(missing.all(1), torch.nan, total)


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


class RewardSet:
    """The rewards of a run: scores completions with every one of them.

    A function is called with the keywords `prompts, completions, completion_ids`, every dataset
    column, `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`, or those of
    them that its signature takes, and returns one finite number or None (unscorable) for each
    completion. `async def` functions run together on one event loop beside the synchronous ones.

    Args:
        reward_funcs: one or a list of: a callable; a checkpoint string or a `PreTrainedModel` with
            one label, read by `RewardModel`.
        reward_processing_classes: tokenizer of each reward model (None: loaded from its
            checkpoint), one or a list as long as `reward_funcs`; ignored for callables.
        weights: one finite number per reward; None means 1.0 each.
        device: where reward models are moved; None leaves them where they are.
        init_kwargs: keyword arguments of `from_pretrained` for checkpoint strings.

    Raises:
        ValueError: for no reward, a reward of an unknown kind, or lists of another length.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        reward_processing_classes: PreTrainedTokenizerBase | Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        rewards = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not rewards or rewards == [None]:
            raise ValueError("reward_funcs: expected at least one reward, got none.")
        if not isinstance(reward_processing_classes, (list, tuple)):
            reward_processing_classes = [reward_processing_classes] * len(rewards)
        if len(reward_processing_classes) != len(rewards):
            raise ValueError(
                f"reward_processing_classes: expected {len(rewards)}, one per reward, got "
                f"{len(reward_processing_classes)}."
            )
        self.weights = check_weights(weights, len(rewards))
        check_kinds(rewards)
        self._functions = [
            _as_function(reward, tokenizer, device, init_kwargs)
            for reward, tokenizer in zip(rewards, reward_processing_classes, strict=True)
        ]
        self.names = _unique([_name(function) for function in self._functions])
        self._signatures = [_Signature(function) for function in self._functions]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._warned = False

    def check_columns(self, columns: Iterable[str]) -> None:
        """Refuse, before any work, a dataset whose columns do not fit the reward functions.

        Raises:
            ValueError: for a column with a reserved name, or a parameter that no column offers.
        """
        columns = [column for column in columns if column != "prompt"]
        for column in columns:
            if column in RESERVED:
                raise ValueError(
                    f"dataset column {column!r}: this name is reserved for reward functions."
                )
        for name, signature in zip(self.names, self._signatures, strict=True):
            missing = [key for key in signature.required if key not in (*RESERVED, *columns)]
            if missing:
                raise ValueError(
                    f"reward function {name!r} needs {missing[0]!r}, which is no dataset column; "
                    f"{nearest(missing[0], columns) if columns else 'it has only prompts.'}"
                )

    def score(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> Tensor:
        """Score B completions with the K rewards.

        Args:
            prompts: B strings, or B lists of messages.
            completions: B strings, or B lists of one assistant message.
            completion_ids: B lists of token ids.
            columns: the other dataset columns, each a list of B values.
            trainer_state: passed on to the functions, as are `log_extra` and `log_metric`.

        Returns:
            (B, K) float32 on the CPU; NaN where a function returned None.

        Raises:
            ValueError: for lists of unequal lengths; naming the function, for one that raised (the
                cause is chained), or returned a wrong length, NaN, inf or something that is no
                number.
        """
        size = len(prompts)
        if "prompt" in columns:
            raise ValueError("columns: expected those beside the prompts, got 'prompt' among them.")
        given = {"completions": completions, "completion_ids": completion_ids, **columns}
        for key, values in given.items():
            if len(values) != size:
                raise ValueError(
                    f"{key}: expected {size} values, one per prompt, got {len(values)}."
                )
        self.check_columns(columns)
        keywords = {
            **given,
            "prompts": prompts,
            "trainer_state": trainer_state,
            "log_extra": log_extra or _ignore,
            "log_metric": log_metric or _ignore,
        }
        returned = self._call_all(keywords)
        scored = [check_values(*pair, size) for pair in zip(self.names, returned, strict=True)]
        rewards = torch.tensor(scored, dtype=torch.float32).reshape(len(scored), size).T
        rewards = rewards.contiguous()
        self._warn_unscorable(rewards)
        return rewards

    def _call_all(self, keywords: dict[str, Any]) -> list[Any]:
        calls = [
            functools.partial(function, **signature.select(keywords))
            for function, signature in zip(self._functions, self._signatures, strict=True)
        ]
        results: list[Any] = [None] * len(calls)
        # the asynchronous ones start first, so that they wait while the others compute
        waiting = {
            index: asyncio.run_coroutine_threadsafe(_awaited(calls[index]), self._event_loop())
            for index, signature in enumerate(self._signatures)
            if signature.asynchronous
        }
        try:
            for index, call in enumerate(calls):
                if index not in waiting:
                    results[index] = self._named(index, call)
            for index, future in waiting.items():
                results[index] = self._named(index, future.result)
        finally:
            _cancel(waiting.values())
        return results

    def _named(self, index: int, call: Callable[[], Any]) -> Any:
        try:
            return call()
        # the boundary to user code: whatever it raises is reported under the function's name
        except Exception as error:
            raise ValueError(
                f"reward function {self.names[index]!r} raised {type(error).__name__}: {error}"
            ) from error

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        """One daemon loop for the life of the set, so that a client session stays valid."""
        if self._loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(loop,), name="rewards", daemon=True).start()
            weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)
            self._loop = loop
        return self._loop

    def _warn_unscorable(self, rewards: Tensor) -> None:
        rows = rewards.isnan().all(1).nonzero()[:, 0].tolist()
        if rows and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d completions (first: %d) were scored by no reward function; they get "
                "advantage 0 and stay out of their group's baseline. This is said once.",
                len(rows),
                len(rewards),
                rows[0],
            )


class _Signature:
    """Which keywords a function takes, and whether calling it gives a coroutine."""

    def __init__(self, function: Callable[..., Any]) -> None:
        # an object whose class has `async def __call__` counts too
        entries = (function, type(function).__call__)
        self.asynchronous = any(map(inspect.iscoroutinefunction, entries))
        try:
            parameters = inspect.signature(function).parameters.values()
        # builtins without a signature get every keyword
        except ValueError:
            self.accepted, self.required = None, []
            return
        variadic = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.accepted = None if variadic else {p.name for p in by_name}
        self.required = [p.name for p in by_name if p.default is p.empty]

    def select(self, keywords: dict[str, Any]) -> dict[str, Any]:
        if self.accepted is None:
            return keywords
        return {key: value for key, value in keywords.items() if key in self.accepted}


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


async def _awaited(call: Callable[[], Any]) -> Any:
    return await call()


def _cancel(futures: Iterable[Future[Any]]) -> None:
    for future in futures:
        future.cancel()


def _ignore(name: str, value: Any) -> None:
    """Stands in for a logger that the caller did not give."""


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def _unique(names: list[str]) -> list[str]:
    """Number repeated names, so that no metric overwrites another: f, f_2, f_3."""
    result: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in result:
            number += 1
            candidate = f"{name}_{number}"
        result.append(candidate)
    return result


def _as_function(
    reward: Any,
    tokenizer: Any,
    device: torch.device | str | None,
    init_kwargs: dict[str, Any] | None,
) -> Callable[..., Any]:
    if isinstance(reward, (str, torch.nn.Module)):
        from .model import RewardModel

        return RewardModel(reward, tokenizer, device=device, init_kwargs=init_kwargs)
    return reward
