"""A reward for ms-swift, as a plug-in file: `--external_plugins tests/support/swift_reward.py`."""

from __future__ import annotations

from typing import Any

from swift.rewards import ORM, orms


class Spread(ORM):
    """Different for almost every two completions, so that groups have a gradient."""

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        words = [[w for w in text.split() if w[1:].isdigit()] for text in completions]
        return [float(sum(int(w[1:]) for w in each) % 11) for each in words]


orms["spread"] = Spread
