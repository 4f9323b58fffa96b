"""The functions of flash-attn 2.8 that OpenRLHF moves padding with, for a CPU; no attention."""

__version__ = "2.8.3"
