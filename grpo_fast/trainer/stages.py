"""A run of sealed stages: a stage is done when its folder is there whole, and never done twice.

A stage works in `<name>.part`, which survives a kill with whatever its own checkpoints hold. When
it has finished, its files are flushed and listed with their hashes, and the folder is renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_fast.checks import fail

from . import checkpoint
from .folder import run_folder

_RUN = "run.json"


def stage_seed(seed: int, iteration: int, stage: str) -> int:
    """A seed of its own for each stage of each iteration, below 2^31."""
    text = f"{seed}:{iteration}:{stage}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


class Interrupted(Exception):
    """A signal ended a stage before its last step; the same run goes on from its checkpoint.

    Args:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        self.signal = signal
        super().__init__(f"signal {signal} ended the run; the same command goes on with it.")


class Stages:
    """The stages of a run in a folder.

    Args:
        root: the folder of the run.
        fingerprint: what must be the same for the run to be continued; JSON.
    """

    def __init__(self, root: str, fingerprint: dict[str, Any]) -> None:
        self.root, self.fingerprint = Path(root), json.loads(json.dumps(fingerprint, default=str))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, and refuse to go on with another run's stages.

        Raises:
            ValueError: another process runs there; another configuration, with what differs.
        """
        with run_folder(str(self.root), True):
            file = self.root / _RUN
            if file.is_file():
                stored = json.loads(file.read_text(encoding="utf-8"))
                both = stored.keys() | self.fingerprint.keys()
                keys = sorted(k for k in both if stored.get(k) != self.fingerprint.get(k))
                if keys:
                    listing = ", ".join(
                        f"{k} was {stored.get(k)!r:.80}, is {self.fingerprint.get(k)!r:.80}"
                        for k in keys
                    )
                    expected = "the configuration that its stages were made with"
                    fail("output_dir", expected, f"{self.root}: {listing}", "take another folder.")
            else:
                checkpoint.write_json(file, self.fingerprint)
            yield

    def path(self, name: str) -> Path:
        """The folder of a stage."""
        return self.root / name

    def done(self, name: str) -> bool:
        """Whether a stage has been sealed.

        Raises:
            ValueError: its folder is there and damaged.
        """
        folder = self.path(name)
        if not folder.exists():
            return False
        problem = checkpoint.problem(folder, hashed=True)
        if problem:
            hint = "delete that folder and the later stages to do them again."
            fail("output_dir", "sealed stages", f"{folder}: {problem}", hint)
        return True

    def run(self, name: str, work: Callable[[Path], None]) -> Path:
        """The folder of a stage, made by `work` unless it is there.

        Args:
            work: gets a folder to fill, which may hold what a killed attempt left.
        """
        if self.done(name):
            return self.path(name)
        final = self.path(name)
        part = final.with_name(final.name + ".part")
        part.mkdir(parents=True, exist_ok=True)
        work(part)
        checkpoint.seal(part, {})
        os.replace(part, final)
        return final


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object in each line, whole or not at all."""
    part = path.with_name(path.name + ".part")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.write_text(text, encoding="utf-8", errors="surrogatepass")
    os.replace(part, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    text = path.read_text(encoding="utf-8", errors="surrogatepass")
    return [json.loads(line) for line in text.split("\n") if line]


def has_checkpoint(folder: Path) -> bool:
    """Whether a complete checkpoint is there to go on from."""
    found = folder.glob("checkpoint-*")
    return any(checkpoint.problem(path, hashed=True) is None for path in found)


def train_in(trainer: Any, folder: Path) -> None:
    """Train to the end, from the newest checkpoint in a folder where there is one.

    Raises:
        Interrupted: a signal ended it before; what it has is no result of the stage.
    """
    trainer.train(resume_from_checkpoint=has_checkpoint(folder))
    if trainer.stopping.stopped is not None:
        raise Interrupted(trainer.stopping.stopped)


def drop_run(folder: Path) -> None:
    """Delete the working folder of a trainer whose result has been saved."""
    shutil.rmtree(folder, ignore_errors=True)
