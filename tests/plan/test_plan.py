"""The planner's rule, and `grpo-fast plan`."""

import pytest

from grpo_fast.cli.main import main
from grpo_fast.plan.route import ROUTES, Facts, choose

BASE = {
    "n_rows": 1200,
    "n_tokens": 1000,
    "n_unmasked": 1000,
    "n_gradient": 600,
    "longest": None,
    "H": 64,
    "V": 1000,
    "rank": 0,
    "itemsize": 4,
    "needs_hidden": True,
    "needs_weight": True,
    "needs_other": False,
    "per_sequence": False,
    "per_batch": False,
    "known": False,
    "fp16": False,
    "bonus": False,
    "top_share": 1.0,
    "chunk_rows": 512,
    "fixed": False,
    "columns_first": False,
}
SEQUENCE = {"per_sequence": True, "longest": 500}
FROZEN = {"needs_weight": False}


@pytest.mark.parametrize(
    "changed, route, nhv",
    [
        ({}, "one_pass", 2 + 4 * 0.6),
        (FROZEN, "one_pass", 2 + 2 * 0.6),
        ({"needs_hidden": False, "needs_weight": False}, "forward_only", 2),
        (SEQUENCE, "whole_sequences", 2 + 4 * 0.6),
        ({**SEQUENCE, "longest": 513}, "two_passes", 2 + 6 * 0.6),
        ({**SEQUENCE, "longest": 513, **FROZEN}, "frozen_head", 2 + 2 * 0.6),
        ({**SEQUENCE, "longest": 513, **FROZEN, "bonus": True}, "two_passes", 2 + 4 * 0.6),
        ({**SEQUENCE, "longest": 513, "known": True}, "known_derivative", 2 + 4 * 0.6),
        ({**SEQUENCE, "fixed": True, "longest": None}, "two_passes", 2 + 6 * 0.6),
        ({"fp16": True}, "two_passes", 2 + 6 * 0.6),
        ({"fp16": True, "known": True}, "known_derivative", 2 + 4 * 0.6),
        ({"per_batch": True, "top_share": 0.2}, "two_passes", 2 + 6 * 0.12),
        ({"per_batch": True, "top_share": 0.2, **FROZEN}, "two_passes", 2 + 4 * 0.12),
        ({"columns_first": True}, "two_passes", 2 + 6 * 0.6),
        ({"n_unmasked": 600}, "one_pass", 6 * 0.6),
    ],
)
def test_route_and_cost(changed, route, nhv):
    plan = choose(Facts(**{**BASE, **changed}))
    assert plan.route == route and route in ROUTES
    assert plan.nhv == pytest.approx(nhv)
    assert plan.flops == pytest.approx(nhv * 1000 * 64 * 1000, rel=1e-6)


def test_bytes():
    plan = choose(Facts(**BASE))
    assert plan.workspace_bytes == 512 * 1000 * 4
    assert plan.gradient_bytes == 4 * 64 * (1000 + 1200)
    assert plan.n_chunks == 2


def test_command_says_the_route(capsys):
    shape = "--tokens 8192 --hidden 4096 --vocab 151936 "
    for more, expected in (
        ("--active 0.5", ("one_pass", "4.00 NHV", "20.393 TFLOP", "4 of at most 2048 rows")),
        ("--frozen-head", ("one_pass", "4.00 NHV")),
        ("--no-grad", ("forward_only", "2.00 NHV")),
        ("--loss-type gspo --old-logp --longest 2048", ("whole_sequences", "6.00 NHV")),
        ("--loss-type gspo --old-logp", ("two_passes", "8.00 NHV", "8192 rows does not fit")),
        ("--loss-type vespo", ("known_derivative", "6.00 NHV")),
        ("--top-entropy-quantile 0.2", ("two_passes", "3.20 NHV", "entropies")),
        ("--beta 0.1 --active 0.1", ("one_pass", "6.00 NHV")),
        ("--workspace-bytes 500000000", ("one_pass", "6.00 NHV", "a product of all of them")),
        (
            "--workspace-bytes 500000000 --dtype fp32",
            ("two_passes", "8.00 NHV", "slices of the vocabulary"),
        ),
        ("--tokens 20000", ("one_pass", "held", "a product of 4096 rows", "in fp32")),
        ("--dtype fp16 --old-logp", ("two_passes", "fp16")),
        ("--lora-rank 16", ("one_pass", "adapter of rank 16")),
        ("--device cpu", ("one_pass", "of at most 512 rows")),
    ):
        assert main(["plan", *(shape + more).split()]) == 0
        out = capsys.readouterr().out
        assert all(text in out for text in expected), (more, out)


def test_command_reads_a_model(tmp_path, capsys):
    pytest.importorskip("transformers")
    from tiny_trainer import model

    model().save_pretrained(tmp_path)
    assert main(["plan", "--tokens", "100", "--model", str(tmp_path)]) == 0
    config = model().config
    assert f"H = {config.hidden_size}, V = {config.vocab_size}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--tokens 10 --hidden 8", "--vocab: expected a number, or --model, got nothing"),
        ("--tokens 0 --hidden 8 --vocab 9", "--tokens: expected at least 1, got 0"),
        ("--tokens 9 --hidden 8 --vocab 9 --active 2", "--active: expected a share from 0 to 1"),
        ("--tokens 9 --hidden 8 --model x", "--model: expected none beside --hidden"),
        ("--tokens 9 --hidden 8 --vocab 9 --workspace-bytes 1", "workspace_bytes: expected an"),
        ("--tokens 9 --hidden 8 --vocab 9 --loss-type ppo --level sequence", "token with ppo"),
        ("--tokens 9 --hidden 8 --vocab 9 --lora-rank -1", "--lora-rank: expected at least 0"),
    ],
)
def test_command_refuses(arguments, sentence, capsys):
    assert main(["plan", *arguments.split()]) == 2
    assert sentence in capsys.readouterr().err
