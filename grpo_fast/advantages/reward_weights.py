"""Rewards of a group -> weights of its completions (reward-weighted regression)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_fast.checks import fail, nearest

from .group import extremes, scorable, telling, width

SCHEMES = ("linear", "softmax", "rank", "rejection")


def check_weighting(
    scheme: str, temperature: float = 1.0, keep: int = 1, *, prefix: str = ""
) -> None:
    """Refuse what `reward_weights` cannot honour.

    Args:
        scheme, temperature, keep: as for `reward_weights`.
        prefix: stands before each name in the messages.

    Raises:
        ValueError: an unknown scheme (the nearest one is suggested), a number out of range, or a
            number that the scheme has no use for.
    """
    if scheme not in SCHEMES:
        fail(f"{prefix}scheme", "a known scheme", repr(scheme), nearest(scheme, SCHEMES))
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < math.inf:
        fail(f"{prefix}temperature", "a finite number > 0", repr(temperature))
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        fail(f"{prefix}keep", "an integer >= 1", repr(keep))
    for name, value, owner in (
        ("temperature", temperature, "softmax"),
        ("keep", keep, "rejection"),
    ):
        if value != 1 and scheme != owner:
            expected = f"1 with the scheme {scheme!r}, since only {owner!r} has it"
            fail(f"{prefix}{name}", expected, repr(value))


def reward_weights(
    rewards: Tensor, scheme: str = "softmax", *, temperature: float = 1.0, keep: int = 1
) -> Tensor:
    """Weights of the reward-weighted update -sum_i w_i log pi(y_i | x), in the place of advantages.

        share = (r - min_group(r)) / (max_group(r) - min_group(r))      # linear
        share = exp((r - max_group(r)) / temperature)                   # softmax
        share = rank(r)               # rank: 0 for the worst; equal rewards share their mean rank
        share = r is among the best   # rejection: 1 for the `keep` best of the group, else 0; what
                                      # ties at the threshold shares the places that are left
        w = G * share / sum_group(share)

    So w >= 0, and it averages to 1 over the G completions of a prompt, the unscorable included:
    with the aggregation `sequence_sum` the loss is the mean over prompts of -sum_i w_i / G log pi,
    and every prompt counts the same.

    A group whose valid rewards are all equal (or that has fewer than two) gets exactly 0 under
    every scheme, as in `group_advantages`. It says nothing about which completion is better: equal
    weights on the policy's own samples have an expected gradient of 0, so what they would add is
    noise, and a group of failures would be made more likely.

    Source: Reinforcement Learning by Reward-Weighted Regression for Operational Space Control
    (2007); rejection: RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment
    (2023).

    Args:
        rewards: (P, G) floating point; NaN marks an unscorable completion, whose weight is 0.
        scheme: one of `SCHEMES`.
        temperature: of softmax, in units of the reward; small: the best alone.
        keep: of rejection, completions; a group with fewer valid ones keeps them all.

    Returns:
        (P, G) weights, float32 (float64 for float64 rewards).

    Raises:
        ValueError: rewards not (P, G) floating point, an infinite reward, an unknown scheme, a
            number out of range or without use for the scheme.
    """
    check_weighting(scheme, temperature, keep)
    given, (rewards, valid) = rewards, scorable(rewards)
    lowest, highest = extremes(rewards, valid)
    if scheme == "linear":
        share = (rewards - lowest) / (highest - lowest)
    elif scheme == "softmax":
        # selected, because 0 / a tiny temperature must not be NaN
        share = torch.where(
            rewards == highest,
            torch.ones_like(rewards),
            ((rewards - highest) / temperature).exp(),
        )
    elif scheme == "rank":
        one, other = rewards[:, :, None], rewards[:, None, :]
        # comparisons with NaN are False, so only valid ones are counted
        below, up_to = (other < one).sum(-1), (other <= one).sum(-1)
        share = (below + up_to - 1).to(rewards.dtype) / 2
    else:
        share = _best(rewards, valid, keep)
    share = telling(share, rewards, valid)
    # 0 / 1 in a group that says nothing; above 0 in every other
    total = share.sum(-1, keepdim=True)
    share = share / torch.where(total > 0, total, torch.ones_like(total))
    return (rewards.shape[1] * share).to(width(given))


def _best(rewards: Tensor, valid: Tensor, keep: int) -> Tensor:
    """1 for the `keep` best of each group, a share of 1 for those that tie for the last places."""
    filled = torch.where(valid, rewards, torch.full_like(rewards, -torch.inf))
    places = valid.sum(-1, keepdim=True).clamp(min=1, max=keep)
    threshold = filled.sort(-1, descending=True).values.gather(-1, places - 1)
    above, tied = filled > threshold, filled == threshold
    left = (places - above.sum(-1, keepdim=True)).to(rewards.dtype)
    return above.to(rewards.dtype) + tied * (left / tied.sum(-1, keepdim=True))
