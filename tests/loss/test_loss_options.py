"""Adapters, frozen heads, references from hidden states, fixed capacities and skipped rows of the
policy loss on the torch backend, and the routes they take."""

import pytest
from option_checks import (
    check_frozen_head,
    check_lora,
    check_max_rows,
    check_max_rows_of_logits,
    check_nothing,
    check_reference_from_hidden,
    check_routes,
    check_skip,
)

from grpo_fast import PRESETS
from grpo_fast.engine import chunks
from grpo_fast.plan.route import ROUTES

LEVELS = [(name, level) for name, p in PRESETS.items() for level in p.levels or (None,)]
TRAINED = [
    ("A", "B"),
    ("hidden", "A", "B"),
    ("hidden", "weight", "bias", "A", "B"),
    ("A",),
    ("hidden", "B"),
    ("hidden",),
    ("weight",),
]


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "cispo"])
@pytest.mark.parametrize("trained", TRAINED, ids="-".join)
def test_lora(trained, loss_type):
    check_lora(trained, loss_type, {"old"}, bonus=False)
    check_lora(trained, loss_type, set(), bonus=True)
    check_lora(trained, loss_type, {"old", "ref", "temperature", "rollout"}, bonus=True)


@pytest.mark.parametrize("loss_type, level", LEVELS)
def test_frozen_head(loss_type, level):
    for use in (set(), {"old"}, {"rollout"}, {"old", "ref", "temperature", "rollout"}):
        check_frozen_head(loss_type, level, use)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_reference_from_hidden(beta):
    check_reference_from_hidden(beta)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "gmpo", "vespo", "reinforce", "cispo"])
def test_max_rows(loss_type, old):
    for name in ("off_policy", "top_entropy", "together", "together_without_top"):
        check_max_rows(loss_type, name, old, ("hidden", "weight", "bias", "A", "B"))
        check_max_rows(loss_type, name, old, ("hidden",))
    check_max_rows_of_logits(loss_type, old)


SKIPPED = ("off_policy", "token_mask_both", "sequence_truncate_high", "geometric_mask_both")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", PRESETS)
def test_skipped_rows(loss_type, old):
    for name in (*SKIPPED, "temperature_token"):
        check_skip(loss_type, name, old)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "gmpo", "vespo", "reinforce", "dr_grpo"])
def test_nothing_to_do(loss_type, old):
    for name in ("off_policy", "top_entropy", "geometric_mask_both", "together"):
        check_nothing(loss_type, name, old)


def test_every_route_is_reached():
    assert check_routes() == set(ROUTES)


def test_routes_that_go_through_slices_of_the_vocabulary(monkeypatch):
    """Chunks too small for an accelerator: backward by columns, dweight written once."""
    monkeypatch.setitem(chunks.COLUMNS_FIRST, "cpu", 32)
    check_routes(columns_first=True)
    check_lora(("hidden", "weight", "bias", "A", "B"), "gspo", {"old"}, bonus=True)
