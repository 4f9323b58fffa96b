"""What a reward model is worth: numbers of its scores on ranked sets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BINS = 10


def preference_metrics(scores: Tensor, ratings: Tensor, lengths: Tensor) -> dict[str, float]:
    """Metrics over the ordered pairs of ranked sets.

        accuracy          pairs whose better answer has the higher score; one half for equal ones
        longer_accuracy   the same of the rule "the longer answer is better"
        margin            mean of score_better - score_worse
        calibration       mean |accuracy - confidence| over ten bins of the confidence
                          sigmoid(|difference|), weighted by their pairs: 0 is perfect
        length_correlation  Pearson's, of score and length over all answers
        score_mean, score_std   over all answers

    Args:
        scores: (M, K), anything where there is no answer.
        ratings: (M, K), NaN where there is no answer.
        lengths: (M, K), tokens.
    """
    better = ratings[:, :, None] > ratings[:, None, :]
    gaps = (scores[:, :, None] - scores[:, None, :])[better].double()
    longer = (lengths[:, :, None] - lengths[:, None, :])[better].double()
    there = ~torch.isnan(ratings)
    every, sizes = scores[there].double(), lengths[there].double()
    return {
        "accuracy": _share(gaps),
        "longer_accuracy": _share(longer),
        "margin": gaps.mean().item() if len(gaps) else math.nan,
        "calibration": _calibration(gaps),
        "length_correlation": correlation(every, sizes),
        "score_mean": every.mean().item(),
        "score_std": every.std(correction=0).item(),
        "pairs": float(len(gaps)),
    }


def _share(gaps: Tensor) -> float:
    if not len(gaps):
        return math.nan
    return ((gaps > 0).double() + 0.5 * (gaps == 0).double()).mean().item()


def _calibration(gaps: Tensor) -> float:
    if not len(gaps):
        return math.nan
    sure = torch.sigmoid(gaps.abs())
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    # confidences lie in [0.5, 1]
    bins = ((sure - 0.5) * 2 * _BINS).long().clamp(max=_BINS - 1)
    total = 0.0
    for index in bins.unique():
        inside = bins == index
        total += abs((right[inside] - sure[inside]).sum().item())
    return total / len(gaps)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors; NaN where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a * b).sum().item() / scale if scale > 0 else math.nan
