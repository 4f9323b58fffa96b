"""One rank of `test_parallel.py`: `python parallel_worker.py folder rank world`.

The ranks hold shards of the same head; each compares its own rows with what one process computes
from the whole of it.
"""

from __future__ import annotations

import sys

import gather_checks
import head_sharding_checks
import model_checks
import ranks
import vocabulary_checks

CHECKS = (
    *vocabulary_checks.CHECKS,
    *head_sharding_checks.CHECKS,
    *gather_checks.CHECKS,
    *model_checks.CHECKS,
)

if __name__ == "__main__":
    ranks.answer(CHECKS, *sys.argv[1:])
