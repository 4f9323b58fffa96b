"""RewardSet: calls every reward of a run under one convention and checks what comes back."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_fast.checks import nearest

from .background import Background, Pending
from .building import as_function, check_one_tokenizer
from .calls import NOTICE, TIMEOUT, Call, contained, located
from .checks import (
    check_kinds,
    check_limit,
    check_token_values,
    check_values,
    check_weights,
)
from .containment import copied, copied_state, cut_output, restored
from .notes import Notes
from .routes import COLUMN, routes

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
# a keyword for functions that name it, in the trainer: the limit of a completion's tokens
LENGTH = "max_completion_length"


class RewardSet:
    """The rewards of a run: scores completions with every one of them.

    A function is called with the keywords `prompts, completions, completion_ids`, every dataset
    column, `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`, or those of
    them that its signature takes, and returns one finite number or None (unscorable) for each
    completion. `async def` functions run together on one event loop beside the synchronous ones.

    Each function gets copies of its own. What it does to random generators, grad mode, default
    dtype, working directory and signal handlers is undone; what it prints is cut; an exit is an
    error that names it; one that does not return is named, and stopped. A dataset column `rewards`
    names the functions that judge a row; the others give None.

    Args:
        reward_funcs: one or a list of: a callable; a name that `load_reward` knows, such as
            "rule:math"; a checkpoint string or a `PreTrainedModel` with one label, read by
            `RewardModel`.
        reward_processing_classes: tokenizer of each reward model (None: loaded from its
            checkpoint), one or a list as long as `reward_funcs`; ignored for callables.
        weights: one finite number per reward; None means 1.0 each.
        device: where reward models are moved; None leaves them where they are.
        init_kwargs: keyword arguments of `from_pretrained` for checkpoint strings.
        timeout: seconds after which a function is stopped; None: never.
        notice: seconds after which a notice says that a function has not returned; repeated after
            twice as long each time.
        max_completion_length: tokens; given to functions that have a parameter of this name.
        chat_template_kwargs: further arguments of the reward models' chat templates.

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
        timeout: float | None = TIMEOUT,
        notice: float = NOTICE,
        max_completion_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        rewards = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not rewards or rewards == [None]:
            raise ValueError("reward_funcs: expected at least one reward, got none.")
        if not isinstance(reward_processing_classes, (list, tuple)):
            reward_processing_classes = [reward_processing_classes] * len(rewards)
            check_one_tokenizer(reward_processing_classes[0], rewards)
        if len(reward_processing_classes) != len(rewards):
            raise ValueError(
                f"reward_processing_classes: expected {len(rewards)}, one per reward, got "
                f"{len(reward_processing_classes)}."
            )
        self.weights = check_weights(weights, len(rewards))
        check_kinds(rewards)
        check_limit("reward_timeout", timeout)
        self._functions = [
            as_function(reward, tokenizer, device, init_kwargs, chat_template_kwargs)
            for reward, tokenizer in zip(rewards, reward_processing_classes, strict=True)
        ]
        self.names = _unique([_name(function) for function in self._functions])
        self._specs = [getattr(function, "spec", "") for function in self._functions]
        self._signatures = [_Signature(function) for function in self._functions]
        self._timeout, self._notice = timeout, notice
        self._offered = {} if max_completion_length is None else {LENGTH: max_completion_length}
        self._background: Background | None = None
        self._warned = False
        self._said: set[str] = set()

    @property
    def functions(self) -> list[Any]:
        """What scores: functions, and reward models as functions."""
        return list(self._functions)

    def check_columns(self, columns: Iterable[str], complete: bool = True) -> None:
        """Refuse, before any work, a dataset whose columns do not fit the reward functions.

        complete: False where rollouts bring further columns, so that none can be missed yet.

        Raises:
            ValueError: for a column with a reserved name, or a parameter that no column offers.
        """
        columns = [column for column in columns if column != "prompt"]
        for column in columns:
            if column in RESERVED:
                raise ValueError(
                    f"dataset column {column!r}: this name is reserved for reward functions."
                )
        known = (*RESERVED, *columns, *self._offered)
        for name, signature in zip(self.names, self._signatures, strict=True):
            missing = [key for key in signature.required if key not in known]
            if missing and complete:
                raise ValueError(
                    f"reward function {name!r} needs {missing[0]!r}, which is no dataset column; "
                    f"{nearest(missing[0], columns) if columns else 'it has only prompts.'}"
                )

    def check_routes(self, cells: Iterable[Any]) -> None:
        """Refuse, before any work, a column `rewards` that names a function there is not.

        Raises:
            ValueError: naming the row.
        """
        routes(cells, self.names, self._specs)

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
            trainer_state: functions get a copy of it.
            log_extra, log_metric: get what the functions log, when all have returned.

        Returns:
            (B, K) float32 on the CPU; NaN where a function returned None.

        Raises:
            ValueError: for lists of unequal lengths; naming the function and the user's line, for
                one that raised (the cause is chained), exited, did not return in time, or returned
                a wrong length, NaN, inf or something that is no number.
        """
        batch = self._batch(prompts, completions, completion_ids, columns, trainer_state)
        rewards = torch.full((batch.size, len(self.names)), torch.nan)
        for k, (call, values) in enumerate(self._call_all(batch, log_extra, log_metric)):
            checked = check_values(located(call), values, call.size) if call.size else []
            rewards[batch.rows[k], k] = torch.tensor(checked, dtype=torch.float32)
        self._warn_unscorable(rewards)
        return rewards

    def score_tokens(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, list[Tensor]]:
        """`score` for trainers that take rewards per token: a function may return lists.

            shaped_it = sum over k of weights_k r_kit        a number counts for the last token

        Args:
            arguments, keywords: as for `score`.

        Returns:
            rewards: (B, K) float32, the sum over the tokens of a completion, NaN = None.
            shaped: B tensors (T_i,) float32, T_i the tokens of completion i.

        Raises:
            ValueError: as for `score`, and for a list that is not as long as its completion.
        """
        bound = inspect.signature(self.score).bind(*arguments, **keywords)
        given = dict(bound.arguments)
        loggers = given.pop("log_extra", None), given.pop("log_metric", None)
        batch = self._batch(trainer_state=given.pop("trainer_state", None), **given)
        rewards = torch.full((batch.size, len(self.names)), torch.nan)
        lengths = [len(ids) for ids in given["completion_ids"]]
        shaped = [torch.zeros(length) for length in lengths]
        for k, (call, values) in enumerate(self._call_all(batch, *loggers)):
            chosen = [lengths[row] for row in batch.rows[k]]
            lists = check_token_values(located(call), values, chosen) if call.size else []
            for row, numbers in zip(batch.rows[k], lists, strict=True):
                tokens = torch.tensor(numbers, dtype=torch.float32)
                rewards[row, k] = tokens.sum() if len(tokens) else torch.nan
                shaped[row] += self.weights[k] * tokens.nan_to_num(0.0)
        self._warn_unscorable(rewards)
        return rewards, shaped

    def _batch(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any = None,
    ) -> _Batch:
        size = len(prompts)
        if "prompt" in columns:
            raise ValueError("columns: expected those beside the prompts, got 'prompt' among them.")
        lists = {"completions": completions, "completion_ids": completion_ids, **columns}
        for key, values in lists.items():
            if len(values) != size:
                raise ValueError(
                    f"{key}: expected {size} values, one per prompt, got {len(values)}."
                )
        self.check_columns(columns)
        if COLUMN in columns:
            rows = routes(columns[COLUMN], self.names, self._specs)
        else:
            rows = [list(range(size))] * len(self.names)
        return _Batch(size, {"prompts": prompts, **lists}, rows, trainer_state)

    def _call_all(
        self, batch: _Batch, log_extra: Callable | None, log_metric: Callable | None
    ) -> list[tuple[Call, Any]]:
        notes = Notes(batch.size, self._said, self.names)
        calls: list[tuple[Call, Callable[[], Any]]] = []
        for k, function in enumerate(self._functions):
            size = len(batch.rows[k])
            call = Call(self.names[k], function, size, self._timeout, self._notice)
            keywords = self._signatures[k].select(batch, k, self._offered)
            given = None if size == batch.size else batch.rows[k]
            loggers = {
                "log_extra": notes.extra(call.name, given),
                "log_metric": notes.metric(call.name),
            }
            keywords.update({n: f for n, f in loggers.items() if self._signatures[k].takes(n)})
            calls.append((call, functools.partial(function, **keywords)))
        results: list[Any] = [None] * len(calls)
        with restored(), cut_output():
            # the asynchronous ones start first, so that they wait while the others compute
            waiting = {
                k: self._start(call, function)
                for k, (call, function) in enumerate(calls)
                if self._signatures[k].asynchronous and call.size
            }
            try:
                for k, (call, function) in enumerate(calls):
                    if k not in waiting and call.size:
                        # a list that the function keeps could still change
                        results[k] = _kept(contained(call, function))
                for k, pending in waiting.items():
                    results[k] = pending.result()
            finally:
                for pending in waiting.values():
                    pending.future.cancel()
        notes.flush(log_extra, log_metric)
        return [(call, result) for (call, _), result in zip(calls, results, strict=True)]

    def _start(self, call: Call, function: Callable[[], Any]) -> Pending:
        if self._background is None:
            self._background = Background()
        return self._background.start(call, function)

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


@dataclass(frozen=True)
class _Batch:
    """What the functions are called on: B completions, and the rows that each function judges."""

    size: int
    lists: dict[str, list[Any]]
    rows: list[list[int]]
    state: Any


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
            self.accepted, self.named, self.required = None, set(), []
            return
        variadic = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.named = {p.name for p in by_name}
        self.accepted = None if variadic else self.named
        self.required = [p.name for p in by_name if p.default is p.empty]

    def takes(self, key: str) -> bool:
        return self.accepted is None or key in self.accepted

    def select(self, batch: _Batch, k: int, offered: dict[str, Any]) -> dict[str, Any]:
        """Copies of what the function takes, for its rows."""
        rows = batch.rows[k]
        # what a function does not name is the trainer's own addition to TRL's convention
        keywords = {key: value for key, value in offered.items() if key in self.named}
        for key, values in batch.lists.items():
            if self.takes(key):
                # a dataset's column need not be a list
                keywords[key] = [copied(values[row]) for row in rows]
        if self.takes("trainer_state"):
            keywords["trainer_state"] = copied_state(batch.state)
        return keywords


def _kept(values: Any) -> Any:
    return list(values) if isinstance(values, list) else values


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
