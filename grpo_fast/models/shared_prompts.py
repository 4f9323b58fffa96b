"""One row of segments: sequences end to end, and prompts computed once for their completions.

A group of G completions of n tokens of one prompt of P tokens needs P + G n tokens of the backbone
instead of G (P + n). Log-probs and gradients are those of separate sequences: the prompt's hidden
states do not depend on what follows it, and autograd adds what all completions say of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_fast.checks import fail

from .attention import install
from .head import innermost
from .packing import (
    PackedBatch,
    check_attached,
    check_packing,
    check_sequences,
    default_row_length,
    pack,
    packing_error,
)

SHARING = ("auto", True, False)
# A shared prompt costs one more call of attention and a sum of two outputs, and saves P of every
# P + n tokens: less than this share of a group's tokens is not worth the call.
_WORTH = 1 / 16


def pack_segments(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    pad_id: int,
    share: str | bool,
    device: torch.device | str,
) -> PackedBatch:
    """Pack all sequences into one row without padding and without a mask.

    The last token of a completion is not fed to the model, nor is a prompt whose completion is
    empty, as in `pack`. Completions are grouped by their prompt's tokens, wherever they stand.

    Args:
        prompt_ids: S prompts, none empty.
        completion_ids: S completions, any of them possibly empty.
        pad_id: the only token of a row without any sequence.
        share: False: every sequence whole. True: a prompt of several completions once. "auto":
            where that saves at least 1/16 of their tokens.
        device: where the tensors are made.

    Raises:
        ValueError: no sequences, unequal numbers of them, an empty prompt, or an unknown `share`.
    """
    check_sequences(prompt_ids, completion_ids)
    if not any(share is known for known in (True, False)) and share != "auto":
        fail("share", "True, False or 'auto'", repr(share))
    groups: dict[tuple[int, ...], list[int]] = {}
    for s, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if completion:
            groups.setdefault(tuple(prompt), []).append(s)
    row = _Row()
    where: dict[int, Tensor] = {}
    for prompt, members in groups.items():
        completions = [completion_ids[s] for s in members]
        if _shared(len(prompt), completions, share):
            where.update(zip(members, row.add_group(prompt, completions), strict=True))
        else:
            for s in members:
                where[s] = row.add(prompt, completion_ids[s])
    if not row.tokens:
        row.segment([pad_id], -1, 0)
    nothing = torch.empty(0, dtype=torch.int64)
    bounds = torch.tensor([0, *map(len, completion_ids)]).cumsum(0)
    ids = torch.tensor([token for c in completion_ids for token in c], dtype=torch.int64)
    return PackedBatch(
        input_ids=torch.tensor([row.tokens]).to(device),
        position_ids=torch.cat(row.positions)[None].to(device),
        rows=torch.cat([nothing, *(where[s] for s in sorted(where))]).to(device),
        ids=ids.to(device),
        cu_seqlens=bounds.to(device),
        segments=torch.tensor(row.table),
    )


def _shared(prompt: int, completions: list[list[int]], share: str | bool) -> bool:
    """Whether a group's prompt is computed once."""
    if not share or len(completions) < 2:
        return False
    whole = sum(prompt + len(c) - 1 for c in completions)
    return share is True or prompt * (len(completions) - 1) >= _WORTH * whole


