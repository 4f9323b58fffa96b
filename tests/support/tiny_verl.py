"""Small batches and models in verl's own formats."""

from __future__ import annotations

import dataclasses

import torch
import transformers
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

PROMPTS = (3, 1, 4, 2, 2)
RESPONSES = (9, 1, 12, 5, 10)


def nested(parts: list[Tensor]) -> Tensor:
    """A jagged tensor of the parts."""
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


@dataclasses.dataclass
class Batch:
    """Log-probs (total,) of prompts and responses, and the TensorDict that verl's loss gets."""

    logp: Tensor
    entropy: Tensor
    data: TensorDict

    def output(self, dtype: torch.dtype, *, entropy: bool) -> tuple[dict[str, Tensor], Tensor]:
        """What a model gives, and the leaf behind its log-probs."""
        leaf = self.logp.detach().clone().to(dtype).requires_grad_()
        lengths = torch.tensor([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        out = {"log_probs": torch.nested.nested_tensor_from_jagged(leaf, offsets)}
        if entropy:
            values = self.entropy.to(dtype)
            out["entropy"] = torch.nested.nested_tensor_from_jagged(values, offsets)
        return out, leaf


def batch(*, seed: int = 0, token_advantages: bool = False, spread: float = 0.35) -> Batch:
    """Old log-probs near the policy's, so that ratios lie on both sides of their bounds; one
    advantage is 0, and a token inside a response is masked."""
    g = torch.Generator().manual_seed(seed)
    total = sum(PROMPTS) + sum(RESPONSES)
    logp = -torch.rand(total, generator=g) * 3 - 0.05
    draws = torch.tensor([1.3, -0.7, 0.0, -1.2, 0.6])
    old, ref, advantages, masks, weights, ids = [], [], [], [], [], ([], [])
    start = 0
    for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        own = logp[start + p - 1 : start + p + r - 1]
        old.append((own + spread * torch.randn(r, generator=g)).clamp(max=-0.01))
        ref.append((own + spread * torch.randn(r, generator=g)).clamp(max=-0.01))
        noise = torch.randn(r, generator=g) if token_advantages else torch.zeros(r)
        advantages.append(draws[i] + noise)
        mask = torch.ones(r)
        if r > 4:
            mask[2] = 0.0
        masks.append(mask)
        weights.append(torch.rand(r, generator=g) * 2)
        ids[0].append(torch.arange(p))
        ids[1].append(torch.arange(r))
        start += p + r
    fields = {"old_log_probs": old, "ref_log_prob": ref, "advantages": advantages}
    fields |= {"response_mask": masks, "rollout_is_weights": weights}
    fields |= {"prompts": ids[0], "responses": ids[1]}
    fields = {name: nested(parts) for name, parts in fields.items()}
    data = TensorDict(fields, batch_size=[len(PROMPTS)])
    return Batch(logp, torch.rand(total, generator=g), data)


def actor(loss_mode: str, **options: object) -> ActorConfig:
    """An actor's configuration with that policy loss."""
    given = {"strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 4}
    return ActorConfig(policy_loss=PolicyLossConfig(loss_mode=loss_mode), **given, **options)


def run(
    config: ActorConfig,
    case: Batch,
    *,
    weights: bool = False,
    window: dict[str, object] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """verl's `ppo_loss` and backward: loss, gradient of the log-probs (total,), metrics."""
    data = case.data.clone().to(dtype)
    if not weights:
        del data["rollout_is_weights"]
    window = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, **(window or {})}
    for name, value in window.items():
        tensordict_utils.assign_non_tensor_data(data, name, value)
    output, leaf = case.output(dtype, entropy=config.entropy_coeff != 0)
    loss, metrics = ppo_loss(config, output, data)
    loss.backward()
    plain = {}
    for name, value in metrics.items():
        plain[name] = value.aggregate() if hasattr(value, "aggregate") else value
    return loss.detach(), leaf.grad, plain


FAMILIES = {
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 5.0},
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.25},
    "Phi": {},
}


def model(family: str, **options: object) -> transformers.PreTrainedModel:
    """A causal language model of the family, whose logits are large enough to show its head."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    head = {"head_dim": 16} if family in ("Qwen3", "Gemma2") else {}
    if family in ("Phi", "Cohere"):
        sizes["num_key_value_heads"] = 2
    options = {**sizes, **head, "initializer_range": 0.5, **FAMILIES[family], **options}
    config = getattr(transformers, f"{family}Config")(**options)
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    bias = getattr(made.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return made
