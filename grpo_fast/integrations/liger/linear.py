"""The GRPO losses of Liger-Kernel 0.8.5 by name: its arguments, defaults and results, computed by
grpo_fast. Nothing of liger_kernel is imported; docs/liger.md lists the differences."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.engine.logprob import linear_logprob
from grpo_fast.integrations.names import renamed
from grpo_fast.integrations.rollout_ratio import fold
from grpo_fast.loss.linear import linear_policy_loss

from .logits import triton_grpo_loss
from .options import denominator, loss_config

__all__ = ["LigerFusedLinearGRPOLoss", "triton_grpo_loss"]

_NAMES = {"hidden": "_input", "weight": "lin_weight", "ids": "selected_token_ids"}
_NAMES |= {"mask": "attention_mask", "epsilon": "epsilon_low", "ratio": "vllm_is_ratio"}
_NAMES |= {"old_logp": "old_per_token_logps", "ref_logp": "ref_per_token_logps"}
_REF = {"hidden": "ref_input", "weight": "ref_weight", "bias": "ref_bias"}


def _cast(weight: Tensor | None, hidden: Tensor) -> Tensor | None:
    """The weight in the dtype of its input, as in Liger's products."""
    keep = weight is None or torch.is_autocast_enabled(hidden.device.type)
    return weight if keep else weight.to(hidden.dtype)


@dataclass(eq=False, repr=False)
class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`; `compiled` and `chunk_size` have no
    effect. What Liger would only notice in a call is refused at construction."""

    beta: float = 0.04
    compiled: bool = True
    use_ref_model: bool = True
    chunk_size: int = 1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self):
        super().__init__()
        self._config()

    def _config(self) -> LossConfig:
        same = ("sapo_temperature_pos", "sapo_temperature_neg", "temperature", "delta")
        same += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
        more = {name: getattr(self, name) for name in (*same, "max_completion_length")}
        more |= {"epsilon": self.epsilon_low, "epsilon_high": self.epsilon_high}
        # without a reference model Liger's reference is the policy itself, whose KL is 0
        beta = self.beta if self.use_ref_model else 0.0
        level, weight_kl = self.importance_sampling_level, self.use_bias_correction_kl
        with renamed(_NAMES):
            return loss_config(self.loss_type, level, weight_kl, beta=beta, **more)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (kl if beta, clip_ratio)). `num_items_in_batch`, divided by the world size, is
        read by dapo, cispo and vespo."""
        config, ids, mask = self._config(), selected_token_ids, attention_mask
        weight, same = _cast(lin_weight, _input), {"mask": mask, "temperature": self.temperature}
        if self.use_ref_model and ref_per_token_logps is None and ref_input is None:
            fail("ref_per_token_logps", "them or ref_input with use_ref_model=True", None)
        if self.use_ref_model and ref_per_token_logps is not None and ref_input is not None:
            warnings.warn("ref_input: not used beside ref_per_token_logps.", stacklevel=2)
        ref = ref_per_token_logps if config.beta else None
        if config.beta and ref is None:
            with torch.no_grad(), renamed({**_NAMES, **_REF}):
                head = ref_input, _cast(ref_weight, ref_input)
                ref = linear_logprob(*head, ids, bias=ref_bias, **same).logp

        def score() -> Tensor:
            return linear_logprob(_input, weight, ids, bias=bias, **same).logp

        with renamed(_NAMES):
            given = fold(config, mask, advantages, old_per_token_logps, vllm_is_ratio, score)
            given |= {"mask": mask, "ref_logp": ref, "bias": bias, "config": config}
            given["denominator"] = denominator(config, mask, num_items_in_batch)
            loss, metrics = linear_policy_loss(_input, weight, ids, **given)
        kl = metrics.get("kl", torch.zeros_like(loss.detach()))
        return loss, ((kl,) if self.beta else ()) + (metrics["clip_ratio"],)
