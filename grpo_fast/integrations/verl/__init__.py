"""verl: `fast_<loss type>` for every preset, and the fused head."""

from .patch import patch_verl, register, registered, unpatch_verl

__all__ = ["patch_verl", "register", "registered", "unpatch_verl"]
