"""Attention over segments, by the kernels of torch's scaled_dot_product_attention.

    o_i = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   j over i's root and its own segment up to i

Both parts are attention without a mask: the tokens behind a root see all of it, and within a
segment the call is causal. Each part gives its output and its logsumexp, from which the whole is

    lse = log(exp(lse_1) + exp(lse_2)),   o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2

and in backward each part's kernel is given the o and lse of the whole. So all completions of a
group read one copy of the prompt's keys and values, and what is kept for backward is q, k, v, o
and lse of the T tokens (the decomposition of Ring Attention, 2023, and of cascade inference).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from grpo_fast.checks import fail

from .segments import Segments, active, check_call

_aten = torch.ops.aten
# what these kernels are part of, and what they take over
SDPA = "sdpa"
_FLASH = (torch.float16, torch.bfloat16)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(B, heads, n, D), (B, kv heads, m, D) -> o, lse (B, heads, n), and the kernel's own state."""
    if q.device.type == "cpu":
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, causal, scale=scale)
        return out, lse, ()
    if q.dtype in _FLASH:
        kernel = _aten._scaled_dot_product_flash_attention
        out, lse, _, _, _, _, seed, offset, _ = kernel(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse[..., : q.shape[2]], (seed, offset)
    k, v = (_repeat(x, q) for x in (k, v))
    kernel = _aten._scaled_dot_product_efficient_attention
    out, lse, seed, offset = kernel(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]], (seed, offset)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: tuple[Tensor, ...],
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from the output and the lse of the whole."""
    if q.device.type == "cpu":
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    lse = lse.contiguous()
    if q.dtype in _FLASH:
        kernel = _aten._scaled_dot_product_flash_attention_backward
        sizes = (None, None, q.shape[2], k.shape[2])
        return kernel(grad, q, k, v, out, lse, *sizes, 0.0, causal, *state, scale=scale)
    # this kernel wants rows of the lse that begin at multiples of 32 numbers
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    kernel = _aten._scaled_dot_product_efficient_attention_backward
    heads = k.shape[1]
    wanted = [True, True, True, False]
    many = [_repeat(x, q) for x in (k, v)]
    dq, dk, dv, _ = kernel(grad, q, *many, None, out, lse, *state, 0.0, wanted, causal, scale=scale)
    return dq, *(x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """The heads of keys or values as often as those of q, for a kernel without grouped heads."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _alone(x: Tensor, tokens: slice) -> Tensor:
    """(T, heads, D) -> (1, heads, n, D)."""
    return x[tokens].transpose(0, 1)[None]


