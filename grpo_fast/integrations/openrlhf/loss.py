"""OpenRLHF's `PolicyLoss` with the objectives of grpo_fast and OpenRLHF's own mean over tokens."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.models.loss import PolicyLoss, aggregate_loss
from openrlhf.models.utils import masked_mean
from torch import Tensor

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.integrations.names import renamed
from grpo_fast.objective.token_losses import token_losses

from .options import check_options, loss_config

__all__ = ["FastPolicyLoss", "chosen"]

_NAMES = {"logp": "log_probs", "old_logp": "old_log_probs", "mask": "action_mask"}
_NAMES |= {"rollout_logp": "rollout_log_probs"}


class FastPolicyLoss(PolicyLoss):
    """`openrlhf.models.PolicyLoss` with its constructor, arguments and results, whose token losses
    come from `token_losses`. `chosen(loss_type, ...)` makes a class of it.

    Raises:
        ValueError: an option that the loss type cannot honour; it is named.
    """

    options: dict[str, Any] = {"loss_type": "dapo"}
    """What `install` was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_config: LossConfig = loss_config(self, **self.options)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio); the last two are None without a
        correction."""
        corrected = self.is_correction_level != "off"
        if corrected and rollout_log_probs is None:
            fail("rollout_log_probs", "them with is_correction_level other than off", None)
        if advantages.shape != log_probs.shape:
            fail("advantages", f"a tensor {tuple(log_probs.shape)}", tuple(advantages.shape))
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        with renamed(_NAMES):
            out = token_losses(
                log_probs,
                advantages.contiguous(),
                config=self.loss_config,
                mask=mask,
                old_logp=old_log_probs,
                rollout_logp=rollout_log_probs if corrected else None,
            )
        low, high = self.loss_config.ratio_bounds
        down, up = (out.ratio < low) & (advantages < 0), (out.ratio > high) & (advantages > 0)
        clip_ratio = masked_mean((down | up).float(), mask)
        ppo_kl = masked_mean((old_log_probs - log_probs).detach(), mask)
        vllm_kl = filtered = None
        if corrected:
            least, most = self.is_correction_threshold
            ratio = (old_log_probs - rollout_log_probs).exp()
            filtered = masked_mean(((ratio < least) | (ratio > most)).float(), mask)
            vllm_kl = masked_mean(rollout_log_probs - old_log_probs, mask)
        loss = self._mean(out.loss, mask, dp_size, batch_num_tokens, global_batch_size)
        return loss, clip_ratio, ppo_kl, vllm_kl, filtered

    def _mean(
        self,
        loss: Tensor,
        mask: Tensor,
        dp_size: int,
        tokens: float | Tensor | None,
        sequences: float | Tensor | None,
    ) -> Tensor:
        """OpenRLHF's `aggregate_loss`; a sum of tokens per sequence is its token mean with the
        count of the sequences in place of that of the tokens."""
        scheme = self.loss_config.weights
        if scheme in ("sequence_sum", "constant_length"):
            tokens = (mask.sum(-1) > 0).sum().clamp(min=1) if sequences is None else sequences
            if scheme == "constant_length":
                tokens = tokens * self.loss_config.max_completion_length
        return aggregate_loss(loss, mask, scheme != "sequence_mean", dp_size, tokens, sequences)


def chosen(loss_type: str, **options: Any) -> type[FastPolicyLoss]:
    """The class that computes one row of `PRESETS`, for constructors that pass what PolicyLoss
    takes.

    Args:
        loss_type: see `grpo_fast.config.PRESETS`.
        options: fields of `LossConfig` that OpenRLHF has no option for.

    Raises:
        ValueError: an option that is unknown, out of range or OpenRLHF's own; it is named.
    """
    check_options(loss_type, options)
    given = {"loss_type": loss_type, **options}
    return type("PolicyLoss", (FastPolicyLoss,), {"options": given, "__module__": __name__})
