"""Datasets that are read row by row: as many rows as a run needs, read before it begins."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from grpo_fast.checks import fail


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can be read from its start alone: `datasets.IterableDataset`, a generator
    or `torch.utils.data.IterableDataset`."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return True
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return hasattr(dataset, "__iter__") and not indexed and not isinstance(dataset, (str, dict))


def rows_needed(args: Any) -> int | None:
    """Prompts of `max_steps` optimizer steps; None where the epochs decide."""
    if args.max_steps <= 0:
        return None
    micro_steps = args.max_steps * args.gradient_accumulation_steps
    windows = -(-micro_steps // args.window_uses)
    return windows * (args.generation_batch_size // args.num_generations)


def read_stream(name: str, dataset: Any, rows: int | None) -> list[dict[str, Any]]:
    """The first rows of a stream, all of them for None.

    They are held as a list, so that the order, the checks of every prompt and a resume are those of
    any other dataset. A stream that ends earlier is repeated, as epochs are.

    Raises:
        ValueError: no row comes, or one that is no dict.
    """
    read = list(itertools.islice(iter(dataset), rows))
    if not read:
        fail(name, "at least one prompt", "an empty stream")
    bad = next((i for i, row in enumerate(read) if not isinstance(row, dict)), None)
    if bad is not None:
        fail(name, "rows that are dicts", f"{type(read[bad]).__name__} in row {bad}")
    return read


def without_streams(args: Any, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
    """Both datasets, streams read. A stream of training rows keeps its order: `shuffle_dataset`
    is set to False, since only the rows that were read could be shuffled.

    Raises:
        ValueError: a training stream without max_steps, whose epochs have no known length.
    """
    if train_dataset is not None and is_stream(train_dataset):
        rows = rows_needed(args)
        if rows is None:
            expected = "a number of steps with a dataset that is a stream"
            fail("max_steps", expected, args.max_steps, "its epochs have no known length.")
        args.shuffle_dataset = False
        train_dataset = read_stream("train_dataset", train_dataset, rows)
    if isinstance(eval_dataset, dict):
        eval_dataset = {
            key: read_stream(f"eval_dataset[{key!r}]", value, None) if is_stream(value) else value
            for key, value in eval_dataset.items()
        }
    elif eval_dataset is not None and is_stream(eval_dataset):
        eval_dataset = read_stream("eval_dataset", eval_dataset, None)
    return train_dataset, eval_dataset
