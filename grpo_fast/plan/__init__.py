"""What a call, or a step, costs before it runs."""

from .head_sharding import HeadTraffic, head_traffic
from .route import ROUTES, Facts, Plan, choose

__all__ = ["ROUTES", "Facts", "HeadTraffic", "Plan", "choose", "head_traffic"]
