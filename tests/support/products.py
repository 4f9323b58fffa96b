"""Products with the lm_head, counted by torch, in units of NHV over the unmasked tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss

B, T, H, V = 6, 320, 64, 300
LENGTHS = (320, 200, 90, 320, 320, 30)
# rows of a product are padded to a multiple of 16
PADDING = 16 / sum(LENGTHS)


def inputs(active: float, frozen: bool = False) -> dict:
    """A padded batch of which this share of the sequences' tokens has an advantage."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    advantages = torch.where(torch.rand(B, T, generator=g) < active, 1.0, 0.0)
    # exactly the share, of the unmasked tokens
    flat = mask.flatten().nonzero()[:, 0]
    keep = flat[torch.randperm(flat.numel(), generator=g)[: round(active * flat.numel())]]
    advantages = torch.zeros(B * T)
    advantages[keep] = 1.0
    return {
        "hidden": torch.randn(B, T, H, generator=g).requires_grad_(),
        "weight": (torch.randn(V, H, generator=g) / 8).requires_grad_(not frozen),
        "ids": torch.randint(V, (B, T), generator=g),
        "advantages": advantages.view(B, T),
        "mask": mask,
    }


def in_nhv(call: Callable) -> float:
    """FLOPs of a call and its backward over N H V."""
    with FlopCounterMode(display=False) as counter:
        out = call()
        if out[0].requires_grad:
            out[0].sum().backward()
    return counter.get_total_flops() / (sum(LENGTHS) * H * V)


def near_policy(case: dict) -> torch.Tensor:
    """Old log-probs at which no token is clipped."""
    with torch.no_grad():
        return linear_logprob(case["hidden"], case["weight"], case["ids"]).logp + 0.01


# name, loss type, share active, old log-probs given, frozen head, bound
TABLE = [
    ("trainable head, all active, on-policy", "dapo", 1.0, False, False, 6.1),
    ("trainable head, all active, old log-probs given", "dapo", 1.0, True, False, 6.1),
    ("sequence-level ratio, all active, on-policy", "gspo", 1.0, False, False, 6.1),
    ("sequence-level ratio, all active, old log-probs given", "gspo", 1.0, True, False, 6.1),
    ("a third of the tokens active", "dapo", 1 / 3, True, False, 3.5),
    ("frozen head, all active", "dapo", 1.0, True, True, 4.1),
    ("frozen head, sequence-level ratio, all active", "gspo", 1.0, True, True, 4.1),
    ("no active row", "dapo", 0.0, True, False, 2.1),
]


def measured(loss_type: str, active: float, use_old: bool, frozen: bool) -> float:
    """NHV of one row of the table."""
    case = inputs(active, frozen)
    old = near_policy(case) if use_old else None
    config = LossConfig(loss_type=loss_type)
    return in_nhv(lambda: linear_policy_loss(**case, old_logp=old, config=config))
