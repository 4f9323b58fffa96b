"""Rotary positions that depend on the longest sequence beside them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grpo_fast.checks import fail

# kinds whose frequencies change for the whole batch when one position passes a limit
_SHARED = ("longrope", "dynamic")


def shared_limit(lm: PreTrainedModel) -> int | None:
    """Tokens up to which a sequence keeps its own rotary frequencies whatever lies beside it.

    longrope (Phi-3, Phi-4) and dynamic NTK choose them by the largest position of the batch: a
    short completion beside a long one got log-probs that were 2.4 nats off. None: no such limit.
    """
    text = lm.config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # one for all layers, or one for each kind of layer
    each = [given, *(v for v in given.values() if isinstance(v, dict))]
    limits = [_limit(text, one) for one in each if _kind(one) in _SHARED]
    limits = [limit for limit in limits if limit]
    return min(limits) if limits else None


def _kind(parameters: dict[str, Any]) -> Any:
    return parameters.get("rope_type", parameters.get("type"))


def _limit(text: Any, parameters: dict[str, Any]) -> int | None:
    name = "original_max_position_embeddings"
    own = parameters.get(name) or getattr(text, name, None)
    return own or getattr(text, "max_position_embeddings", None)


def check_positions(
    lm: PreTrainedModel, position_ids: Tensor | None, several: bool = False
) -> None:
    """Refuse several sequences in one forward when one of them is longer than `shared_limit`.

    Args:
        lm: the model.
        position_ids: of the forward; a 0 is where a sequence begins.
        several: there are more sequences than zeros: completions of one prompt.

    Raises:
        ValueError: naming the limit and the longest sequence.
    """
    limit = shared_limit(lm)
    if limit is None or position_ids is None:
        return
    longest = int(position_ids.max()) + 1
    if longest > limit and (several or int((position_ids == 0).sum()) > 1):
        expected = (
            f"sequences of at most {limit} tokens beside others in {type(lm).__name__}, whose "
            "rotary frequencies are those of the longest"
        )
        fail("position_ids", expected, f"one of {longest}")
