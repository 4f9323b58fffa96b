"""Level (a): the loss from given logits, forward and backward."""

from benchmarks.measure.clock import recorded

LEVEL = "logits"


@recorded
def test_logits(measured, entry):
    assert min(measured(*entry)["durations"]) > 0
