"""Bradley-Terry and Plackett-Luce by hand, against each other, and a linear model's strengths."""

import math

import pytest
import torch

from grpo_fast.objective.preference import bradley_terry, centring, plackett_luce

NAN = math.nan
# drawn once, with what choix 0.4.1 makes of them
CHOIX_PAIRS = [
    (3, 4),
    (4, 3),
    (2, 3),
    (4, 1),
    (2, 0),
    (4, 1),
    (2, 0),
    (2, 0),
    (1, 4),
    (4, 3),
    (0, 2),
    (4, 0),
    (0, 3),
    (1, 2),
    (1, 0),
    (4, 1),
    (1, 3),
    (2, 3),
    (4, 2),
    (2, 4),
    (1, 4),
    (4, 2),
    (4, 3),
    (1, 2),
    (1, 0),
    (2, 3),
    (4, 1),
    (3, 0),
    (4, 2),
    (4, 1),
    (4, 3),
    (4, 3),
    (2, 0),
    (0, 3),
    (2, 1),
    (2, 0),
    (2, 1),
    (4, 0),
    (0, 1),
    (4, 0),
]
CHOIX_STRENGTHS = [
    -0.8063486793692995,
    0.3217307899980566,
    0.5343229784775202,
    -1.251040719919925,
    1.2013356308136482,
]
CHOIX_SETS = [
    [1, 0, 4, 3],
    [0, 4, 2],
    [1, 4],
    [0, 3, 4, 2],
    [0, 3, 2, 4],
    [0, 1, 4],
    [2, 4, 1, 0],
    [4, 3],
    [4, 0],
    [3, 1, 4, 2],
    [3, 1, 2, 0],
    [1, 4],
    [4, 2, 0],
    [3, 1, 0, 4],
    [3, 2, 4, 1],
    [2, 1, 4],
    [0, 3, 2, 4],
    [0, 2, 4],
    [3, 2],
    [2, 4, 3, 0],
    [2, 3, 4, 1],
    [0, 4, 2, 3],
    [2, 1, 0, 4],
    [3, 4, 2, 1],
    [3, 4],
    [0, 1, 3, 4],
    [1, 3, 2],
    [4, 0, 3],
    [2, 4, 1],
    [3, 1],
]
CHOIX_RANKED = [
    0.15661340514592215,
    -0.07549018479492317,
    -0.014749015616087227,
    0.32682098874375215,
    -0.3931951934786634,
]


def test_example_of_a_pair_by_hand():
    """a - b = 1: P = .73106, loss .31326; with a margin of 0.5 softplus(-0.5)."""
    scores, ratings = torch.tensor([[2.0, 1.0]]).double(), torch.tensor([[1.0, 0.0]])
    assert bradley_terry(scores, ratings).item() == pytest.approx(0.31326169, abs=1e-8)
    margins = torch.full((1, 2, 2), 0.5).double()
    expected = math.log1p(math.exp(-0.5))
    assert bradley_terry(scores, ratings, margins).item() == pytest.approx(expected, abs=1e-12)
    assert centring(scores, ratings).item() == 9.0


def test_sets_count_one_and_places_without_answers_nothing():
    torch.manual_seed(0)
    scores = torch.randn(3, 4, dtype=torch.float64)
    ratings = torch.tensor([[3.0, 1, 2, 0], [1, 0, NAN, NAN], [1, 1, 0, NAN]])
    scores[1, 2:] = NAN
    scores.requires_grad_()
    for loss in (bradley_terry, plackett_luce):
        got = loss(scores, ratings)
        pair = math.log1p(math.exp(-(scores[1, 0] - scores[1, 1]).item()))
        assert got[1].item() == pytest.approx(pair, abs=1e-12)
        (gradient,) = torch.autograd.grad(got.sum(), scores)
        assert torch.isfinite(gradient).all()
        assert gradient[1, 2:].eq(0).all() and gradient[2, 3] == 0
    pairs = [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3), (1, 3)]
    s = scores[0].tolist()
    by_hand = sum(math.log1p(math.exp(s[j] - s[i])) for i, j in pairs) / 6
    assert bradley_terry(scores, ratings)[0].item() == pytest.approx(by_hand, abs=1e-12)


def test_plackett_luce_by_hand():
    s = [0.3, -1.2, 2.0]
    order = [2, 0, 1]
    by_hand = -sum(
        s[i] - math.log(sum(math.exp(s[j]) for j in order[k:])) for k, i in enumerate(order)
    )
    scores = torch.tensor([s], dtype=torch.float64)
    got = plackett_luce(scores, torch.tensor([[1.0, 0.0, 2.0]]))
    assert got.item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("loss", [bradley_terry, plackett_luce, centring])
def test_ties_carry_nothing(loss):
    scores = torch.tensor([[5.0, -3.0, 0.0]], requires_grad=True)
    value = loss(scores, torch.ones(1, 3))
    value.sum().backward()
    assert value.item() == 0 and scores.grad.eq(0).all()


def test_strengths_of_choix():
    """The regularised maximum that `choix.opt_pairwise(5, data, alpha=0.1)` (0.4.1) finds."""
    minimise = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    wins = torch.tensor(CHOIX_PAIRS)
    optimizer = torch.optim.LBFGS(
        [minimise],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        scores = minimise[wins]
        ratings = torch.tensor([1.0, 0.0]).expand(len(wins), 2)
        total = bradley_terry(scores, ratings).sum() + 0.1 * minimise.square().sum()
        total.backward()
        return total

    optimizer.step(closure)
    torch.testing.assert_close(
        minimise.detach(), torch.tensor(CHOIX_STRENGTHS).double(), atol=1e-6, rtol=0
    )


def test_rankings_of_choix():
    """Sets of two to four, against `choix.opt_rankings(5, sets, alpha=0.1)`: Plackett-Luce."""
    strengths = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([one + [0] * (4 - len(one)) for one in CHOIX_SETS])
    ratings = torch.tensor(
        [[-float(k) if k < len(one) else NAN for k in range(4)] for one in CHOIX_SETS]
    )
    optimizer = torch.optim.LBFGS(
        [strengths],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        penalty = 0.1 * strengths.square().sum()
        total = plackett_luce(strengths[places], ratings).sum() + penalty
        total.backward()
        return total

    optimizer.step(closure)
    expected = torch.tensor(CHOIX_RANKED).double()
    torch.testing.assert_close(strengths.detach(), expected, atol=1e-6, rtol=0)