class _OverSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = q.new_empty(q.shape[:2], dtype=wide)
        states = []
        for part in segments.bins(q.device):
            own, own_lse, state = _forward(*(part.take(x) for x in (q, k, v)), True, scale)
            part.put(out, own)
            part.put(lse, own_lse)
            states.append(state)
        for tokens, root in segments.links:
            over, over_lse, state = _forward(
                _alone(q, tokens), _alone(k, root), _alone(v, root), False, scale
            )
            _merge(out[tokens], lse[tokens], over[0].transpose(0, 1), over_lse[0].T)
            states.append(state)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale, ctx.states = segments, scale, states
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        segments, scale, states = ctx.segments, ctx.scale, iter(ctx.states)
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for part in segments.bins(q.device):
            upstream = part.take(grad)
            if part.kept is not None:
                # what stands in for padding has no gradient of its own
                real = torch.zeros(part.index.shape, dtype=torch.bool, device=q.device)
                real = real.index_fill_(0, part.kept, True).view(part.shape)[:, None, :, None]
                upstream = torch.where(real, upstream, torch.zeros_like(upstream))
            given = [part.take(x) for x in (q, k, v, out)]
            rows = part.take(lse[..., None])[..., 0]
            for into, values in zip(
                found, _backward(upstream, *given, rows, next(states), True, scale), strict=True
            ):
                part.put(into, values)
        for tokens, root in segments.links:
            given = (_alone(q, tokens), _alone(k, root), _alone(v, root), _alone(out, tokens))
            dq, dk, dv = _backward(
                _alone(grad, tokens), *given, lse[tokens].T[None], next(states), False, scale
            )
            for into, where, values in zip(found, (tokens, root, root), (dq, dk, dv), strict=True):
                into[where] += values[0].transpose(0, 1)
        return *found, None, None


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Into out (m, heads, D) and lse (m, heads): the attention over both parts' keys."""
    total = torch.logaddexp(lse, other_lse)
    share, rest = (torch.exp(x - total)[..., None] for x in (lse, other_lse))
    out.copy_(out * share + other * rest)
    lse.copy_(total)


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    """Attention of every token over its root and its own segment up to itself.

    Args:
        query: (1, heads, T, D), fp32 or half; float64 too on a CPU.
        key, value: (1, kv heads, T, D).
        segments: how the T tokens are divided.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        (1, T, heads, D) in the dtype of query, accumulated in fp32.

    Raises:
        ValueError: a device without these kernels, or heads that they do not take.
    """
    device = query.device.type
    if device not in ("cpu", "cuda"):
        fail("model", "one on a CPU or a CUDA device", device)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    width = query.shape[-1]
    aligned = device == "cpu" or (width % 8 == 0 and width <= 256)
    if key.shape[-1] != width or value.shape[-1] != width or not aligned:
        expected = "heads of one width, on CUDA a multiple of 8 up to 256"
        fail("model", expected, f"{width}, keys {key.shape[-1]}, values {value.shape[-1]}")
    tokens_first = (x[0].transpose(0, 1) for x in (query, key, value))
    with torch.autocast(device, enabled=False):
        return _OverSegments.apply(*tokens_first, segments, scale)[None]


def _over(original: Callable[..., Any], compute: Callable[..., Tensor]) -> Callable[..., Any]:
    """The registered function, which leaves rows of segments to `compute`."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> Any:
        if not isinstance(attention_mask, Segments):
            if options.get("layout") is not None:
                expected = "a backbone that runs under laid_out(layout), or an attached model"
                fail("layout", expected, f"{type(module).__name__} without it")
            return original(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                **options,
            )
        check_call(attention_mask, query, dropout, options)
        return compute(module, query, key, value, attention_mask, scaling), None

    attention.over_segments = True
    return attention


def _masks(original: Callable[..., Any], made: Callable[[Segments, Any], Any]) -> Callable:
    """The registered maker of masks, which returns the layout of a row of segments instead."""

    def mask(*args: Any, **options: Any) -> Any:
        segments = active()
        if segments is None:
            return original(*args, **options)
        window = options.get("local_size")
        if window is not None and segments.longest > window:
            expected = f"sequences of at most its window of {window} tokens in a row of segments"
            fail("model", expected, f"one of {segments.longest}")
        return made(segments, options.get("device"))

    mask.over_segments = True
    return mask


def _with_sdpa(module: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: Any):
    return segment_attention(q, k, v, segments, scale)


def install(name: str) -> bool:
    """Teach the attention implementation `name` of transformers to take rows of segments.

    Its registered functions are wrapped once in this process; calls without segments reach them
    unchanged. Returns False for an implementation that has no way to: eager, or a foreign kernel.
    """
    from .varlen import FLASH, FLEX, block_mask, with_flash

    kinds: dict[str, Callable[..., Tensor]] = {SDPA: _with_sdpa, **dict.fromkeys(FLASH, with_flash)}
    attentions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    if name not in (*kinds, FLEX) or name not in attentions or name not in masks:
        return False
    if name in kinds and not hasattr(attentions[name], "over_segments"):
        AttentionInterface.register(name, _over(attentions[name], kinds[name]))
    if not hasattr(masks[name], "over_segments"):
        made = block_mask if name == FLEX else lambda segments, device: segments
        AttentionMaskInterface.register(name, _masks(masks[name], made))
    return True
