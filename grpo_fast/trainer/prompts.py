"""From a prompt to token ids, and from token ids to text: what tokenizers add and lack."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .sampler import is_conversational

logger = logging.get_logger(__name__)

_BEYOND = (
    "sampled token %d, which the tokenizer (%d tokens) has no text for: the embedding of the model "
    "is longer. Rewards read such a completion as if the token were not there."
)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, template: dict[str, Any]
) -> list[int]:
    """Token ids of a prompt that is to be continued.

    A text gets the tokenizer's special tokens, but for two: an end that the tokenizer appends,
    after which a model answers something else, and a begin beside one that is in the text already.
    Messages go through the chat template; an assistant's last message is continued.
    """
    if not is_conversational(prompt):
        return _open(tokenizer, prompt)
    answered = prompt[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        prompt,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=not answered,
        continue_final_message=answered,
        **template,
    )


def _open(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    ended = eos is not None and len(ids) > 1 and ids[-1] == eos
    doubled = bos is not None and ids[:2] == [bos, bos]
    if not ended and not doubled:
        return ids
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # what the text itself says stays
    written = next((i for i, token in enumerate(reversed(bare)) if token != eos), len(bare))
    while ended and len(ids) > max(written, 1) and ids[-written - 1] == eos:
        ids = ids[:-1]
    if doubled and bare[:1] == [bos] and bare[:2] != [bos, bos]:
        ids = ids[1:]
    return ids


def texts_of(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    """Completions as text, without special tokens; says once of a token that has none."""
    known = len(tokenizer)
    beyond = next((token for row in ids for token in row if token >= known), None)
    if beyond is not None:
        logger.warning_once(_BEYOND, beyond, known)
        ids = [[token for token in row if token < known] for row in ids]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
