"""`Render`: a prompt and a completion as the token ids that a reward model is trained on and reads.

Its settings are saved in the configuration of the model, so that whoever loads it reads the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from grpo_fast.checks import fail

# attribute of the model's configuration
KEY = "grpo_fast_render"


@dataclass(frozen=True)
class Render:
    """ids = tokenizer(prompt + completion), or tokenizer(template(prompt messages + completion)).

    No special tokens are added: it is what TRL's GRPOTrainer feeds a reward model.

    Args:
        append_eos: put the end token behind a text that does not end with it. TRL and plain
            transformers do not know of it.
        max_length: tokens at most; None: what the model can read.
        truncate: keep the last `max_length` tokens of a longer one, instead of refusing it.
    """

    append_eos: bool = False
    max_length: int | None = None
    truncate: bool = False

    @classmethod
    def of(cls, config: Any) -> Render:
        """The settings that a model's configuration holds, or the defaults."""
        return cls(**(getattr(config, KEY, None) or {}))

    def to(self, config: Any) -> None:
        """Write the settings into a model's configuration."""
        setattr(config, KEY, asdict(self))

    def __call__(self, tokenizer: Any, prompt: Any, completion: Any, **template: Any) -> list[int]:
        """Token ids of one prompt with one completion, both texts or both lists of messages.

        template: further arguments of the chat template.

        Raises:
            ValueError: nothing is left to read, or more than `max_length` tokens.
        """
        if isinstance(prompt, str):
            text = prompt + completion
        else:
            if prompt and prompt[-1]["role"] == "assistant":
                # the completion repeats the turn that the prompt begins
                prompt = prompt[:-1]
            messages = [*prompt, *completion]
            text = tokenizer.apply_chat_template(messages, tokenize=False, **template)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        end = tokenizer.eos_token_id
        if self.append_eos and end is not None and ids[-1:] != [end]:
            ids.append(end)
        if not ids:
            fail("completion", "at least one token with its prompt", "none")
        if self.max_length is not None and len(ids) > self.max_length:
            if not self.truncate:
                hint = "raise max_length, or set truncate=True to keep the end of such texts"
                fail("completion", f"at most {self.max_length} tokens", len(ids), hint)
            ids = ids[-self.max_length :]
        return ids
