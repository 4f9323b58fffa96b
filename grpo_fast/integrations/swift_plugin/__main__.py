"""Print the path of the plug-in."""

from pathlib import Path

print(Path(__file__).with_name("grpo_fast_plugin.py"))
