"""Level (b): the loss from hidden states and the lm_head."""

from benchmarks.measure.clock import recorded

LEVEL = "linear"


@recorded
def test_linear(measured, entry):
    assert min(measured(*entry)["durations"]) > 0
