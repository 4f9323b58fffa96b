"""What a reward function says beside its numbers: `log_extra` and `log_metric`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

# names of the trainer's own metrics, which a reward's figure must not mix into
TRAINER_METRICS = frozenset(
    (
        *("loss", "policy_loss", "value_loss", "reward", "reward_std", "frac_reward_zero_std"),
        *("kl", "entropy", "entropy_coef", "perplexity", "cispo_clip_ratio", "active_rows"),
        *("nonfinite_tokens", "clamped_ratios", "num_tokens", "step", "step_time", "epoch"),
        *("learning_rate", "grad_norm", "total_flos"),
    )
)
TRAINER_PREFIXES = (
    "rewards/",
    "completions/",
    "clip_ratio/",
    "ratio/",
    "tokens/",
    "rollout",
    "sampling/",
    "eval_",
    "train_",
)
# columns of the table of completions
TABLE_COLUMNS = frozenset(("step", "prompt", "completion", "advantage"))
# the largest text of one cell: a table of completions is read, and it is written to a file
_CELL = 10_000
_INT64 = 2**63


class Notes:
    """Collects what the functions log during one scoring; `flush` hands it on.

    A function that was stopped may go on in a thread: what it logs then reaches nobody.

    Args:
        size: B, completions.
        warned: what has been said already; shared between the scorings of a run.
        reserved: further names of columns that no function may take.
    """

    def __init__(self, size: int, warned: set[str], reserved: Sequence[str] = ()) -> None:
        self._size, self._warned = size, warned
        self._reserved = TABLE_COLUMNS.union(reserved)
        self._lock = threading.Lock()
        self._extras: dict[str, list[Any]] = {}
        self._metrics: list[tuple[str, float]] = []

    def extra(self, name: str, rows: Sequence[int] | None) -> Callable[[str, Any], None]:
        """The `log_extra` of function `name`, which sees these rows of the batch (None: all)."""

        def log_extra(column: str, values: Any) -> None:
            column = str(column)
            expected = self._size if rows is None else len(rows)
            if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
                got = type(values).__name__
            else:
                got = "" if len(values) == expected else str(len(values))
            if got:
                self._warn(
                    f"reward function {name!r}: log_extra({column!r}) expected {expected} values, "
                    f"one per completion, got {got}; the column is left out."
                )
                return
            cells = _storable(values.tolist() if hasattr(values, "tolist") else list(values))
            if rows is not None:
                spread: list[Any] = [None] * self._size
                for row, cell in zip(rows, cells, strict=True):
                    spread[row] = cell
                cells = spread
            with self._lock:
                taken = column in self._reserved or column in self._extras
                self._extras[f"{name}/{column}" if taken else column] = cells

        return log_extra

    def metric(self, name: str) -> Callable[[str, Any], None]:
        """The `log_metric` of function `name`."""

        def log_metric(metric: str, value: Any) -> None:
            metric = str(metric)
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                self._warn(
                    f"reward function {name!r}: log_metric({metric!r}) expected a number, got "
                    f"{type(value).__name__}; it is left out."
                )
                return
            if metric in TRAINER_METRICS or metric.startswith(TRAINER_PREFIXES):
                own = f"{name}/{metric}"
                self._warn(
                    f"reward function {name!r}: log_metric({metric!r}) is a name of the trainer's; "
                    f"it is logged as {own!r}."
                )
                metric = own
            with self._lock:
                self._metrics.append((metric, number))

        return log_metric

    def flush(
        self,
        log_extra: Callable[[str, list[Any]], None] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> None:
        """Hand on what was logged."""
        if log_extra is not None:
            for column, values in self._extras.items():
                log_extra(column, values)
        if log_metric is not None:
            for name, value in self._metrics:
                log_metric(name, value)

    def _warn(self, text: str) -> None:
        with self._lock:
            known = text in self._warned
            self._warned.add(text)
        if not known:
            logger.warning("%s This is said once.", text)


def _storable(values: list[Any]) -> list[Any]:
    """Cells of one type, which a table in a file can hold: bools, numbers or texts, and None."""
    values = [_scalar(value) for value in values]
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool} or kinds <= {int} or kinds <= {str}:
        return values
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values]
    return [value if value is None or isinstance(value, str) else _text(value) for value in values]


def _scalar(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < _INT64 else _text(value)
    if isinstance(value, float):
        return float(value)
    return _text(value)


def _text(value: Any) -> str:
    try:
        text = str(value)
    # an int of more than 4300 digits, or a __str__ of the user's
    except Exception:
        text = f"<{type(value).__name__}>"
    text = text if len(text) <= _CELL else text[:_CELL] + " ..."
    return text.encode("utf-8", "replace").decode("utf-8")
