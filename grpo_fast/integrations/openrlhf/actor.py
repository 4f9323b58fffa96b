"""OpenRLHF: the log-probs of its `Actor` by `linear_logprob`, and its policy loss by the rows of
`PRESETS`. `openrlhf_ray` applies `install` in Ray's workers."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from grpo_fast import linear_logprob
from grpo_fast.checks import fail
from grpo_fast.models.head import Head

from .head import check_engine, headless

__all__ = ["TESTED", "install", "uninstall"]

TESTED = ("0.11.2",)
_WORKS = f"grpo_fast.integrations.openrlhf works with openrlhf {' and '.join(TESTED)}"
try:
    from openrlhf.models import Actor, PolicyLoss
    from openrlhf.models.ring_attn_utils import gather_and_pad_tensor, unpad_and_slice_tensor

    from .loss import chosen

    _VERSION = metadata.version("openrlhf")
except (ImportError, AttributeError) as error:
    raise ImportError(f"{_WORKS} (pip install openrlhf=={TESTED[-1]}): {error}") from error
if _VERSION not in TESTED:
    warnings.warn(f"{_WORKS}; {_VERSION} is installed and untested.", stacklevel=2)

_STOCK = Actor.forward
# where the name PolicyLoss is read when a trainer is built
_HOLDERS = ("openrlhf.models", "openrlhf.models.loss", "openrlhf.trainer.ray.ppo_actor")


def _forward(
    self: Actor,
    sequences: Tensor,
    action_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: Any = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
    **mm_inputs: Any,
) -> Any:
    """`Actor.forward`; logits, images and ring attention are left to the stock one."""
    wants_logits = action_mask is None and not return_logprobs
    if wants_logits or getattr(self, "is_vlm", False) or ring_attn_group is not None:
        others = (allgather_logits, return_logprobs, ring_attn_group, packed_seq_lens)
        given = (sequences, action_mask, attention_mask, return_output, *others, return_entropy)
        return _STOCK(self, *given, **mm_inputs)
    _check(self, sequences, action_mask, attention_mask, return_output, return_entropy)
    B, L = sequences.shape
    # the last position predicts nothing
    kept = torch.zeros_like(sequences, dtype=torch.bool)
    kept[:, :-1] = True
    if action_mask is not None:
        kept[:, : L - 1 - action_mask.shape[1]] = False
        kept[:, L - 1 - action_mask.shape[1] : -1] = action_mask != 0
    if self.packing_samples:
        ids, positions, targets, _, rows = unpad_and_slice_tensor(sequences, attention_mask, None)
        kept, seen = kept.flatten()[rows][None], None
    else:
        ids, targets, seen = sequences, sequences.roll(-1, 1), attention_mask
        positions = (seen.long().cumsum(1) - 1).masked_fill(seen == 0, 1)

    def score(hidden: Tensor, head: Head) -> Tensor:
        more = {"temperature": self.temperature, "entropy": return_entropy}
        out = linear_logprob(hidden, head, targets, mask=kept, **more)
        return torch.stack((out.logp, out.entropy) if return_entropy else (out.logp,), -1)

    with headless(self.model, score):
        output = self.model(ids, attention_mask=seen, position_ids=positions, **mm_inputs)
    columns, output["logits"] = output["logits"].unbind(-1), None
    if self.packing_samples:
        columns = [gather_and_pad_tensor(c, None, 0, rows, B, L) for c in columns]
    if return_entropy:
        output.entropy = columns[1][:, :-1]
    logp = columns[0][:, :-1]
    if action_mask is not None:
        logp = logp[:, -action_mask.shape[1] :] * action_mask.float()
    return (logp, output) if return_output else logp


def _check(
    actor: Actor,
    sequences: Tensor,
    action_mask: Tensor | None,
    attention_mask: Tensor | None,
    return_output: bool,
    return_entropy: bool,
) -> None:
    """What cannot be honoured, by name, before any work."""
    B, L = sequences.shape
    if attention_mask is None or attention_mask.shape != (B, L):
        got = None if attention_mask is None else tuple(attention_mask.shape)
        fail("attention_mask", f"a tensor {(B, L)}", got)
    if action_mask is not None and not (len(action_mask) == B and action_mask.shape[1] < L):
        fail("action_mask", f"a tensor ({B}, A) with A < {L}", tuple(action_mask.shape))
    if return_entropy and not return_output:
        fail("return_entropy", "return_output=True with it", "return_output=False")
    check_engine(actor.model)


def install(loss_type: str | None = None, **options: Any) -> None:
    """Let every `Actor` of this process compute its log-probs and entropies with `linear_logprob`.

    It holds for actors that exist already; a PolicyLoss is replaced in trainers built afterwards.
    A second call replaces the first.

    Args:
        loss_type: a row of `PRESETS` for `PolicyLoss`; None keeps OpenRLHF's own loss.
        options: fields of `LossConfig` that OpenRLHF has no option for, as `epsilon_high`.

    Raises:
        ValueError: an option that cannot be honoured, or something else has replaced
            `Actor.forward`; it is named, and nothing is changed.
    """
    if loss_type is None and options:
        fail("loss_type", f"a name with {', '.join(options)}", None)
    loss = PolicyLoss if loss_type is None else chosen(loss_type, **options)
    _replace(_forward, loss)


def uninstall() -> None:
    """Give OpenRLHF its own forward and loss back; nothing happens when it has them.

    Raises:
        ValueError: something else has replaced `Actor.forward` since; it is left as it is.
    """
    _replace(_STOCK, PolicyLoss)


def _replace(forward: Any, loss: type) -> None:
    if Actor.forward not in (_STOCK, _forward):
        raise ValueError("Actor.forward has been replaced by something else; undo that first.")
    Actor.forward = forward
    for name in _HOLDERS:
        if name in sys.modules:
            sys.modules[name].PolicyLoss = loss
