"""What a call, or a step, costs before it runs."""

from .route import Facts, Plan, choose

__all__ = ["Facts", "Plan", "choose"]
