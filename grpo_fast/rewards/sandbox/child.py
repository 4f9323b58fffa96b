"""What runs inside the sandbox, and the encoding of what goes in and out. Imports nothing of ours.

A fresh interpreter receives the compiled code of this file as its first message, says `ready`, and
waits for one job. Whatever the program under test does to this interpreter, only bytes leave it,
and whoever reads them takes them for plain data alone: `decode` builds no object of any other type.
"""

from __future__ import annotations

import os
import sys

# importing typing would take half as long again as the interpreter's start
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_DEPTH = 100
_SEQUENCES = {list: b"l", tuple: b"t", set: b"S", frozenset: b"Z"}
_MAKERS = {b"l": list, b"t": tuple, b"S": set, b"Z": frozenset, b"d": dict}


class NotPlain(ValueError):
    """A value that is no plain data, or bytes that encode none."""


def encode(value: Any) -> bytes:
    """Bytes of a value made of None, bool, int, float, complex, str, bytes and the containers
    list, tuple, set, frozenset and dict.

    Raises:
        NotPlain: for any other type, subclasses among them, and for more than 100 levels.
    """
    parts: list[bytes] = []
    _write(value, parts, 0)
    return b"".join(parts)


def decode(data: bytes, make: Callable[[bytes, list[Any]], Any] | None = None) -> Any:
    """The value that `encode` wrote.

    Args:
        data: bytes from anywhere; nothing but plain data comes out of them.
        make: (tag, items) -> container; None makes Python's own. For a dict the items are pairs.

    Raises:
        NotPlain: for bytes that `encode` does not write.
    """
    try:
        value, end = _read(data, 0, 0, make or _make)
    except NotPlain:
        raise
    # a wrong number, text or key; a container that cannot be hashed
    except (ValueError, OverflowError, TypeError, IndexError) as error:
        raise NotPlain(f"{type(error).__name__} in encoded data") from error
    if end != len(data):
        raise NotPlain("bytes behind the value")
    return value


def _write(value: Any, parts: list[bytes], depth: int) -> None:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise NotPlain(f"nested deeper than {MAX_DEPTH}")
    if value is None or kind is bool:
        parts.append(b"N" if value is None else b"T" if value else b"F")
    elif kind is int:
        # hexadecimal: decimal digits cost quadratic time, and Python refuses more than 4,300
        parts.append(b"i%s;" % format(value, "x").encode())
    elif kind is float:
        parts.append(b"f%s;" % value.hex().encode())
    elif kind is complex:
        parts.append(b"c%s;%s;" % (value.real.hex().encode(), value.imag.hex().encode()))
    elif kind is str or kind is bytes:
        raw = value.encode("utf-8", "surrogatepass") if kind is str else value
        parts += [b"%s%d:" % (b"s" if kind is str else b"b", len(raw)), raw]
    elif kind in _SEQUENCES:
        parts.append(b"%s%d:" % (_SEQUENCES[kind], len(value)))
        for item in value:
            _write(item, parts, depth + 1)
    elif kind is dict:
        parts.append(b"d%d:" % len(value))
        for pair in value.items():
            _write(pair[0], parts, depth + 1)
            _write(pair[1], parts, depth + 1)
    else:
        raise NotPlain(f"no plain data: {kind.__name__}")


def _make(tag: bytes, items: list[Any]) -> Any:
    return _MAKERS[tag](items)


def _until(data: bytes, start: int, mark: bytes) -> tuple[str, int]:
    end = data.index(mark, start)
    return data[start:end].decode("ascii"), end + 1


def _read(data: bytes, at: int, depth: int, make: Callable[..., Any]) -> tuple[Any, int]:
    tag, at = data[at : at + 1], at + 1
    if depth > MAX_DEPTH:
        raise NotPlain(f"nested deeper than {MAX_DEPTH}")
    if tag == b"N":
        return None, at
    if tag == b"T" or tag == b"F":
        return tag == b"T", at
    if tag == b"i":
        text, at = _until(data, at, b";")
        return int(text, 16), at
    if tag == b"f" or tag == b"c":
        text, at = _until(data, at, b";")
        if tag == b"f":
            return float.fromhex(text), at
        imaginary, at = _until(data, at, b";")
        return complex(float.fromhex(text), float.fromhex(imaginary)), at
    if tag not in (b"s", b"b", b"d", b"l", b"t", b"S", b"Z"):
        raise NotPlain("an unknown tag")
    text, at = _until(data, at, b":")
    size = int(text)
    # every item has at least one byte, so a false count cannot ask for memory
    if not 0 <= size <= len(data) - at:
        raise NotPlain("a count beyond the data")
    if tag == b"s" or tag == b"b":
        raw = data[at : at + size]
        return (raw.decode("utf-8", "surrogatepass") if tag == b"s" else raw), at + size
    items: list[Any] = []
    for _ in range(size):
        item, at = _read(data, at, depth + 1, make)
        if tag == b"d":
            value, at = _read(data, at, depth + 1, make)
            item = (item, value)
        items.append(item)
    return make(tag, items), at


