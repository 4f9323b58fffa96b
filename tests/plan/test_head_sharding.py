"""What an lm_head moves over the ranks, gathered and split: by hand, and at the command line."""

import pytest

from grpo_fast.cli import plan
from grpo_fast.plan import head_traffic


def test_bytes_by_hand():
    found = head_traffic(1000, 64, 5000, 4)
    # three quarters of: V H in bf16 and back in fp32; N H likewise, and four statistics in fp32
    assert found.gathered_bytes == 3 * 5000 * 64 * (2 + 4) // 4
    assert found.vocabulary_bytes == 3 * (1000 * 64 * (2 + 4) + 1000 * 16) // 4
    assert found.gathered_held == 5000 * 64 * (2 + 4)
    assert found.vocabulary_held * 4 == found.gathered_held
    assert found.wins


@pytest.mark.parametrize("ranks", (2, 64))
def test_it_wins_below_the_break_even_and_loses_above(ranks):
    point = head_traffic(1, 4096, 151_936, ranks).break_even
    assert 0.99 * 151_936 < point < 151_936
    assert head_traffic(point, 4096, 151_936, ranks).wins
    assert not head_traffic(point + 1, 4096, 151_936, ranks).wins


def test_the_command_says_which(capsys):
    shape = ["--hidden", "64", "--vocab", "5000"]
    plan.run(["--tokens", "100", *shape])
    assert "head_sharding" not in capsys.readouterr().out
    plan.run(["--tokens", "100", *shape, "--ranks", "8"])
    assert "head_sharding='vocabulary' moves less" in capsys.readouterr().out
    plan.run(["--tokens", "1000", *shape, "--ranks", "8"])
    assert "head_sharding=None moves less" in capsys.readouterr().out


def test_one_rank_has_nothing_to_split():
    with pytest.raises(ValueError, match="ranks: expected at least 2"):
        head_traffic(10, 64, 5000, 1)
