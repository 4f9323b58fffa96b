"""What a call, or a step, costs before it runs."""

from .route import ROUTES, Facts, Plan, choose

__all__ = ["ROUTES", "Facts", "Plan", "choose"]
