"""Rewards of a group -> advantages, or weights of its completions; `ADVANTAGES` is the table of
estimators."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_fast.checks import nearest

SCALES = ("group", "batch", "none")
SCHEMES = ("linear", "softmax", "rank", "rejection")


def _checked(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The rewards in float32 or float64, and which of them are scorable."""
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(
            "rewards must be floating point of shape (P, G), "
            f"got {rewards.dtype} {tuple(rewards.shape)}."
        )
    if torch.isinf(rewards).any():
        raise ValueError("rewards must be finite or NaN (unscorable), got an infinite value.")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    return rewards, ~torch.isnan(rewards)


def _extremes(rewards: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest valid reward of each group, (P, 1); inf and -inf where there is none."""
    infinity = torch.full_like(rewards, torch.inf)
    highest = torch.where(valid, rewards, -infinity).amax(-1, keepdim=True)
    lowest = torch.where(valid, rewards, infinity).amin(-1, keepdim=True)
    return lowest, highest


def _telling(values: Tensor, rewards: Tensor, valid: Tensor) -> Tensor:
    """The values, exactly 0 for unscorable completions and groups without two different rewards."""
    lowest, highest = _extremes(rewards, valid)
    return torch.where(valid & (highest > lowest), values, torch.zeros_like(values))


def _moments(rewards: Tensor, valid: Tensor, population: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the last dimension of the valid entries, each (..., 1)."""
    count = valid.sum(-1, keepdim=True)
    filled = torch.where(valid, rewards, torch.zeros_like(rewards))
    mean = filled.sum(-1, keepdim=True) / count.clamp(min=1)
    gap = torch.where(valid, rewards - mean, torch.zeros_like(rewards))
    freedom = count if population else count - 1
    return mean, (gap.square().sum(-1, keepdim=True) / freedom.clamp(min=1)).sqrt()


def group_advantages(
    rewards: Tensor, scale: str = "group", *, eps: float = 1e-4, population: bool = False
) -> Tensor:
    """Advantages of groups of completions of one prompt.

        A = (r - mean_group(r)) / (std + eps)        std of the group, of the whole batch, or no
        division

    A group whose valid rewards are all equal (or that has fewer than two) gets exactly 0, so that
    it cannot train on rounding noise divided by eps.

    Args:
        rewards: (P, G) floating point; NaN marks an unscorable completion: it is left out of the
            mean and the std, and its advantage is 0.
        scale: "group" (DeepSeekMath: Pushing the Limits of Mathematical Reasoning, 2024), "batch"
            (Tricks or Traps? A Deep Dive into RL for LLM Reasoning, 2025) or "none" (Understanding
            R1-Zero-Like Training: A Critical Perspective, 2025).
        eps: added to the std; 1e-4 as in TRL.
        population: divide the squared deviations by n instead of n - 1.

    Returns:
        (P, G) advantages, float32 (float64 for float64 rewards).

    Raises:
        ValueError: rewards not (P, G) floating point, an infinite reward, an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}.")
    rewards, valid = _checked(rewards)
    mean, std = _moments(rewards, valid, population)
    if scale == "batch":
        _, std = _moments(rewards.reshape(1, -1), valid.reshape(1, -1), population)
    advantage = rewards - mean
    if scale != "none":
        advantage = advantage / (std + eps)
    return _telling(advantage, rewards, valid)


def centered_advantages(rewards: Tensor) -> Tensor:
    """A = r - mean_group(r): `group_advantages` without the division by the std.

    Source: Understanding R1-Zero-Like Training: A Critical Perspective (Dr. GRPO, 2025).

    Args:
        rewards: (P, G) floating point, NaN = unscorable, as for `group_advantages`.

    Returns:
        (P, G) advantages, float32 (float64 for float64 rewards).

    Raises:
        ValueError: rewards not (P, G) floating point, an infinite reward.
    """
    return group_advantages(rewards, "none")


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Every completion against the mean of the others of its group.

        A_i = r_i - mean(r_j for j != i) = n / (n - 1) * (r_i - mean_group(r))

    over the n scorable completions. The baseline does not depend on the completion it is taken
    from, so the gradient is unbiased. A group whose valid rewards are all equal (or that has fewer
    than two) gets exactly 0.
    Source: Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback
    in LLMs (RLOO, 2024).

    Args:
        rewards: (P, G) floating point; NaN marks an unscorable completion: it is in no baseline,
            and its advantage is 0.

    Returns:
        (P, G) advantages, float32 (float64 for float64 rewards).

    Raises:
        ValueError: rewards not (P, G) floating point, an infinite reward.
    """
    rewards, valid = _checked(rewards)
    count = valid.sum(-1, keepdim=True).to(rewards.dtype)
    mean, _ = _moments(rewards, valid, population=True)
    advantage = (rewards - mean) * (count / (count - 1).clamp(min=1))
    return _telling(advantage, rewards, valid)


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
        raise ValueError(
            f"{prefix}scheme: expected a known scheme, got {scheme!r}; {nearest(scheme, SCHEMES)}"
        )
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < math.inf:
        raise ValueError(f"{prefix}temperature must be a finite number > 0, got {temperature!r}.")
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise ValueError(f"{prefix}keep must be an integer >= 1, got {keep!r}.")
    for name, value, owner in (
        ("temperature", temperature, "softmax"),
        ("keep", keep, "rejection"),
    ):
        if value != 1 and scheme != owner:
            raise ValueError(
                f"{prefix}{name}: only the scheme {owner!r} has it, expected 1 with {scheme!r}, "
                f"got {value!r}."
            )


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
    rewards, valid = _checked(rewards)
    lowest, highest = _extremes(rewards, valid)
    if scheme == "linear":
        share = (rewards - lowest) / (highest - lowest)
    elif scheme == "softmax":
        # selected, because a tiny temperature is 0 in float32, and 0 / 0 is NaN
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
    share = _telling(share, rewards, valid)
    # 0 / 1 in a group that says nothing; above 0 in every other
    total = share.sum(-1, keepdim=True)
    return rewards.shape[1] * share / torch.where(total > 0, total, torch.ones_like(total))


def _best(rewards: Tensor, valid: Tensor, keep: int) -> Tensor:
    """1 for the `keep` best of each group, a share of 1 for those that tie for the last places."""
    filled = torch.where(valid, rewards, torch.full_like(rewards, -torch.inf))
    places = valid.sum(-1, keepdim=True).clamp(min=1, max=keep)
    threshold = filled.sort(-1, descending=True).values.gather(-1, places - 1)
    above, tied = filled > threshold, filled == threshold
    left = (places - above.sum(-1, keepdim=True)).to(rewards.dtype)
    return above.to(rewards.dtype) + tied * (left / tied.sum(-1, keepdim=True))


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "group": group_advantages,
    "centered": centered_advantages,
    "leave_one_out": leave_one_out_advantages,
    "reward_weights": reward_weights,
}


