"""The facts of a call, from its shape alone."""

from __future__ import annotations

import argparse
from dataclasses import fields

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.engine.chunks import COLUMNS_FIRST, chunk_size, round_up
from grpo_fast.engine.held import held_rows
from grpo_fast.objective.batch import needs_sequences
from grpo_fast.plan.route import Facts

_DTYPES = {"fp32": 4, "bf16": 4, "fp16": 4, "fp64": 8}


def facts_of_shape(asked: argparse.Namespace, H: int, V: int) -> Facts:
    """What the planner goes by, of the arguments of `grpo-fast plan`."""
    for name, value, low in (
        ("tokens", asked.tokens, 1),
        ("hidden", H, 1),
        ("vocab", V, 1),
        ("longest", asked.tokens if asked.longest is None else asked.longest, 1),
        ("lora-rank", asked.lora_rank, 0),
    ):
        if value < low:
            fail(f"--{name}", f"at least {low}", value)
    if not 0 <= asked.active <= 1:
        fail("--active", "a share from 0 to 1", asked.active)
    config = _config(asked)
    itemsize = _DTYPES[asked.dtype]
    _, rows = chunk_size(asked.workspace_bytes, V, H + asked.lora_rank, itemsize, asked.device)
    n, rows = asked.tokens, min(rows, round_up(asked.tokens))
    everything = config.beta > 0 or config.entropy_coef > 0
    active = n if everything else round(n * asked.active)
    per_sequence = needs_sequences(config, asked.rollout_logp)
    per_batch = config.top_entropy_quantile < 1.0
    on_policy = not (asked.old_logp or asked.rollout_logp or config.beta > 0)
    trains = not asked.no_grad
    weight = trains and not (asked.frozen_head or asked.lora_rank)
    waits = weight and asked.dtype == "bf16" and asked.device == "cuda"
    held = held_rows(active, rows, H) if waits else 0
    few = rows < COLUMNS_FIRST.get(asked.device, 0) and active > rows
    return Facts(
        n_rows=n,
        n_tokens=n,
        n_unmasked=n,
        n_gradient=active,
        longest=min(n, asked.longest or n) if per_sequence else None,
        H=H,
        V=V,
        rank=asked.lora_rank,
        itemsize=itemsize,
        needs_hidden=trains,
        needs_weight=weight,
        needs_other=trains and asked.lora_rank > 0,
        per_sequence=per_sequence,
        per_batch=per_batch,
        known=on_policy and not per_batch,
        fp16=asked.dtype == "fp16" and asked.device == "cuda",
        bonus=config.entropy_coef > 0,
        top_share=config.top_entropy_quantile,
        chunk_rows=rows,
        fixed=False,
        columns_first=weight and few and held == 0,
        held=held,
    )


def _config(asked: argparse.Namespace) -> LossConfig:
    known = {field.name for field in fields(LossConfig)}
    chosen = {name: value for name, value in vars(asked).items() if name in known}
    # a length that no product depends on
    return LossConfig(
        **chosen, importance_sampling_level=asked.level, epsilon_high=0.2, max_completion_length=1
    )
