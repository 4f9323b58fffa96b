"""An lm_head that DeepSpeed's ZeRO-3 has partitioned, over 2 and 4 gloo processes against one.

`make test-deepspeed` installs DeepSpeed beside the environment and runs this file."""

from __future__ import annotations

import importlib.util

import pytest
import ranks

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed (make test-deepspeed)", allow_module_level=True)

import zero3_worker  # noqa: E402


@pytest.fixture(scope="module", params=(2, 4))
def said(request, tmp_path_factory) -> list[dict[str, str]]:
    """What each rank said to each check: its traceback, or nothing."""
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.ask("zero3_worker.py", folder, request.param, timeout=400)


@pytest.mark.parametrize("name", [f.__name__ for f in zero3_worker.CHECKS])
def test_processes_agree_with_one(said, name):
    ranks.judge(said, name)