class _Row:
    """Tokens, positions and the table of segments of a row that grows."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[Tensor] = []
        self.table: list[tuple[int, int, int]] = []

    def segment(self, tokens: list[int], root: int, first: int) -> int:
        """Append a segment whose positions begin at `first`; returns where it starts."""
        start = len(self.tokens)
        self.table.append((start, len(tokens), root))
        self.tokens += tokens
        self.positions.append(torch.arange(first, first + len(tokens)))
        return start

    def add(self, prompt: tuple[int, ...], completion: list[int]) -> Tensor:
        """A whole sequence; returns the rows that predict its completion."""
        start = self.segment([*prompt, *completion[:-1]], -1, 0)
        return torch.arange(start + len(prompt) - 1, start + len(prompt) + len(completion) - 1)

    def add_group(self, prompt: tuple[int, ...], completions: list[list[int]]) -> list[Tensor]:
        """A prompt once, and its completions; returns the rows that predict each of them.

        All first tokens are predicted by the prompt's last row.
        """
        root = len(self.table)
        last = self.segment(list(prompt), -1, 0) + len(prompt) - 1
        rows = []
        for completion in completions:
            start, fed = len(self.tokens), completion[:-1]
            if fed:
                self.segment(fed, root, len(prompt))
            rows.append(torch.tensor([last, *range(start, start + len(fed))]))
        return rows


@dataclass(frozen=True)
class Packer:
    """How the sequences of a model are packed, once found out by `packer_of`.

    Args:
        pad_id: fills rows.
        row_length: tokens of a row, where rows are what position_ids describe: see `pack`.
        segments: whether the model takes rows of segments.
        share: whether prompts are shared: see `pack_segments`.
        window: tokens up to which a sequence may be in a row of segments: the smallest sliding
            window of the model; None: any number.
        native: the model's attention reads sequences in one row by itself without a mask, so that
            segments are only needed where a prompt is shared.
        reason: why the model does not take segments; empty where it does.
        multiple: rows without segments are padded up to a multiple of it.
    """

    pad_id: int
    row_length: int | None
    segments: bool = False
    share: str | bool = False
    window: int | None = None
    native: bool = False
    reason: str = ""
    multiple: int = 1

    def pack(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        device: torch.device | str,
    ) -> PackedBatch:
        """Pack each prompt with its completion, in the way that suits the model and the batch.

        Raises:
            ValueError: see `pack`.
        """
        if self.segments and not (self.native and not self.share):
            packed = pack_segments(
                prompt_ids, completion_ids, pad_id=self.pad_id, share=self.share, device=device
            )
            fits = self.window is None or packed.layout.longest <= self.window
            if fits and not (self.native and not packed.layout.links):
                return packed
        return pack(
            prompt_ids,
            completion_ids,
            pad_id=self.pad_id,
            row_length=self.row_length,
            multiple=self.multiple,
            device=device,
        )


def packer_of(model: nn.Module, pad_id: int, share: str | bool = "auto") -> Packer:
    """Find out how sequences can be packed for a model, and check it by running the model.

    Rows of segments are tried first: three groups of which two share a prompt against each sequence
    alone, by the gradient and the bounds of `check_packing`. Where the model does not pass, rows as
    position_ids describe them are checked by `check_packing` itself.

    Args:
        model: an attached model, wrapped or not.
        pad_id: fills rows.
        share: "auto", True or False; False still uses rows of segments, which need no mask.

    Raises:
        ValueError: the model cannot be packed at all; or `share` is True and it takes no segments.
    """
    check_attached(model)
    if not any(share is known for known in (True, False)) and share != "auto":
        fail("share_prompts", "True, False or 'auto'", repr(share))
    lm = innermost(model)
    config = lm.config.get_text_config(decoder=True)
    name = config._attn_implementation or "eager"
    row_length, window = default_row_length(model), _window(config)
    reason = _why_not(lm, name, window)
    if not reason:
        reason = _failed(model, pad_id)
    if reason and share is True:
        hint = "share_prompts='auto' trains it without."
        fail("share_prompts", "False for a model that cannot share prompts", reason, hint)
    if reason:
        check_packing(model, pad_id)
        return Packer(pad_id, row_length, reason=reason)
    native = "flash" in name
    return Packer(pad_id, row_length, True, share, window, native)


def _window(config: object) -> int | None:
    """The smallest window that any layer of a model may have."""
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    found = [value for value in found if isinstance(value, int) and value > 0]
    return min(found) if found else None


def _why_not(lm: nn.Module, name: str, window: int | None) -> str:
    """What can be known of a model without running it."""
    if any(
        isinstance(value, float) and value > 0
        for module in lm.modules()
        for attribute, value in vars(module).items()
        if "attention" in attribute and attribute.endswith("dropout")
    ):
        return "dropout in attention (disable_dropout=True switches it off)"
    if not install(name):
        return f"{name} attention (use sdpa, flash attention or flex attention)"
    if lm.device.type not in ("cpu", "cuda"):
        return f"a model on {lm.device.type}"
    if window is not None and window < 2:
        return f"a sliding window of {window} tokens"
    return ""


# two completions of one prompt, one of another, three of a third, with ends of one token
_PROMPTS = ((0, 4), (0, 4), (4, 6), (6, 11), (6, 11), (6, 11))
_COMPLETIONS = ((11, 14), (14, 20), (20, 24), (24, 25), (25, 29), (29, 31))


def _failed(model: nn.Module, pad_id: int) -> str:
    """Why a model cannot take a row of segments with shared prompts, by running it."""
    lm = innermost(model)
    vocab = lm.get_input_embeddings().num_embeddings
    tokens = [(5 + 3 * i) % vocab for i in range(31)]
    window = _window(lm.config.get_text_config(decoder=True))
    # within a window that is this small
    long = min(11, window or 11)
    prompts = [tokens[a : min(b, a + max(1, long // 2))] for a, b in _PROMPTS]
    completions = [tokens[a : min(b, a + max(1, long // 2))] for a, b in _COMPLETIONS]
    options = {"pad_id": pad_id, "device": lm.device}
    together = pack_segments(prompts, completions, share=True, **options)
    pairs = list(zip(prompts, completions, strict=True))
    alone = [pack([p], [c], row_length=None, **options) for p, c in pairs]
    # Boundary: whatever a family's own code does with a layout where it expects a mask, the answer
    # is that it cannot take one.
    try:
        _in_train_mode(model, together)
        return packing_error(model, together, alone)
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, ImportError) as error:
        return f"{type(lm).__name__}: {' '.join(str(error).split())[:300]}"


@torch.no_grad()
def _in_train_mode(model: nn.Module, batch: PackedBatch) -> None:
    """A forward as in training, where a layer may ask for dropout; no random number is used up."""
    resting = [module for module in model.modules() if not module.training]
    model.train()
    try:
        with torch.random.fork_rng():
            model(**batch.inputs(), head_fn=lambda hidden, head: None)
    finally:
        for module in resting:
            module.training = False
