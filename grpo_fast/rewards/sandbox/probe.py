"""The program that every sandbox runs first: it tries what a program must not be able to do."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from .child import NotPlain, decode, encode
from .limits import Outcome, Program

_CODE = """
import errno, os, socket, sys

def attempt(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return getattr(error, "errno", None) or type(error).__name__
    return 0

def fork():
    if os.fork() == 0:
        os._exit(0)

def write(path):
    with open(path, "w") as file:
        file.write("x")

def look_at_packages():
    # that there are none is an error as well, as it is for the other doors
    for root in ("/usr/lib", "/usr/local/lib", os.path.dirname(os.path.dirname(os.__file__))):
        for name in os.listdir(root) if os.path.isdir(root) else ():
            for kind in ("site-packages", "dist-packages"):
                folder = os.path.join(root, name, kind)
                if name.startswith("python") and os.path.isdir(folder) and os.listdir(folder):
                    return
    raise FileNotFoundError(errno.ENOENT, "nothing")

def probe(secret):
    return {
        "result": sum(range(10)),
        "version": tuple(sys.version_info[:3]),
        "uid": os.getuid(),
        "pid": os.getpid(),
        "environment": sorted(os.environ),
        "root": sorted(os.listdir("/")),
        "a process of its own": attempt(fork),
        "a socket": attempt(socket.socket),
        "a file of yours": attempt(open, secret),
        "installed packages": attempt(look_at_packages),
        "writing to /": attempt(write, "/escaped"),
        "writing to its libraries": attempt(write, os.path.dirname(os.__file__) + "/escaped"),
        "its own folder": attempt(write, "inside"),
    }
"""
# a file that exists on every machine and belongs to nobody's library
_SECRET = "/etc/passwd"
PROBE = Program("call", _CODE, entry="probe", calls=(encode([[_SECRET], {}]),))
_DOORS = (
    "a process of its own",
    "a socket",
    "a file of yours",
    "installed packages",
    "writing to /",
    "writing to its libraries",
)
_WANTED = {"result": 45, "its own folder": 0}


def read_probe(outcome: Outcome) -> tuple[dict[str, Any], list[str]]:
    """What the probe found, and which doors it found open."""
    try:
        reply = outcome.replies[-1]
        found = decode(reply[1:]) if reply[:1] == b"v" else {}
    except (IndexError, NotPlain):
        found = {}
    wrong = [name for name, value in _WANTED.items() if found.get(name) != value]
    return found, wrong + [name for name in _DOORS if found.get(name, 0) == 0]


def explain_failure(settings: dict[str, Any]) -> str:
    """What bubblewrap prints when it is started as the runner starts it; empty if it works."""
    source, target = os.pipe()
    os.write(target, settings["filter"])
    os.close(target)
    arguments = [*settings["command"], "--seccomp", str(source), *settings["python"]]
    try:
        result = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            pass_fds=[source],
            env={},
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.close(source)
    lines = result.stderr.strip().splitlines()
    return lines[-1] if result.returncode and lines else ""
