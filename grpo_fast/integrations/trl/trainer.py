"""TRL: a GRPOTrainer whose loss is computed together with the head, and `patch_trl` for the
log-probs of all of TRL's trainers."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_fast import linear_policy_loss
from grpo_fast.models.policy import attach
from grpo_fast.objective.terms import TokenTerms

from . import metrics as trl_metrics
from . import options as trl_options
from .logprob import GRPOTrainer, patch_trl, unpatch_trl

__all__ = ["FastGRPOTrainer", "patch_trl", "unpatch_trl"]


class FastGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with its arguments, results and metrics, whose loss is one pass over the
    vocabulary (`linear_policy_loss`); rows without a gradient enter no backward product.

    Raises:
        ValueError: an option that the loss cannot honour; it is named.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, **kwargs: Any):
        if args is not None:
            # before a model is loaded
            trl_options.loss_config(args)
        super().__init__(model, reward_funcs, args, **kwargs)
        self.loss_config = trl_options.loss_config(self.args)
        self.measured: dict[str, list[dict[str, Tensor]]] = {"train": [], "eval": []}
        if self.aux_loss_enabled:
            raise ValueError("FastGRPOTrainer cannot honour router_aux_loss_coef: set it to 0.0.")
        if self._is_vlm:
            raise ValueError("FastGRPOTrainer cannot honour a ProcessorMixin: text models only.")
        attach(self.model)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        # by the operations of the loss, so that with equal weights the ratio is 1 and the KL 0
        with patch_trl():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        options = self._loss_options(inputs, mask)
        tokens: list[TokenTerms] = []

        def head_fn(hidden: Tensor, head: Any) -> Tensor:
            own = contextlib.nullcontext()
            if self.args.cast_lm_head_to_fp32:
                own = torch.autocast(hidden.device.type, enabled=False)
            hidden = hidden[:, -ids.size(1) - 1 : -1]
            given = {"mask": mask, "per_token": True, **options}
            with own:
                loss, _, found = linear_policy_loss(hidden, head, ids, **given)
            tokens.append(found)
            return loss

        with self.accelerator.autocast():
            loss = model(
                input_ids=torch.cat([inputs["prompt_ids"], ids], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                head_fn=head_fn,
            )
        mode = "train" if self.model.training else "eval"
        measured = trl_metrics.micro_batch(self, tokens[0], inputs, mask, loss.detach())
        self.measured[mode].append(measured)
        return loss

    def _loss_options(self, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        sampled = inputs.get("sampling_per_token_logps")
        if self.off_policy_mask_threshold is not None and sampled is not None and not corrected:
            raise ValueError(
                "FastGRPOTrainer cannot honour off_policy_mask_threshold with log-probs of the "
                "sampler but without vllm_importance_sampling_correction."
            )
        config, denominator = self.loss_config, trl_options.denominator(self, inputs, mask)
        if self.entropy_coef != 0.0:
            bonus = trl_options.entropy_coef(self, denominator, mask)
            config = replace(config, entropy_coef=bonus)
        advantages = inputs["advantages"]
        return {
            "advantages": advantages.view(-1) if advantages.size(-1) == 1 else advantages,
            "config": config,
            "denominator": denominator,
            "old_logp": inputs.get("old_per_token_logps"),
            "ref_logp": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            "rollout_logp": sampled if corrected else None,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        trl_metrics.flush(self, "train" if self.model.training else "eval")
        super().log(logs, start_time)
