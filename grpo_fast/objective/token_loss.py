"""The objective of a configuration as one object: built once, called in torch, unpacked by the
kernels' launcher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from grpo_fast.config import LossConfig

from . import objectives


@dataclass(frozen=True)
class TokenLoss:
    """`loss, dloss/dlogp` of a token, without its weight: objective + beta [ratio] kl."""

    objective: Callable
    kl: Callable
    kl_gradient: Callable
    through_ratio: bool
    weight_kl: bool
    parameters: tuple[float, float, float, float]
    beta: float
    factor: Callable | None
    """What scales the advantage before; it takes the arguments of an objective, and its derivative
    by logp is -factor A."""

    def __call__(
        self, logp: Tensor, log_ratio: Tensor, ref_logp: Tensor | None, advantages: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """loss, its derivatives by logp and by log_ratio, ratio and kl, each (N,)."""
        return objectives.token_loss(
            logp,
            log_ratio,
            logp if ref_logp is None else ref_logp,
            advantages,
            *self.parameters,
            self.beta,
            self.objective,
            self.kl,
            self.kl_gradient,
            self.through_ratio,
            self.weight_kl,
            ref_logp is not None,
        )

    def scaled(self, ratio: Tensor, logp: Tensor, advantages: Tensor) -> Tensor:
        """factor * A."""
        _, slope = self.factor(ratio, logp, advantages, *self.parameters)
        return -slope

    @functools.cached_property
    def arguments(self) -> dict[str, object]:
        """The keywords of the policy row function."""
        return {
            "token_loss": objectives.token_loss,
            "objective": self.objective,
            "kl": self.kl,
            "kl_gradient": self.kl_gradient,
            "through_ratio": self.through_ratio,
            "weight_kl": self.weight_kl,
            "parameters": self.parameters,
            "beta": self.beta,
        }


@functools.lru_cache(maxsize=256)
def token_loss_of(config: LossConfig) -> TokenLoss:
    """The objective that a configuration names."""
    own = getattr(objectives, config.preset.objective)
    row, name = config.objective, config.objective.factor_of
    return TokenLoss(
        objective=own if name is None else getattr(objectives, name),
        kl=getattr(objectives, config.kl_estimator),
        kl_gradient=getattr(objectives, config.kl_gradient or config.kl_estimator),
        through_ratio=row.through_ratio,
        weight_kl=config.use_bias_correction_kl,
        parameters=config.parameters,
        beta=config.beta,
        factor=None if name is None else own,
    )
