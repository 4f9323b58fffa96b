"""The head behind verl's `use_fused_kernels`, with the soft cap, scale, bias and adapter of the
model, which verl's own leaves out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grpo_fast.checks import fail
from grpo_fast.engine.head import Head
from grpo_fast.engine.logprob import linear_logprob
from grpo_fast.integrations.names import renamed
from grpo_fast.models.head import backbone, find_head

from .losses import WORKS

try:
    from verl.models.transformers.dense_common import CausalLMOutputForPPO
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as _theirs
except (ImportError, AttributeError, RuntimeError) as error:
    raise ImportError(f"{WORKS}: {error}") from error

_NAMES = {"hidden": "hidden_states", "weight": "vocab_weights", "ids": "input_ids"}


def head_logprobs(
    hidden: Tensor, head: Head, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, both differentiable and fp32, shaped like ids."""
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(head.weight.dtype)
    with renamed(_NAMES):
        out = linear_logprob(hidden, head, ids.long(), temperature=temperature, entropy=True)
    return out.logp, out.entropy


class FusedLinearForPPO(nn.Module):
    """verl's module of that name, which its vision-language forwards call."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (T, H) or (B, T, H); log-probs and entropies shaped like input_ids."""
        return head_logprobs(hidden_states, Head(vocab_weights), input_ids, temperature)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of that name; results shaped like labels, or, as verl's, flat where those are
    not shaped like hidden. A vocabulary split over ranks (Megatron) goes to verl's own, and so does
    a reduction."""
    alone = dist_process_group is None or dist.get_world_size(dist_process_group) == 1
    if not alone or reduction != "none":
        return _theirs(hidden, weight, labels, temperature, reduction, dist_process_group)
    if labels.shape != hidden.shape[:-1]:
        hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    return head_logprobs(hidden, Head(weight), labels, temperature)


def fused_forward(
    self: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    temperature: float = 1.0,
    return_dict: bool | None = None,
    logits_to_keep: int = 0,
    **inputs: Any,
) -> CausalLMOutputForPPO:
    """Forward of a causal language model that returns log_probs and entropy in place of logits."""
    if not return_dict:
        fail("return_dict", "True", return_dict)
    if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
        fail("logits_to_keep", "0, since there are no logits", repr(logits_to_keep))
    if shift_labels is None:
        shift_labels = input_ids if labels is None else labels
        if shift_labels is None:
            fail("shift_labels", "shift_labels, labels or input_ids", None)
        shift_labels = shift_labels.roll(-1, dims=-1)
    inputs |= {"attention_mask": attention_mask, "position_ids": position_ids}
    given = {name: value for name, value in inputs.items() if value is not None}
    outputs = backbone(self)(input_ids=input_ids, return_dict=True, **given)
    head = find_head(self)
    logp, entropy = head_logprobs(outputs[0], head, shift_labels, temperature)
    kept = ("past_key_values", "hidden_states", "attentions")
    kept = {name: getattr(outputs, name, None) for name in kept}
    return CausalLMOutputForPPO(log_probs=logp, entropy=entropy, **kept)
