"""Where in the user's code something happened: `my_rewards.py, line 12`."""

from __future__ import annotations

import functools
import inspect
import os
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

_PACKAGE = str(Path(__file__).resolve().parent.parent)
_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_paths()[key]) for key in ("stdlib", "platstdlib")}
)


def code_of(function: Callable[..., Any]) -> CodeType | None:
    """The code of a function, a partial, a wrapped function or an object with `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function) and not inspect.isclass(function):
        function = inspect.unwrap(type(function).__call__)
    return getattr(function, "__code__", None)


def definition(function: Callable[..., Any]) -> str:
    """Where a function is defined; empty for one that is not written in Python."""
    code = code_of(function)
    return "" if code is None else place(code.co_filename, code.co_firstlineno)


def place(filename: str, line: int) -> str:
    """`file, line n`, the file relative to the working directory where it is below it."""
    try:
        relative = os.path.relpath(filename)
    # another drive, or a working directory that is gone
    except (ValueError, OSError):
        relative = filename
    shown = filename if relative.startswith(os.pardir) or filename[:1] == "<" else relative
    return f"{shown}, line {line}"


def last_user_line(frames: Iterable[tuple[str, int]], function: Callable[..., Any]) -> str:
    """The innermost of the frames (outermost first) that the user wrote.

    Frames of installed packages are passed over, except those of the function's own file. Without
    any the function's definition is named.
    """
    theirs = user_frames(frames, function)
    return place(*theirs[-1]) if theirs else definition(function)


def user_frames(
    frames: Iterable[tuple[str, int]], function: Callable[..., Any]
) -> list[tuple[str, int]]:
    """Those of the frames that the user wrote; see `last_user_line`."""
    code = code_of(function)
    own = None if code is None else code.co_filename
    return [frame for frame in frames if frame[0] == own or not _library(frame[0])]


def traceback_frames(traceback: TracebackType | None) -> list[tuple[str, int]]:
    """(file, line) of each frame of a traceback, outermost first."""
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return frames


def stack_frames(frame: FrameType | None, boundary: str) -> list[tuple[str, int]]:
    """(file, line) of each frame of a running stack below the file `boundary`, outermost first."""
    frames: list[tuple[str, int]] = []
    while frame is not None and frame.f_code.co_filename != boundary:
        frames.append((frame.f_code.co_filename, frame.f_lineno or 0))
        frame = frame.f_back
    return frames[::-1]


def waiting_frames(coroutine: Any) -> list[tuple[str, int]]:
    """(file, line) of each coroutine in a chain of awaits, outermost first."""
    frames = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None:
            frames.append((frame.f_code.co_filename, frame.f_lineno or 0))
        coroutine = getattr(coroutine, "cr_await", None)
    return frames


def _library(filename: str) -> bool:
    # "<frozen ...>" and "<string>" are nobody's file
    if filename.startswith("<") or "site-packages" in filename or "dist-packages" in filename:
        return True
    path = os.path.realpath(filename)
    return path.startswith((_PACKAGE + os.sep, *(folder + os.sep for folder in _LIBRARIES)))
