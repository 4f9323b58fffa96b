"""What OpenRLHF's trainers import of vLLM; nothing here generates."""

__version__ = "0.29.0"
