"""The fields of `GRPOConfig` that describe replay."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_fast.checks import fail, is_number

from .kl import option as _option

# nats of a token between the policy then and now, above which an answer that was worse than its
# group is left out: DeepSeek-V3.2, 2025
MASK_THRESHOLD = 0.5


@dataclass
class ReplayOptions:
    """The options of this file, for a config that inherits them."""

    replay_share: float = _option(
        0.0, "Share of the groups trained on that are replayed; 0 switches it off."
    )
    replay_discount: float = _option(
        0.9, "Weight of a group for each window that it is older, in drawing."
    )
    replay_size: int = _option(64, "Groups kept on each rank; the oldest are dropped first.")

    def check_replay(self) -> None:
        """Refuse numbers out of range, and switch the correction of stale groups on."""
        if not is_number(self.replay_share) or not 0 <= self.replay_share < 1:
            fail("replay_share", "a number in [0, 1)", repr(self.replay_share))
        if not is_number(self.replay_discount) or not 0 < self.replay_discount <= 1:
            fail("replay_discount", "a number in (0, 1]", repr(self.replay_discount))
        if not self.replay_share:
            return
        if self.replay_size < 1:
            fail("replay_size", "an integer >= 1", self.replay_size)
        if self.fewest_generations < 2:
            hint = "a critic's advantages are those of its own time"
            fail("replay_share", "0 without groups", self.replay_share, hint)
        if self.kl_in_reward:
            hint = "the KL of older groups is that of another policy"
            fail("replay_share", "0 with kl_in_reward", self.replay_share, hint)
        own = self.per_device_train_batch_size * self.steps_per_generation
        if own % self.num_generations:
            expected = f"a divisor of a rank's {own} completions of a window, with replay_share"
            fail("num_generations", expected, self.num_generations, "groups are replayed whole.")
        if self.off_policy_mask_threshold is None:
            self.off_policy_mask_threshold = MASK_THRESHOLD
