"""What every launch of a row kernel is given, written once."""

import torch

# Row counts differ from chunk to chunk and the (N,) vectors are slices of any alignment:
# specialised on, seven launches of one run compiled six variants. That rows start at 16 bytes is
# told by VEC.
PER_CALL = ["T", "stride_stats", "stride_b", "stride_t"]


def row_arguments(
    logits: torch.Tensor,
    scale: float,
    softcap: float | None,
    inv_temperature: float | torch.Tensor,
) -> dict[str, object]:
    """Launch arguments for rows of logits (B, T, V) and what makes z of them.

    inv_temperature is one number, or an fp32 (N,) tensor with each row's own.
    """
    by_row = isinstance(inv_temperature, torch.Tensor)
    return {
        "logits_ptr": logits,
        "T": logits.shape[1],
        "V": logits.shape[2],
        "stride_b": logits.stride(0),
        "stride_t": logits.stride(1),
        "scale": float(scale),
        "softcap": 0.0 if softcap is None else float(softcap),
        "inv_temperature": 1.0 if by_row else float(inv_temperature),
        "inv_temperature_ptr": inv_temperature if by_row else None,
        "HAS_ROW_TEMPERATURE": by_row,
        "HAS_SOFTCAP": softcap is not None,
        "NEGATIVE": scale < 0,
    }


def is_narrowed(logits: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether out is the bytes of its own logits as a narrower type: rows are then written by one
    program each, in order and behind barriers. Other memory needs none of that."""
    same = out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    return same and out.element_size() < logits.element_size()


def gradient_arguments(logits: torch.Tensor, out: torch.Tensor) -> dict[str, object]:
    """Launch arguments for the gradient of rows of logits in out, both (B, T, V)."""
    return {
        "out_ptr": out,
        "stride_out_b": out.stride(0),
        "stride_out_t": out.stride(1),
        "NARROW": is_narrowed(logits, out),
    }
