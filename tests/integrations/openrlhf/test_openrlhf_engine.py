"""Actors whose models are in DeepSpeed's engines, ZeRO-2 and ZeRO-3, over two gloo processes.

Where openrlhf is missing the file is skipped; `make test-openrlhf` has it.
"""

from __future__ import annotations

import pytest
import ranks

pytest.importorskip("openrlhf", reason="needs openrlhf, which `make test-openrlhf` lays over")
import openrlhf_engine_worker


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, str]]:
    """What each rank said to each check: its traceback, or nothing."""
    folder = tmp_path_factory.mktemp("ranks")
    return ranks.ask("openrlhf_engine_worker.py", folder, 2, timeout=300)


@pytest.mark.parametrize("name", [f.__name__ for f in openrlhf_engine_worker.CHECKS])
def test_engines(said, name):
    ranks.judge(said, name)
