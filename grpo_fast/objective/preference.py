"""Losses of ranked answers: Bradley-Terry over ordered pairs, Plackett-Luce over whole sets.

A set is one prompt with K answers. It is a row of (M, K) tensors; places behind the last answer of
a shorter set hold NaN in `ratings`, and nothing is computed from them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from grpo_fast.checks import fail


def ordered_pairs(ratings: Tensor) -> Tensor:
    """(M, K, K) bool, true where answer i of a set is rated above answer j; NaN is above nothing.

    Args:
        ratings: (M, K) floating, higher is better, NaN where there is no answer.
    """
    return ratings[:, :, None] > ratings[:, None, :]


def bradley_terry(scores: Tensor, ratings: Tensor, margins: Tensor | None = None) -> Tensor:
    """Mean over the ordered pairs of each set, of which every set counts one.

        loss_m = mean over (i, j) with ratings_i > ratings_j of
                 softplus(-(scores_i - scores_j - margin_ij))

    Bradley and Terry, 1952; all pairs of a set together as in InstructGPT (Ouyang et al., 2022).
    Answers of one rating are no pair and carry nothing.

    Args:
        scores: (M, K) floating, what the reward model says; places without an answer may hold
            anything.
        ratings: (M, K), see `ordered_pairs`.
        margins: (M, K, K) floating, how far apart a pair should be; None: 0.

    Returns:
        (M,) in float32 or wider; 0 for a set without a pair.

    Raises:
        ValueError: for shapes that do not fit.
    """
    better = _pairs(scores, ratings)
    gaps = _gaps(scores)
    if margins is not None:
        if margins.shape != better.shape:
            fail("margins", f"a tensor {tuple(better.shape)}", tuple(margins.shape))
        gaps = gaps - margins
    return _mean_of_pairs(softplus(-_chosen(gaps, better)), better)


def plackett_luce(scores: Tensor, ratings: Tensor) -> Tensor:
    """Negative log-likelihood of each set's ranking.

        loss_m = - sum_i [ scores_i - log( e^scores_i + sum over j rated below i of e^scores_j ) ]

    Luce, 1959; Plackett, 1975. Answers of one rating do not compete: each meets those below it. A
    set of two is the pair of `bradley_terry` with margin 0.

    Args:
        scores: (M, K) floating.
        ratings: (M, K), see `ordered_pairs`.

    Returns:
        (M,) in float32 or wider; 0 for a set whose answers are all rated alike.

    Raises:
        ValueError: for shapes that do not fit.
    """
    below = _pairs(scores, ratings)
    # of e^(s_j - s_i) over those below, and 1 for the answer itself
    gaps = -_chosen(_gaps(scores), below)
    lowest = torch.finfo(gaps.dtype).min
    gaps = torch.where(below, gaps, torch.full_like(gaps, lowest))
    itself = gaps.new_zeros((*gaps.shape[:2], 1))
    each = torch.cat([itself, gaps], dim=-1).logsumexp(-1)
    return torch.where(below.any(-1), each, torch.zeros_like(each)).sum(-1)


def centring(scores: Tensor, ratings: Tensor) -> Tensor:
    """(M,), the mean over the ordered pairs of a set of (scores_i + scores_j)^2, which keeps the
    scores around 0 (Eisenstein et al., 2023).

    Raises:
        ValueError: for shapes that do not fit.
    """
    better = _pairs(scores, ratings)
    scores = _wide(scores)
    total = _chosen(scores[:, :, None] + scores[:, None, :], better)
    return _mean_of_pairs(total.square(), better)


PREFERENCE_LOSSES = {"bradley_terry": bradley_terry, "plackett_luce": plackett_luce}


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _gaps(scores: Tensor) -> Tensor:
    scores = _wide(scores)
    return scores[:, :, None] - scores[:, None, :]


def _pairs(scores: Tensor, ratings: Tensor) -> Tensor:
    if scores.dim() != 2 or scores.shape != ratings.shape:
        got = f"{tuple(scores.shape)} beside ratings {tuple(ratings.shape)}"
        fail("scores", "a tensor (M, K) shaped like ratings", got)
    return ordered_pairs(ratings)


def _chosen(values: Tensor, pairs: Tensor) -> Tensor:
    # selected and not multiplied: a place without an answer may hold NaN
    return torch.where(pairs, values, torch.zeros_like(values))


def _mean_of_pairs(values: Tensor, pairs: Tensor) -> Tensor:
    total = _chosen(values, pairs).sum((1, 2))
    return total / pairs.sum((1, 2)).clamp(min=1)
