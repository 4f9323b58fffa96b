"""What a sampler returns: prompts and their completions as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Rollouts:
    """P prompts with G completions each, prompt after prompt.

    Args:
        prompt_ids: P * G prompts, without padding.
        completion_ids: P * G completions: the EOS token included when it was sampled, and nothing
            after it.
        truncated: P * G flags, True where no EOS was sampled.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    truncated: list[bool]
