"""The folder of a run: one process at a time, and nothing of another run in it."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = ".grpo_fast.lock"
# what a run writes, and its successor would mix with its own or delete
_WRITTEN = ("checkpoint-*", "completions", "metrics.jsonl", "metrics.previous.jsonl", "curves.png")


class RunFolder:
    """The output folder, held by this run."""

    def __init__(self, path: Path, main: bool) -> None:
        self.path, self.main = path, main

    def set_aside(self) -> None:
        """Move what an earlier run left into `previous-<n>`: checkpoints, metrics, completions,
        curves. It is not continued, mixed or deleted."""
        found = sorted(p for pattern in _WRITTEN for p in self.path.glob(pattern))
        if not self.main or not found:
            return
        number = 1
        while (self.path / f"previous-{number}").exists():
            number += 1
        place = self.path / f"previous-{number}"
        place.mkdir()
        for path in found:
            os.replace(path, place / path.name)
        logger.warning("output_dir: an earlier run in %s was moved to %s", self.path, place)


@contextmanager
def run_folder(output_dir: str, main: bool) -> Iterator[RunFolder]:
    """Hold the output folder while a run trains; the lock goes with the process, however it ends.

    Args:
        main: whether this rank holds it; the others pass.

    Raises:
        ValueError: another process holds it, and which.
    """
    path = Path(output_dir)
    if not main:
        yield RunFolder(path, main)
        return
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"output_dir: expected a folder that no other run trains in, got {output_dir}, "
                f"held by {file.read().strip() or 'another process'}."
            ) from None
        except OSError as error:
            # some network file systems have no locks
            logger.warning("output_dir: %s takes no lock (%s)", output_dir, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield RunFolder(path, main)
