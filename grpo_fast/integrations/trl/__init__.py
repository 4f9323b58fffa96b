"""TRL: a trainer with the fused loss, and a patch of the log-probs of all of its trainers."""

from .trainer import FastGRPOTrainer, patch_trl, unpatch_trl

__all__ = ["FastGRPOTrainer", "patch_trl", "unpatch_trl"]
