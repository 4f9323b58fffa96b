"""What a run keeps of its completions: text as rewards and people see it, and rows of a table."""

from __future__ import annotations

from typing import Any

from .sampler import is_conversational


def completion_of(prompt: Any, text: str) -> Any:
    """A completion as rewards see it: text, or an assistant message with the answer's prefill."""
    if not is_conversational(prompt):
        return text
    begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    return [{"role": "assistant", "content": begun + text}]


def table_of(
    step: int,
    prompts: list[Any],
    texts: list[str],
    rewards: dict[str, list[float]],
    advantages: list[float],
    extras: dict[str, list[Any]],
) -> list[dict[str, Any]]:
    """One row for each completion: step, prompt, completion, each reward, advantage, extras."""
    rows = []
    for i, text in enumerate(texts):
        row = {"step": step, "prompt": as_text(prompts[i]), "completion": text}
        row.update({name: values[i] for name, values in rewards.items()})
        row["advantage"] = advantages[i]
        row.update({column: values[i] for column, values in extras.items()})
        rows.append(row)
    return rows


def as_text(prompt: Any) -> str:
    """A prompt as a table shows it."""
    if not is_conversational(prompt):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
