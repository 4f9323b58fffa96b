"""Level (c): log-probs alone, from hidden states and the lm_head."""

from benchmarks.measure.clock import recorded

LEVEL = "logprob"


@recorded
def test_logprob(measured, entry):
    assert min(measured(*entry)["durations"]) > 0
