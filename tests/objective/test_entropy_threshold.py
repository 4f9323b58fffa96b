"""The entropy above which the top share of the tokens lies."""

import numpy as np
import pytest
import torch

from grpo_fast.objective import corrections
from grpo_fast.objective.corrections import entropy_threshold


@pytest.mark.parametrize("limit", [0, 1 << 24])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 1001])
def test_both_ways_to_a_quantile_are_numpys(n, share, limit, monkeypatch):
    monkeypatch.setattr(corrections, "_QUANTILE_LIMIT", limit)
    torch.manual_seed(0)
    entropy, mask = torch.rand(n) * 5, torch.rand(n) < 0.7
    mask[0] = True
    entropy[~mask] = 100.0
    want = np.quantile(entropy[mask].double().numpy(), 1 - share)
    assert entropy_threshold(share, entropy, mask).item() == pytest.approx(want, rel=1e-6)
    assert entropy_threshold(share, entropy, torch.zeros_like(mask)).isnan()


def test_more_tokens_than_torch_takes_a_quantile_of():
    n = (1 << 24) + 5
    entropy = torch.arange(n, dtype=torch.float64)[torch.randperm(n)].float()
    got = entropy_threshold(0.25, entropy, torch.ones(n, dtype=torch.bool))
    assert got.item() == pytest.approx(0.75 * (n - 1), rel=1e-7)
