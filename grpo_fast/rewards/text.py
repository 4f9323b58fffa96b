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
    `\boxed{}`, together with those right before it (`\boxed{1}, \boxed{2}` has two parts); the line
    after the last `####`. A `</think>` ends the reasoning: what stands before
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
    boxes = last_boxes(text)
    if boxes is not None:
        return boxes.strip()
    if "####" in text:
        lines = text.rpartition("####")[2].strip().splitlines()
        return lines[0].strip() if lines else ""
    return text.strip()


def last_boxes(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` whose braces are balanced.

    When further ones stand right before it, with at most 40 characters of one line between them, it
    is all of them with commas: `\boxed{1}, \boxed{2}`.
    """
    # an answer has a limit, so the scan has one
    offset = max(0, len(text) - 5 * ANSWER_LIMIT)
    found = [(start, *_braces(text, end)) for start, end in _box_starts(text, offset)]
    boxes = [(start, begin, end) for start, begin, end in found if end >= 0]
    if not boxes:
        return None
    first = len(boxes) - 1
    while first > 0:
        gap = text[boxes[first - 1][2] + 1 : boxes[first][0]]
        if len(gap) > _GAP or "\n" in gap:
            break
        first -= 1
    contents = [text[begin:end] for _, begin, end in boxes[first:]]
    if len(contents) == 1:
        return contents[0]
    return ", ".join(f"\\boxed{{{content}}}" for content in contents)


_GAP = 40
# more boxes than an answer has parts are not read
_BOXES = 64


def _box_starts(text: str, offset: int) -> list[tuple[int, int]]:
    """(start, end) of the last openings of boxes, in order."""
    starts = []
    for name in ("\\boxed{", "\\fbox{"):
        position = len(text)
        while len(starts) < _BOXES:
            position = text.rfind(name, offset, position)
            if position < 0:
                break
            starts.append((position, position + len(name)))
    return sorted(starts)


def _braces(text: str, begin: int) -> tuple[int, int]:
    """Where the content of a brace that opened before `begin` begins and ends; end -1: nowhere."""
    depth = 1
    for position in range(begin, min(len(text), begin + ANSWER_LIMIT)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if not depth:
                return begin, position
    return begin, -1
