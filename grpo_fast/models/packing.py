"""Many sequences in few rows: prompts and completions without padding between them.

A row holds whole sequences one after the other. `position_ids` start again at 0 for each, which is
how transformers knows where one ends, and only when `attention_mask` and the cache are None: with
either of them every sequence attends to its neighbours and nothing is said. `check_packing` runs
the model both ways once and refuses it when the two differ.

transformers then makes a mask of L x L numbers for each row, which every layer keeps for backward.
`pack` keeps L short, and gives long sequences rows of their own, which need no mask. Where the
model's attention takes them, `shared_prompts.pack_segments` makes one row without any mask instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_fast.checks import fail
from grpo_fast.engine.logprob import linear_logprob

from .head import Head, evaluating, innermost
from .policy import is_attached
from .segments import Segments

# Largest |difference| of hidden states, relative to the largest |hidden state|.
_BOUNDS = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
_BOUND_FP32 = 2e-3


@dataclass(frozen=True)
class PackedBatch:
    """S sequences packed into R rows of L tokens, with N completion tokens in all.

    Args:
        input_ids: (R, L) int64.
        position_ids: (R, L) int64, starting at 0 for each sequence and going on over the padding.
        rows: (N,) int64, index into the R * L hidden states of the one that predicts each token.
        ids: (N,) int64, the completion tokens, sequence after sequence in the caller's order.
        cu_seqlens: (S + 1,) int64, sequence s owns tokens cu_seqlens[s] to cu_seqlens[s + 1].
        segments: (K, 3) int64 on the CPU, the table of `Segments` where the one row is divided so;
            None: the rows are those that position_ids describe.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    ids: Tensor
    cu_seqlens: Tensor
    segments: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "segments"}
        moved = {name: value.to(device) for name, value in moved.items()}
        return PackedBatch(**moved, segments=self.segments)

    @cached_property
    def layout(self) -> Segments | None:
        """How the row is divided; None: as position_ids describe it."""
        return None if self.segments is None else Segments(self.segments.cpu())

    def body_inputs(self) -> dict[str, Any]:
        """Return the keywords of a backbone's forward, to be called under `laid_out(layout)`."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": None,
            "use_cache": False,
        }

    def inputs(self) -> dict[str, Any]:
        """Return the keywords of an attached model's forward, the two that must be off among them,
        and the layout where there is one."""
        layout = {} if self.layout is None else {"layout": self.layout}
        return {**self.body_inputs(), **layout}

    def select(self, hidden: Tensor) -> Tensor:
        """Return (N, H), the hidden states that predict `ids`, from hidden (R, L, H)."""
        return hidden.flatten(0, 1).index_select(0, self.rows)


def pack(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    pad_id: int,
    row_length: int | None,
    device: torch.device | str,
    multiple: int = 1,
) -> PackedBatch:
    """Pack each prompt with its completion, longest first, into the first row with room.

    A sequence longer than a row gives every sequence a row of its own: transformers then needs no
    mask, while rows as long as the longest would each have one of its length squared. The width of
    rows that hold several sequences is a multiple of 16, which the kernels that read a mask want.

    The last token of a completion predicts nothing and is not fed to the model, nor is a prompt
    whose completion is empty. Without any completion token the batch is one padding token, so
    that every rank still runs its forward.

    Args:
        prompt_ids: S prompts, none empty.
        completion_ids: S completions, any of them possibly empty.
        pad_id: token put behind the last sequence of a row.
        row_length: tokens of a row that holds several sequences. None puts all into one row, for
            flash attention, which knows sequences in a single row only.
        device: where the tensors are made.
        multiple: the tokens of a row are padded up to a multiple of it.

    Raises:
        ValueError: no sequences, unequal numbers of them, an empty prompt, or row_length < 1.
    """
    check_sequences(prompt_ids, completion_ids)
    if row_length is not None and row_length < 1:
        fail("row_length", "None or an integer >= 1", row_length)
    lengths = [
        len(p) + len(c) - 1 if c else 0 for p, c in zip(prompt_ids, completion_ids, strict=True)
    ]
    places, fills = _first_fit(lengths, row_length)
    width = max(1, *fills)
    unit = 16 if row_length is not None and len(places) > len(fills) else 1
    width += -width % math.lcm(unit, multiple)
    input_ids = torch.full((len(fills), width), pad_id, dtype=torch.int64)
    position_ids = torch.arange(width).repeat(len(fills), 1)
    for row, start in sorted(places.values()):
        # over the padding behind too: what starts again at 0 is a sequence, and needs a mask
        position_ids[row, start:] = torch.arange(width - start)
    rows, bounds = [torch.empty(0, dtype=torch.int64)], [0]
    for s, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        bounds.append(bounds[-1] + len(completion))
        if not completion:
            continue
        row, start = places[s]
        stop = start + lengths[s]
        input_ids[row, start:stop] = torch.tensor([*prompt, *completion[:-1]])
        rows.append(torch.arange(start + len(prompt) - 1, stop) + row * width)
    ids = torch.tensor([token for c in completion_ids for token in c], dtype=torch.int64)
    return PackedBatch(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        rows=torch.cat(rows).to(device),
        ids=ids.to(device),
        cu_seqlens=torch.tensor(bounds).to(device),
    )


def check_sequences(prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
    """Refuse sequences that cannot be packed.

    Raises:
        ValueError: none, unequal numbers of prompts and completions, or an empty prompt.
    """
    if not prompt_ids or len(prompt_ids) != len(completion_ids):
        expected = "one completion per prompt and at least one"
        fail("completion_ids", expected, f"{len(completion_ids)} for {len(prompt_ids)} prompts")
    for s, prompt in enumerate(prompt_ids):
        if not prompt:
            fail("prompt_ids", "at least one token", f"none in row {s}")


def _first_fit(
    lengths: list[int], row_length: int | None
) -> tuple[dict[int, tuple[int, int]], list[int]]:
    """First-fit decreasing: {sequence: (row, offset)} and the number of tokens in each row."""
    capacity = sum(lengths) if row_length is None else row_length
    if max(lengths) > capacity:
        # a row for each
        capacity = 0
    places: dict[int, tuple[int, int]] = {}
    fills = [0]
    for s in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        if not lengths[s]:
            continue
        fits = (r for r, fill in enumerate(fills) if not fill or fill + lengths[s] <= capacity)
        row = next(fits, None)
        if row is None:
            row = len(fills)
            fills.append(0)
        places[s] = (row, fills[row])
        fills[row] += lengths[s]
    return places, fills


def default_row_length(model: nn.Module) -> int | None:
    """Return the row length that suits the attention of the model.

    None for flash attention, whose cost does not grow with what else is in the row. The others
    compute all L * L pairs of a row: 2 * L * H multiply-adds per token and layer, beside about
    12 * H**2 in its projections, so L = H / 2 adds a twelfth, and more where attention is slower
    than a GEMM: on a CPU, SmolLM2-135M (H = 576) takes 1.3 times as long with rows of 512 as with
    256. Shorter rows waste more in padding. So: the power of two at or below H / 2, at least 256.
    """
    config = innermost(model).config.get_text_config(decoder=True)
    if "flash" in (config._attn_implementation or ""):
        return None
    return max(256, 1 << ((config.hidden_size // 2).bit_length() - 1))


def check_packing(model: nn.Module, pad_id: int) -> None:
    """Refuse a model that cannot hold several sequences in one row. Call it once, after `attach`.

    Three short sequences, in eval mode, on the way that training takes (`head_fn`):

    1. The gradient of the hidden states of one sequence with respect to the embeddings of another
       is exactly zero, in any dtype. Nothing that leaks is too small for this.
    2. Their hidden states are those of the same sequences alone, within 2e-3 (fp32), 2e-2 (fp16)
       or 1e-1 (bf16) of the largest. This finds positions that do not start again at 0.

    Raises:
        ValueError: one of them fails, and by how much. Models with a recurrent state fail (Mamba,
            Falcon-H1, RecurrentGemma, ...), as do those that do not look at `position_ids`.
    """
    check_attached(model)
    lm = innermost(model)
    vocab = lm.get_input_embeddings().num_embeddings
    tokens = [(5 + 3 * i) % vocab for i in range(24)]
    prompts = [tokens[0:4], tokens[4:6], tokens[6:11]]
    completions = [tokens[11:14], tokens[14:20], tokens[20:24]]
    options = {"pad_id": pad_id, "device": lm.device}
    options["row_length"] = None if default_row_length(model) is None else 16
    together = pack(prompts, completions, **options)
    pairs = zip(prompts, completions, strict=True)
    alone = [pack([p], [c], **options) for p, c in pairs]
    error = packing_error(model, together, alone)
    if error:
        raise ValueError(
            f"model: {type(lm).__name__} ({lm.config._attn_implementation} attention) cannot be "
            f"packed: {error}. Use a model with attention only, whose layers honour position_ids, "
            "and sdpa, eager or flash attention"
        )


def packing_error(model: nn.Module, together: PackedBatch, alone: list[PackedBatch]) -> str:
    """What is wrong with sequences packed together, measured against each alone; empty: nothing."""
    lm = innermost(model)
    with evaluating(model):
        leak = _leak(lm, together)
        with torch.no_grad():
            packed = _selected_hidden(model, together)
            separate = torch.cat([_selected_hidden(model, one) for one in alone])
    error = ((packed - separate).abs().max() / packed.abs().max()).item()
    allowed = _BOUNDS.get(lm.dtype, _BOUND_FP32)
    # `not <=` and not `>`, so that a NaN is refused too.
    if leak == 0 and error <= allowed:
        return ""
    return (
        "in a row with others, the hidden states of a sequence have a gradient of "
        f"{leak:.3g} with respect to its neighbours (expected 0) and differ from those of the "
        f"sequence alone by {error:.3g} of the largest ({allowed:.2g} allowed)"
    )


def check_attached(model: nn.Module) -> None:
    """Refuse a model that does not take `head_fn`."""
    # transformers swallows keywords that it does not know, and would return logits.
    if not is_attached(model):
        fail("model", "one that takes head_fn", type(model).__name__, "call attach(model) first.")


def _selected_hidden(model: nn.Module, batch: PackedBatch) -> Tensor:
    def select(hidden: Tensor, head: Head) -> Tensor:
        return batch.select(hidden).float()

    return model(**batch.inputs(), head_fn=select)


def _leak(lm: PreTrainedModel, batch: PackedBatch) -> float:
    """Largest gradient of one sequence's hidden states with respect to another's embeddings."""
    leaves: list[Tensor] = []

    def as_leaf(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = lm.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        with torch.enable_grad():
            hidden = _selected_hidden(lm, batch)
    finally:
        handle.remove()
    # A plain sum would have no gradient behind a LayerNorm.
    probe = hidden * torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)
    worst = 0.0
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        score = probe[start:stop].sum()
        (gradient,) = torch.autograd.grad(score, leaves[-1], retain_graph=True)
        others = _others(batch, batch.rows[start:stop])
        worst = max(worst, gradient.flatten(0, 1)[others].abs().max().item())
    return worst


def _others(batch: PackedBatch, rows: Tensor) -> Tensor:
    """Which of the R * L tokens are not in the sequence whose hidden states are at `rows`."""
    if batch.layout is not None:
        tokens = torch.arange(batch.layout.tokens, device=rows.device)
        return ~batch.layout.sees(rows[-1], tokens)
    segment = (batch.position_ids == 0).flatten().cumsum(0)
    return segment != segment[rows[0]]


@torch.no_grad()
def completion_logprobs(
    model: nn.Module,
    batch: PackedBatch,
    temperature: float,
    entropy: bool = False,
    workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each completion token, without gradients.

    Args:
        model: an attached model, wrapped or not. Its train or eval mode is left as it is.
        batch: from `pack`.
        temperature: the logits are divided by it.
        entropy: whether to return the entropy of each distribution too.
        workspace_bytes: see `linear_logprob`.

    Returns:
        logp (N,) fp32 in nats; with `entropy` the pair (logp, entropy), both (N,) fp32.

    Raises:
        ValueError: the model is not attached.
    """
    check_attached(model)

    def score(hidden: Tensor, head: Head) -> Tensor | tuple[Tensor, Tensor]:
        out = linear_logprob(
            batch.select(hidden),
            head,
            batch.ids,
            temperature=temperature,
            entropy=entropy,
            workspace_bytes=workspace_bytes,
        )
        return (out.logp, out.entropy) if entropy else out.logp

    return model(**batch.inputs(), head_fn=score)
