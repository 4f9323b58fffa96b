"""The promises of the loss on the Triton kernels, in Triton's interpreter."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from test_promises import *  # noqa: F403


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
