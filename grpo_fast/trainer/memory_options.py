"""The fields of `GRPOConfig` that trade time or digits for memory."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_fast.checks import fail

from .kl import option as _option


@dataclass
class MemoryOptions:
    """How weights are held and what backward keeps; `gradient_checkpointing` and `optim` of
    `TrainingArguments` go with them."""

    mlp_tile: int | None = _option(
        None, "Tokens of an MLP that are computed at once in training; default: all."
    )
    quantization: str | None = _option(
        None,
        "Pack the linear layers of a base model that is loaded by name, under an adapter: nf4 "
        "(bitsandbytes) or int8 (torchao).",
    )
    bf16_stochastic_rounding: bool = _option(
        False, "AdamW of torchao, which rounds bf16 weights at random instead of to the nearest."
    )

    def check_memory(self) -> None:
        """Refuse values out of range and options that exclude each other."""
        tile = self.mlp_tile
        if tile is not None and (not isinstance(tile, int) or isinstance(tile, bool) or tile < 1):
            fail("mlp_tile", "None or an integer >= 1", repr(tile))
        if self.quantization not in (None, "nf4", "int8"):
            fail("quantization", "None, nf4 or int8", repr(self.quantization))
        if self.quantization is not None and "quantization_config" in (
            self.model_init_kwargs or {}
        ):
            got = "one there and quantization as well"
            fail("model_init_kwargs", "no quantization_config", got, "give one of the two.")
