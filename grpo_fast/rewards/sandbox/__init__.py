"""Runs untrusted programs: bubblewrap, a filter of system calls, limits, warm interpreters."""

from .command import SandboxUnavailable
from .limits import Limits, Outcome, Program
from .pool import Sandbox, available_cores

__all__ = [
    "Limits",
    "Outcome",
    "Program",
    "Sandbox",
    "SandboxUnavailable",
    "available_cores",
]
