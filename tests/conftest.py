"""What every test runs under: no network, fixed seeds, NaN in memory the library did not write.

`--backend` says what computes the row functions of the tests
marked `kernels`: torch, the Triton kernels in Triton's interpreter, or the kernels on a GPU. It is
one for a process, since Triton decides when it is imported whether a kernel is interpreted. The
interpreter gets the checks of `interpreter.py`.
"""

import contextlib
import functools
import importlib.util
import math
import os
import random
import signal
import sys
from collections.abc import Iterator
from typing import NamedTuple

# Both are read when transformers is imported, and the suite must not depend on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton 3.9 warns where this is left open; our kernels choose for themselves.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import numpy as np
import pytest
import torch
from torch.utils import _device

BACKENDS = ("torch", "interpret", "cuda")


class Running(NamedTuple):
    """The backend of a run, and the device that its tensors belong on."""

    name: str
    device: str


def pytest_addoption(parser):
    sentence = "what computes the row functions of the tests marked kernels"
    parser.addoption("--backend", choices=BACKENDS, default="torch", help=sentence)


def pytest_configure(config):
    # a pytest that a test starts is no worker of ours: pytest-benchmark would write no result
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]
    # a shell that starts us in the background has Ctrl-C ignored, here and in every process of ours
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--backend") == "interpret":
        # before anything imports triton
        os.environ["TRITON_INTERPRET"] = "1"
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from interpreter import install

        install()
    if config.getoption("--backend") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--backend: expected an NVIDIA GPU for cuda, torch sees none")


@pytest.fixture
def backend(request, monkeypatch) -> Iterator[Running]:
    """The one of `--backend`, which every call of the test gets."""
    name = request.config.getoption("--backend")
    running = Running(name, "cuda" if name == "cuda" else "cpu")
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch" if name == "torch" else "triton")
    # on a GPU the factories of the tests and of their helpers follow it
    with torch.device("cuda") if name == "cuda" else contextlib.nullcontext():
        yield running


def pytest_collection_modifyitems(config, items):
    backend = config.getoption("--backend")
    left_out = {"torch": {"triton", "gpu"}, "interpret": {"gpu"}, "cuda": set()}[backend]
    if backend == "interpret" and os.environ.get("GRPO_FAST_TEST_FULL") != "1":
        left_out.add("slow_interpreted")
    out = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    items[:] = [item for item in items if item not in set(out)]
    config.hook.pytest_deselected(items=out)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps its settings for the whole process: no test inherits another's."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def _filled_with_nan(allocate):
    """`allocate`, but floating memory that grpo_fast asks for starts as NaN instead of as luck."""

    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("grpo_fast") and out.is_floating_point() and not out.is_meta:
            out.detach().fill_(math.nan)
        return out

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def nan_in_unwritten_memory():
    # `with torch.device(...)` recognises factories by identity, in a set made on first use: make it
    # now, while the names still mean torch's own functions.
    _device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _filled_with_nan(getattr(owner, name)))
        yield
