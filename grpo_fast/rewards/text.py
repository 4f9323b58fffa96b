"""Texts of completions: what was said, tags, the final answer; all in linear time."""

from __future__ import annotations

from typing import Any

# an answer is short; what is longer is none, and parsers never see it
ANSWER_LIMIT = 2_000


def text_of(completion: Any) -> str:
    """The text of a completion: a string, or the last message of a conversation.

    A message's content may be a text, a list of parts of which the texts count, or None.
    """
    if isinstance(completion, str):
        return completion
    last = completion[-1] if isinstance(completion, (list, tuple)) and completion else completion
    content = last.get("content") if isinstance(last, dict) else None
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def sections(text: str, tags: tuple[str, ...], begun: bool = False) -> list[str] | None:
    """The contents of `<a>..</a> <b>..</b>`, when the text is that and nothing else.

    Each tag opens once and closes once, in order and without nesting; between and around them is
    white space alone. After the last of several tags nothing may come; after a single tag the rest
    of the text is the answer, and the last of the contents returned.

    Args:
        tags: names, in order.
        begun: the prompt has opened the first tag already.

    Returns:
        The contents, or None when the text has another form.
    """
    for index, tag in enumerate(tags):
        opened = 0 if begun and index == 0 else 1
        if text.count(f"<{tag}>") != opened or text.count(f"</{tag}>") != 1:
            return None
    contents, position = [], 0
    for index, tag in enumerate(tags):
        start = position
        if not (begun and index == 0):
            start = text.find(f"<{tag}>", position)
            if start < 0 or text[position:start].strip():
                return None
            start += len(tag) + 2
        end = text.find(f"</{tag}>", start)
        if end < 0 or any(f"<{other}>" in text[start:end] for other in tags):
            return None
        contents.append(text[start:end])
        position = end + len(tag) + 3
    rest = text[position:]
    if len(tags) == 1:
        return [*contents, rest]
    return None if rest.strip() else contents


def final_answer(text: str, tag: str = "answer") -> str | None:
    r"""The answer of a completion, or None.

    In this order: what stands in the only `<answer>` pair (several of them are no answer); the last
    `\boxed{}`; the line after the last `####`. A `</think>` ends the reasoning: what stands before
    it is not looked at. Without any of these the whole text after the reasoning is the answer.
    """
    text = text.rpartition("</think>")[2]
    opened, closed = text.count(f"<{tag}>"), text.count(f"</{tag}>")
    if opened or closed:
        if opened != 1 or closed != 1:
            return None
        before, _, rest = text.partition(f"<{tag}>")
        content, found, _ = rest.partition(f"</{tag}>")
        text = content
        if not found:
            return None
    inner = last_boxed(text)
    if inner is not None:
        return inner.strip()
    if "####" in text:
        lines = text.rpartition("####")[2].strip().splitlines()
        return lines[0].strip() if lines else ""
    return text.strip()


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` whose braces are balanced."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    # an answer has a limit, so the scan has one
    for position in range(begin, min(len(text), begin + ANSWER_LIMIT)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if not depth:
                return text[begin:position]
    return None
