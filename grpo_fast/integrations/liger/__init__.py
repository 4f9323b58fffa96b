"""Liger-Kernel: its two GRPO losses by name. Nothing of liger_kernel is imported."""

from .linear import LigerFusedLinearGRPOLoss
from .logits import triton_grpo_loss

__all__ = ["LigerFusedLinearGRPOLoss", "triton_grpo_loss"]
