"""What a reward may leave behind in the process: nothing. Copies of data, state, output."""

from __future__ import annotations

import contextvars
import copy
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# characters that one call may print; what comes after is counted and left out
OUTPUT_LIMIT = 10_000

_ATOMS = frozenset((str, bytes, int, float, bool, complex, type(None)))


def copied(value: Any) -> Any:
    """A copy that shares nothing mutable with `value`.

    Lists, tuples, dicts, arrays and tensors are copied by hand: `copy.deepcopy` takes 20 times as
    long for the token ids of a window. An object that cannot be copied is passed as it is.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list:
        return value.copy() if _ATOMS.issuperset(map(type, value)) else [copied(v) for v in value]
    if kind is dict:
        return {key: copied(item) for key, item in value.items()}
    if kind is tuple:
        return tuple(copied(item) for item in value)
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value)
    # locks, clients and open files are no data; they cannot be copied and need not be
    except Exception:
        return value


def copied_state(state: Any) -> Any:
    """A copy of a TrainerState: an edit of its fields or its history reaches no trainer."""
    if not hasattr(state, "__dict__"):
        return state
    twin = copy.copy(state)
    for name, value in vars(state).items():
        setattr(twin, name, copied(value))
    return twin


def _cuda_states() -> list[torch.Tensor]:
    # a generator's state is on the host: reading it makes no context on another rank's device
    if not torch.cuda.is_initialized():
        return []
    return [generator.get_state() for generator in torch.cuda.default_generators]


def _set_cuda_states(states: list[torch.Tensor]) -> None:
    for generator, state in zip(torch.cuda.default_generators, states, strict=False):
        generator.set_state(state)


def _folder() -> str | None:
    try:
        return os.getcwd()
    # the working directory has been deleted
    except OSError:
        return None


def _device() -> torch.device | None:
    device = torch.get_default_device()
    return None if device.type == "cpu" else device


# (read, write) of the generators that sampling draws from; always written back
_GENERATORS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (_cuda_states, _set_cuda_states),
)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever the block draws or seeds, the generators that sampling draws from go on after it as
    if it had not been there."""
    states = [read() for read, _ in _GENERATORS]
    try:
        yield
    finally:
        for (_, write), state in zip(_GENERATORS, states, strict=True):
            write(state)


# (read, write) of settings; written back only when they have changed
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (np.geterr, lambda value: np.seterr(**value)),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (_folder, lambda folder: None if folder is None else os.chdir(folder)),
)
_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGALRM", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCHLD")
    if hasattr(signal, name)
)


@contextmanager
def restored() -> Iterator[None]:
    """Random state, grad mode, defaults, working directory, signal handlers: as before at exit.

    Also, a timer that was not running before is switched off: graders that end an `alarm` late
    would end the run with it.
    """
    generators = [(write, read()) for read, write in _GENERATORS]
    settings = [(read, write, read()) for read, write in _SETTINGS]
    # only the main thread may set handlers
    main = threading.current_thread() is threading.main_thread()
    handlers = [(number, signal.getsignal(number)) for number in _SIGNALS] if main else []
    timed = main and hasattr(signal, "getitimer")
    timer = signal.getitimer(signal.ITIMER_REAL) if timed else (0.0, 0.0)
    try:
        yield
    finally:
        for write, value in generators:
            write(value)
        for read, write, value in settings:
            if read() != value:
                write(value)
        if timed and timer[0] == 0.0:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in handlers:
            # None: set from C, which Python cannot set again
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


class Output:
    """What one call has printed; at most `OUTPUT_LIMIT` characters of it pass."""

    def __init__(self, name: str) -> None:
        self.name, self.left = name, OUTPUT_LIMIT

    def cut(self, text: str) -> str:
        """The part of the text that still passes, with a note where the rest is left out."""
        if self.left < 0:
            return ""
        self.left -= len(text)
        if self.left >= 0:
            return text
        note = f"\n[reward function {self.name!r}: the rest of its output is left out]\n"
        return text[: len(text) + self.left] + note


# the call that the current thread or task is in
CALL: contextvars.ContextVar[Output | None] = contextvars.ContextVar("reward", default=None)


class _Cut:
    """A stream that cuts what rewards write to it and passes everything else."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        output = CALL.get()
        passed = text if output is None or not isinstance(text, str) else output.cut(text)
        if passed:
            self._stream.write(passed)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def cut_output() -> Iterator[None]:
    """Python's own stdout and stderr cut what each call prints; see `Output`."""
    out, err = sys.stdout, sys.stderr
    # a windowed program has none
    sys.stdout, sys.stderr = (None if stream is None else _Cut(stream) for stream in (out, err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
