"""The commands that train: what stands in their help, and their arguments and trainers."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.ppo_config import PPOConfig

_GRPO = """\
Train a causal language model with GRPO.

Without a model, a dataset and a reward it runs the embedded demo: SmolLM2-135M-Instruct learns a
reasoning-gym task in minutes, on a CPU too.

examples:
  grpo-fast train
  grpo-fast train --seed 1 --max-steps 20 --output-dir runs/short
  grpo-fast train --model Qwen/Qwen3-0.6B --dataset reasoning_gym:chain_sum --output-dir runs/sums
  grpo-fast train --model ./model --dataset prompts.jsonl --reward my_rewards:length \\
      --reward my_rewards:format --reward-weights 1.0 0.5 --lora-r 16 --learning-rate 1e-5
  grpo-fast train --config run.yaml --beta 0.04
"""
_PPO = """\
Train a causal language model with PPO: a critic in the place of the group.

--demo shows it: SmolLM2-135M-Instruct and a value head learn a reasoning-gym task, on a CPU too.
docs/ppo.md says which option is which phase of PPO, and which metric shows it.

examples:
  grpo-fast ppo --demo
  grpo-fast ppo --demo --critic separate --max-steps 20 --output-dir runs/short
  grpo-fast ppo --model Qwen/Qwen3-0.6B --dataset reasoning_gym:chain_sum --output-dir runs/sums
  grpo-fast ppo --model ./model --dataset prompts.jsonl --reward ./reward-model \\
      --critic separate --critic-model ./reward-model --value-warmup-steps 20 --target-kl 0.02
  grpo-fast ppo --config run.yaml --kl-controller ziegler --kl-target 6
"""


@dataclass(frozen=True)
class Verb:
    """A row of `VERBS`."""

    description: str
    """The head of its help."""
    config: type[GRPOConfig]
    """Its arguments."""
    home: tuple[str, str]
    """Module and name of its trainer, which is not needed for its help."""

    def trainer(self) -> Any:
        """The class of its trainer."""
        module, name = self.home
        return getattr(importlib.import_module(f"grpo_fast.trainer.{module}"), name)


VERBS = {
    "train": Verb(_GRPO, GRPOConfig, ("grpo", "GRPOTrainer")),
    "ppo": Verb(_PPO, PPOConfig, ("ppo", "PPOTrainer")),
}
