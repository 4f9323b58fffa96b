"""Reward functions that end, block or disturb their own process, for the tests of the workers.

Each is at the top of this module, since workers import it. It does what it does where a completion
says so, and rewards the others by their length. The line that a message has to name ends with the
comment `here`.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import os
import re
import signal
import sys
import threading
import time

POISON = "poison"

# what happens in a process of its own: each does it where a completion says so


def _poisoned(completions):
    return any(POISON in text for text in completions)


def _good(completions):
    return [float(len(text)) for text in completions]


def _worker_fault(act):
    def fault(completions, **_):
        if _poisoned(completions):
            act()
        return _good(completions)

    fault.__name__ = fault.__qualname__ = act.__name__.replace("do_", "worker_")
    return fault


def do_exit_0():
    os._exit(0)  # here


def do_exit_1():
    os._exit(1)  # here


def do_kill():
    os.kill(os.getpid(), signal.SIGKILL)


def do_term():
    os.kill(os.getpid(), signal.SIGTERM)


def do_alarm():
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    time.sleep(1e6)


def do_abort():
    os.abort()  # here


def do_segfault():
    ctypes.string_at(0)  # here


def do_hang():
    time.sleep(1e6)  # here


def do_busy():
    while True:
        pass


def do_backtrack():
    re.match(r"^(\s*\w+\s*)+$", "a " * 40 + "!")  # here


def do_hold():
    # a loop in C that never gives the interpreter's lock back, and looks at no signal
    collections.deque(itertools.repeat(0), maxlen=0)  # here


def do_close():
    os.closerange(0, 256)
    time.sleep(1e6)


def do_stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def do_group():
    os.killpg(0, signal.SIGKILL)


def do_thread_exit():
    threading.Thread(target=os._exit, args=(3,)).start()
    time.sleep(1e6)


LOST = tuple(
    _worker_fault(act)
    for act in (
        *(do_exit_0, do_exit_1, do_kill, do_term, do_alarm, do_abort, do_segfault, do_hang),
        *(do_busy, do_backtrack, do_hold, do_close, do_stop, do_group, do_thread_exit),
    )
)


def do_raise():
    raise KeyError("gone")  # here


def do_leave():
    sys.exit(0)  # here


def do_memory():
    bytearray(1 << 46)  # here


def do_recursion():
    do_recursion()  # here


def do_interrupt():
    raise KeyboardInterrupt  # here


FAILED = tuple(
    _worker_fault(act) for act in (do_raise, do_leave, do_memory, do_recursion, do_interrupt)
)


def do_fork():
    os.fork()


def do_fork_raise():
    if os.fork() == 0:
        raise ValueError("in the child")


def do_print():
    print("x" * 5_000_000)


def do_write():
    os.write(1, b"x" * 5_000_000)
    os.write(2, b"x" * 5_000_000)


def do_read():
    sys.stdin.read()


def do_redirect():
    sys.stdout = sys.stderr = None


def do_chdir():
    os.chdir("/")


FINE = tuple(
    _worker_fault(act)
    for act in (do_fork, do_fork_raise, do_print, do_write, do_read, do_redirect, do_chdir)
)
for _function in (*LOST, *FAILED, *FINE):
    globals()[_function.__name__] = _function
