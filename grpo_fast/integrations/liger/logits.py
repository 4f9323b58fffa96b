"""`triton_grpo_loss` of Liger-Kernel 0.8.5; import it from `grpo_fast.integrations.liger`."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from grpo_fast.checks import check_logits, check_tensor, describe, fail
from grpo_fast.engine.logprob import logprob
from grpo_fast.integrations.names import renamed
from grpo_fast.integrations.rollout_ratio import fold
from grpo_fast.loss.logits import policy_loss
from grpo_fast.objective.token_losses import token_losses
from grpo_fast.rows import flat_mask

from .options import denominator, loss_config

_NAMES = {"ids": "completion_ids", "mask": "completion_mask", "ratio": "vllm_is_ratio"}
_NAMES |= {"epsilon": "eps_low", "epsilon_high": "eps_high"}


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
):
    """`liger_kernel.transformers.grpo_loss.triton_grpo_loss`, on logits (B, L+1, V) whose last row
    predicts nothing.

    With reduce=True the loss of the whole call; inplace=True then writes the gradient over the
    logits (of no leaf) during this call, so read them before. num_items_in_batch, divided by the
    world size, is read by dapo, cispo and vespo; max_completion_length is L where it is None.

    Returns:
        reduce=True: (loss, [kl if beta, clip_ratio]); reduce=False: (per_token_loss, per_token_kl
        or None, is_clipped), each (B, L) fp32 and 0 where masked.
    """
    with renamed(_NAMES):
        ids, mask = _checked(logits, completion_ids, completion_mask)
        if max_completion_length is None:
            max_completion_length = max(ids.shape[1], 1)
        config = loss_config(
            loss_type,
            importance_sampling_level,
            use_bias_correction_kl,
            beta=beta,
            temperature=temperature,
            epsilon=eps_low,
            epsilon_high=eps_high,
            delta=delta,
            max_completion_length=max_completion_length,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
        )
        for name, value in (("old_logp", old_logp), ("ref_logp", ref_logp)):
            if value is not None:
                check_tensor(name, value, tuple(ids.shape), logits.device)
        # the last row is masked and not sliced away, whose backward would copy the gradient
        longer = {"mask": pad(mask, (0, 1))}

        def score() -> Tensor:
            rows = pad(ids, (0, 1))
            return logprob(logits, rows, temperature=temperature, **longer).logp[:, :-1]

        given = fold(config, mask, advantages, old_logp, vllm_is_ratio, score)
        given["ref_logp"] = ref_logp if beta else None
        if not reduce:
            out = token_losses(score(), config=config, mask=mask, **given)
            kl = out.kl * out.ratio if use_bias_correction_kl else out.kl
            return out.loss, kl if beta else None, out.clipped.to(out.loss.dtype)
        for name, value in given.items():
            whole = value is None or value.dim() == 1
            longer[name] = value if whole else pad(value, (0, 1))
        longer["denominator"] = denominator(config, mask, num_items_in_batch)
        longer["inplace"] = inplace and not logits.is_leaf
        loss, metrics = policy_loss(logits, pad(ids, (0, 1)), config=config, **longer)
    return loss, ([metrics["kl"]] if beta else []) + [metrics["clip_ratio"]]


def _checked(logits: Tensor, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    check_logits(logits)
    if logits.dim() != 3 or logits.shape[1] == 0:
        fail("logits", "tensor (B, L+1, V)", describe(logits))
    shape = (logits.shape[0], logits.shape[1] - 1)
    check_tensor("ids", ids, shape, logits.device, floating=False)
    return ids, flat_mask(mask, shape, logits.device).view(shape)
