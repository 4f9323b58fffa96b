"""A slow synchronous reward function in processes of its own, which can be stopped."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import logging
import operator
import sys
import threading
from collections.abc import Callable
from typing import Any

from .places import last_user_line
from .worker import Lost, Reported, Worker

logger = logging.getLogger(__name__)


def in_worker(
    function: Callable[..., Any],
    *,
    workers: int = 1,
    timeout: float = 60.0,
    chunk: int | None = 8,
    memory: int | None = None,
) -> Callable[..., list[float | None]]:
    """The same reward function, called in `workers` processes that are killed when they hang.

    A request is `chunk` completions; that is all the function sees at once. Where the process runs
    out of time, exits or is killed, these completions stay without a reward (None, never 0), a
    warning names the function and the line it was at, and a new process takes the next ones. An
    exception is an error of the function's and ends the run, as without workers.

    The processes get prompts, completions, their ids and columns as JSON, and no `trainer_state`.
    They are started afresh, so that they share no state and no GPU with the run.

    Args:
        function: one that can be imported: defined at the top of a module.
        workers: processes.
        timeout: seconds by the clock for one request.
        chunk: completions in one request; None: an equal share for each process.
        memory: MiB of address space of each process; None: no limit.

    Raises:
        ValueError: for a function that cannot be imported by its name, or a number out of range.
    """
    module, attribute = _address(function)
    for name, value in (("workers", workers), ("chunk", chunk), ("memory", memory)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (value is None and name != "workers"):
            raise ValueError(f"in_worker: expected {name} to be an integer >= 1, got {value!r}.")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"in_worker: expected timeout to be seconds > 0, got {timeout!r}.")
    setup = {"module": module, "attribute": attribute}
    limit = None if memory is None else memory << 20
    # made by the first call: a process that only checks its options starts none
    pool = functools.cache(
        lambda: [
            Worker("function", setup, wall=timeout, memory=limit, inherit=True)
            for _ in range(workers)
        ]
    )

    @functools.wraps(function)
    def reward(**keywords: Any) -> list[float | None]:
        loggers = keywords.pop("log_extra", None), keywords.pop("log_metric", None)
        keywords.pop("trainer_state", None)
        size = len(next(iter(keywords.values())))
        step = chunk or max(1, -(-size // workers))
        parts = [range(start, min(start + step, size)) for start in range(0, size, step)]
        answers = _asked(function, pool(), keywords, parts, timeout)
        _log(loggers, answers, parts, size)
        values: list[float | None] = []
        for part, answer in zip(parts, answers, strict=True):
            got = [None] * len(part) if answer is None else answer["value"]
            if not isinstance(got, list) or len(got) != len(part):
                # the caller says what is wrong with it
                return got if not isinstance(got, list) else _misfit(function, got, len(part))
            values += got
        return values

    reward.__in_worker__ = function
    reward.__signature__ = inspect.signature(function)
    return reward


def _address(function: Callable[..., Any]) -> tuple[str, str]:
    module = getattr(function, "__module__", None)
    attribute = getattr(function, "__qualname__", "")
    try:
        found = operator.attrgetter(attribute)(sys.modules[module])
    except (AttributeError, KeyError, TypeError):
        found = None
    known = found is function or getattr(found, "__in_worker__", None) is function
    if not known or module == "__main__":
        name = attribute or type(function).__name__
        raise ValueError(
            f"in_worker: expected a function at the top of a module that can be imported, got "
            f"{name!r} of {module!r}."
        )
    return module, attribute


def _misfit(function: Callable[..., Any], got: list[Any], size: int) -> Any:
    raise Reported(
        f"({last_user_line([], function)}) returned {len(got)} rewards for a request of {size} "
        "completions: expected one each."
    )


def _asked(
    function: Callable[..., Any],
    pool: list[Worker],
    keywords: dict[str, Any],
    parts: list[range],
    timeout: float,
) -> list[dict[str, Any] | None]:
    """The answer to each part; None where the worker was lost."""
    answers: list[dict[str, Any] | None] = [None] * len(parts)
    errors: list[BaseException] = []
    order = itertools.count()

    def serve(worker: Worker) -> None:
        # `next` of a count is atomic, so each part is taken once
        while (index := next(order)) < len(parts) and not errors:
            part = parts[index]
            sliced = {key: [values[i] for i in part] for key, values in keywords.items()}
            try:
                answer = worker.ask({"keywords": sliced})
                if "error" in answer:
                    place = last_user_line([tuple(f) for f in answer["frames"]], function)
                    raise Reported(f"{answer['error']} ({place})")
                answers[index] = answer
            except Lost as lost:
                _warn(function, lost, part, timeout)
            # it is raised again in the caller's thread
            except BaseException as error:
                errors.append(error)

    _check_json(keywords)
    threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in pool[: len(parts)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return answers


def _check_json(keywords: dict[str, Any]) -> None:
    for key, values in keywords.items():
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"column {key!r}: expected values that JSON holds, for a worker; {error}."
            ) from error


def _warn(function: Callable[..., Any], lost: Lost, part: range, timeout: float) -> None:
    text = f"did not return within {timeout:g} s" if lost.late else str(lost)
    logger.warning(
        "reward function %r %s for %d completions, at %s; they stay without a reward.",
        function.__name__,
        text,
        len(part),
        last_user_line(lost.frames, function),
    )


def _log(
    loggers: tuple[Callable | None, Callable | None],
    answers: list[dict[str, Any] | None],
    parts: list[range],
    size: int,
) -> None:
    log_extra, log_metric = loggers
    columns: dict[str, list[Any]] = {}
    for part, answer in zip(parts, answers, strict=True):
        if answer is None:
            continue
        if answer.get("output"):
            print(answer["output"], end="")
        for name, values in answer["extras"]:
            cells = columns.setdefault(name, [None] * size)
            for row, value in zip(part, values, strict=False):
                cells[row] = value
        if log_metric is not None:
            for name, value in answer["metrics"]:
                log_metric(name, value)
    if log_extra is not None:
        for name, values in columns.items():
            log_extra(name, values)