def check_estimator(name: str, argument: str = "name") -> None:
    """Refuse a name that is no key of `ADVANTAGES`.

    Args:
        name: of an estimator, such as `PRESETS[loss_type].advantage`.
        argument: what the message calls it.

    Raises:
        ValueError: an unknown name (the nearest one is suggested), or "given".
    """
    if name in ADVANTAGES:
        return
    if name == "given":
        raise ValueError(
            f"{argument}: 'given' stands for advantages of your own, which are not made of "
            f"rewards; expected one of {', '.join(ADVANTAGES)}."
        )
    raise ValueError(
        f"{argument}: expected a known estimator, got {name!r}; {nearest(name, list(ADVANTAGES))}"
    )


def advantages_of(name: str, rewards: Tensor, **options: object) -> Tensor:
    """Advantages by the name of their estimator: `ADVANTAGES[name](rewards, **options)`.

    Args:
        name: key of `ADVANTAGES`, such as `PRESETS["rloo"].advantage`.
        rewards: (P, G) floating point, NaN = unscorable.
        options: keywords of the estimator.

    Returns:
        (P, G) advantages (or weights), float32 (float64 for float64 rewards).

    Raises:
        ValueError: an unknown name (the nearest one is suggested), "given", and what the estimator
            raises.
    """
    check_estimator(name)
    return ADVANTAGES[name](rewards, **options)
