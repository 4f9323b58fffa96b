"""The arguments of the policy row function, by the names of its parts."""

from grpo_fast.objective import objectives
from grpo_fast.presets import OBJECTIVES


def arguments(objective: str, kl: str, kl_gradient: str, parameters, beta: float) -> dict:
    """What `policy` is given of `objectives.py`."""
    return {
        "token_loss": objectives.token_loss,
        "objective": getattr(objectives, objective),
        "kl": getattr(objectives, kl),
        "kl_gradient": getattr(objectives, kl_gradient),
        "through_ratio": OBJECTIVES[objective].through_ratio,
        "weight_kl": True,
        "parameters": parameters,
        "beta": beta,
    }