class Channel:
    """Messages over two pipes: four bytes of length, then as many bytes."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target

    def send(self, message: bytes) -> None:
        data = len(message).to_bytes(4, "big") + message
        while data:
            data = data[os.write(self.target, data) :]

    def receive(self) -> bytes | None:
        """The next message; None at the end."""
        head = self._exactly(4)
        return None if head is None else self._exactly(int.from_bytes(head, "big"))

    def _exactly(self, size: int) -> bytes | None:
        parts: list[bytes] = []
        while size:
            part = os.read(self.source, min(size, 1 << 20))
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def restrict(limits: dict[str, int]) -> None:
    """Set each limit of the `resource` module, soft and hard, so that nothing can raise it."""
    import resource

    for name, value in limits.items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, name), (value, value))


def make_module(name: str) -> Any:
    """An empty module under this name in sys.modules: dataclasses and pickle look there."""
    module = type(sys)(name)
    sys.modules[name] = module
    return module


def resolve(module: Any, entry: str) -> Any:
    """`name`, or `Class.method` of an instance made without arguments."""
    head, *rest = entry.split(".")
    found = getattr(module, head)
    for name in rest:
        found = getattr(found() if isinstance(found, type) else found, name)
    return found


def name_of(error: BaseException) -> bytes:
    """The name of an exception's class, at most 100 bytes."""
    return type(error).__name__.encode("utf-8", "replace")[:100]


def serve_calls(job: dict[str, Any], channel: Channel) -> None:
    """Define the program, then answer each message (arguments, keywords) with what it returns."""
    module = make_module("candidate")
    try:
        exec(compile(job["code"], "<program>", "exec"), module.__dict__)
        function = resolve(module, job["entry"])
    except BaseException as error:
        channel.send(b"x" + name_of(error))
        os._exit(1)
    channel.send(b"defined")
    while (message := channel.receive()) is not None:
        arguments, keywords = decode(message)
        try:
            reply = b"v" + encode(function(*arguments, **keywords))
        except NotPlain as error:
            reply = b"u" + str(error).encode("utf-8", "replace")[:100]
        except BaseException as error:
            reply = b"e" + name_of(error)
        channel.send(reply)
    os._exit(0)


def run_program(job: dict[str, Any], channel: Channel) -> None:
    """Run the program as a script: standard input is the job's, standard output the channel's."""
    path = "stdin"
    with open(path, "wb") as file:
        file.write(job["stdin"])
    source = os.open(path, os.O_RDONLY)
    os.unlink(path)
    os.dup2(source, 0)
    os.dup2(channel.target, 1)
    os.close(source)
    os.close(channel.target)
    os.close(channel.source)
    exec(compile(job["code"], "<program>", "exec"), make_module("__main__").__dict__)


def run_tests(job: dict[str, Any], channel: Channel) -> None:
    """Run a test body in which `candidate` and the entry point are calls into another sandbox."""
    import builtins

    def finish(verdict: bytes) -> None:
        channel.send(verdict)
        os._exit(0)

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        try:
            message = encode([list(arguments), keywords])
        except NotPlain as error:
            finish(b"!candidate: expected arguments of plain data, got " + str(error).encode())
        channel.send(b"c" + message)
        reply = channel.receive() or b""
        kind, payload = reply[:1], reply[1:]
        if kind == b"v":
            try:
                return decode(payload)
            except NotPlain:
                finish(b"fgarbage")
        # not an exception: a test that expects one must not take this for it
        if kind != b"e":
            finish(b"fno plain data")
        raised = getattr(builtins, payload.decode("utf-8", "replace"), RuntimeError)
        if not (isinstance(raised, type) and issubclass(raised, Exception)):
            raised = RuntimeError
        try:
            error = raised("raised by the program")
        # some exceptions, such as UnicodeDecodeError, take other arguments
        except TypeError:
            error = RuntimeError("raised by the program")
        raise error

    module = make_module("tests")
    names = vars(module)
    try:
        exec(compile(job["before"], "<before>", "exec"), names)
        names["candidate"] = names[job["entry"].split(".")[-1]] = candidate
        exec(compile(job["tests"], "<tests>", "exec"), names)
        if callable(names.get("check")):
            names["check"](candidate)
        for name in [name for name in names if name.startswith("test_")]:
            names[name]()
    except BaseException as error:
        finish(b"f" + name_of(error))
    finish(b"p")


KINDS = {"call": serve_calls, "program": run_program, "test": run_tests}


def main() -> None:
    """Say ready, take one job, set its limits, say started, run it."""
    channel = Channel(os.dup(0), os.dup(1))
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
    sys.path = [entry for entry in sys.path if entry]
    if os.path.isdir("/packages"):
        sys.path.append("/packages")
    sys.argv = ["program"]
    # what `site`, which is not loaded, would add
    sys.modules["builtins"].exit = sys.modules["builtins"].quit = sys.exit
    channel.send(b"ready")
    message = channel.receive()
    if message is None:
        os._exit(0)
    job = decode(message)
    restrict(job["limits"])
    channel.send(b"started")
    KINDS[job["kind"]](job, channel)


if __name__ == "__main__":
    main()
