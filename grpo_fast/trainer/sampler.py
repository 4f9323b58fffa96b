"""Which prompts come when: the order of the training data and the checks of a prompt dataset."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from grpo_fast.checks import fail


class WindowSampler(Sampler[int]):
    """Yields the index of every prompt num_generations times in a row, window after window.

    One window is the generation batch of all ranks. It is repeated `uses` times, so that a data
    loader whose batch is a rank's share of the window gives one batch for each micro-step, and
    Trainer's count of batches to skip on resume holds. The order depends on (seed, epoch) alone,
    never on the global random state. The last window of an epoch is filled up from the start of
    that epoch's order, so no prompt is left out.

    Args:
        num_prompts: length of the dataset.
        window_prompts: different prompts of one window, over all ranks.
        num_generations: completions per prompt.
        uses: micro-steps that one window serves.
        seed: with the epoch, the source of the order.
        shuffle: False keeps the order of the dataset.
    """

    def __init__(
        self,
        num_prompts: int,
        window_prompts: int,
        num_generations: int,
        uses: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.num_prompts = num_prompts
        self.window_prompts = window_prompts
        self.num_generations = num_generations
        self.uses = uses
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.num_prompts // self.window_prompts)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.windows * self.uses * self.window_prompts * self.num_generations

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_prompts))
        if self.shuffle:
            random.Random(f"{self.seed}:{self.epoch}").shuffle(order)
        for window in range(self.windows):
            start = window * self.window_prompts
            prompts = [
                order[i % self.num_prompts] for i in range(start, start + self.window_prompts)
            ]
            for _ in range(self.uses):
                for prompt in prompts:
                    yield from [prompt] * self.num_generations


class ShardSampler(Sampler[int]):
    """Every world-th index from `rank` on: each rank evaluates its own prompts, none twice."""

    def __init__(self, num_prompts: int, rank: int, world: int) -> None:
        self.indices = range(rank, num_prompts, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def column_names(dataset: Any) -> list[str]:
    """Columns of a `datasets.Dataset`, or the keys of the first row of a sequence of dicts."""
    return list(getattr(dataset, "column_names", None) or dataset[0].keys())


def check_dataset(name: str, dataset: Any) -> None:
    """Refuse a dataset that cannot be trained on.

    Raises:
        ValueError: an iterable dataset, an empty one, rows that are no dicts, no `prompt` column.
    """
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    iterable = isinstance(dataset, torch.utils.data.IterableDataset)
    if iterable or not sized or isinstance(dataset, (str, dict)):
        expected = "a map-style dataset (datasets.Dataset or a list of dicts)"
        hint = "the order of prompts and resume need its length."
        fail(name, expected, type(dataset).__name__, hint)
    if len(dataset) == 0:
        fail(name, "at least one prompt", "none")
    if not isinstance(dataset[0], dict):
        fail(name, "rows that are dicts", type(dataset[0]).__name__)
    columns = column_names(dataset)
    if "prompt" not in columns:
        fail(name, "a column 'prompt'", f"the columns {', '.join(columns)}")
    if not hasattr(dataset, "column_names"):
        _check_rows(name, dataset, columns)


def _check_rows(name: str, rows: Sequence[dict], columns: list[str]) -> None:
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or list(row) != columns and set(row) != set(columns):
            got = sorted(row) if isinstance(row, dict) else type(row).__name__
            fail(name, f"the columns of row 0, {sorted(columns)}", f"{got} in row {index}")


def is_conversational(prompt: Any) -> bool:
    """True for a list of {"role", "content"} messages, False for a string."""
    return not isinstance(prompt, str)


def _prompt_problem(prompt: Any) -> tuple[str, str] | None:
    """What was expected of a prompt and what came; None where nothing is wrong."""
    if isinstance(prompt, str):
        if not prompt:
            return "prompts of at least one character", "an empty string"
        return _surrogate(prompt)
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return "prompts that are a string or a list of messages", f"{prompt!r:.80}"
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return "messages with 'role' and 'content'", f"{message!r:.80}"
        if not isinstance(message["content"], str):
            return "messages whose content is text", f"{message!r:.80}"
        problem = _surrogate(message["content"])
        if problem is not None:
            return problem
    return None


def _surrogate(text: str) -> tuple[str, str] | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"half of a surrogate pair at character {error.start}"
        return "text that UTF-8 can say", got
    return None


def check_prompts(
    name: str, dataset: Any, encode: Callable[[Any], list[int]], room: int | None
) -> str:
    """Check every prompt of a dataset before any work, and return a hash of them all.

    A text has at most as many tokens as UTF-8 bytes, so only prompts that could be too long by that
    bound are tokenised here; the sampler checks the exact length of all of them again.

    Args:
        encode: prompt -> token ids, template included.
        room: tokens of context left for a prompt, None when the model has no limit.

    Raises:
        ValueError: with the row number: neither string nor messages, empty, mixed kinds, too long.
    """
    prompts = (
        dataset["prompt"] if hasattr(dataset, "column_names") else [r["prompt"] for r in dataset]
    )
    first, overhead, digest = None, 0, hashlib.sha256()
    for row, prompt in enumerate(prompts):
        problem = _prompt_problem(prompt)
        if first is None and problem is None:
            first = is_conversational(prompt)
            overhead = len(encode(prompt))
        if problem is None and is_conversational(prompt) != first:
            kinds = ("a string", "a list of messages")
            problem = f"prompts of one kind, {kinds[first]} in row 0", kinds[not first]
        if problem:
            fail(name, problem[0], f"{problem[1]} in row {row}")
        digest.update(repr(prompt).encode("utf-8", "surrogatepass"))
        if room is None or _byte_length(prompt) + overhead <= room:
            continue
        tokens = len(encode(prompt))
        if tokens > room:
            expected = f"prompts of at most {room} tokens, which max_completion_length leaves"
            fail(name, expected, f"{tokens} in row {row}")
    return digest.hexdigest()[:16]


def _byte_length(prompt: Any) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "replace"))
    # roles and separators become a few tokens for each message
    return sum(len(m["content"].encode("utf-8", "replace")) + 16 for m in prompt)
