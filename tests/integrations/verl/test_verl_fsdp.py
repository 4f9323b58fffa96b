"""verl's fused head under FSDP on two gloo processes."""

from __future__ import annotations

import pytest

pytest.importorskip("verl", reason="needs verl, which `make test-verl` lays over the environment")
import ranks
import verl_fsdp_worker


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, str]]:
    return ranks.ask("verl_fsdp_worker.py", tmp_path_factory.mktemp("ranks"), 2)


@pytest.mark.parametrize("name", [f.__name__ for f in verl_fsdp_worker.CHECKS])
def test_gradients_are_means_over_the_ranks(said, name):
    ranks.judge(said, name)
