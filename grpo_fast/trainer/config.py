"""GRPOConfig: `TrainingArguments` plus what GRPO needs, under TRL's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import TrainingArguments

from grpo_fast.checks import fail

from .forward_options import ForwardOptions
from .inherited import check_inherited
from .kl import KLOptions
from .kl import option as _option
from .loss_options import LossOptions
from .memory_options import MemoryOptions
from .replay_options import ReplayOptions
from .reward_options import RewardOptions
from .sampling_options import SamplingOptions
from .trl_options import TRLOptions


@dataclass
class GRPOConfig(
    LossOptions,
    ForwardOptions,
    SamplingOptions,
    RewardOptions,
    KLOptions,
    ReplayOptions,
    MemoryOptions,
    TRLOptions,
    TrainingArguments,
):
    """Arguments of `GRPOTrainer`.

    The loss fields take their defaults from `LossConfig`, which also validates them. Batches, with
    `B = per_device_train_batch_size`, `P` ranks, `S = steps_per_generation`:

        generation_batch_size = B * P * S      completions sampled at once
        window                = S micro-batches of B completions on each rank,
                                used num_iterations times

    Advantages are those of the paper of `loss_type` (`PRESETS[loss_type].advantage`), with two
    exceptions: dr_grpo divides by the std of the group until scale_rewards="none" (or False) says
    otherwise, as in TRL, and ppo and reinforce, which name no estimator, take those of the group.
    `advantage_estimator` chooses another one, `scale_rewards` the division of the group's.

    Defaults of `TrainingArguments` that differ here: learning_rate 1e-6, logging_steps 10,
    remove_unused_columns False (reward functions get every column), logging_nan_inf_filter False
    (it hides a NaN loss and costs a host sync for each micro-batch), dataloader_pin_memory False
    (the loader yields rows of the dataset, no tensors), metric_for_best_model "reward", bf16 True
    where CUDA supports it and neither `bf16` nor `fp16` was given (False on CPU and MPS). Model
    strings load in float32 unless `model_init_kwargs` says otherwise, under an adapter in bfloat16
    where bf16 is on.

    Raises:
        ValueError: for any value out of range, before anything is loaded.
    """

    fewest_generations: ClassVar[int] = 2

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
        "sampler_kwargs",
    ]

    learning_rate: float = _option(1e-6, "Peak learning rate.")
    logging_steps: float = _option(10, "Log every so many optimizer steps.")
    remove_unused_columns: bool | None = _option(
        False, "Must stay False: reward functions read the dataset's columns."
    )
    logging_nan_inf_filter: bool = _option(False, "Leave NaN losses out of the logged loss.")
    dataloader_pin_memory: bool = _option(False, "Pin the memory of what the loader yields.")
    bf16: bool | None = _option(None, "bf16 autocast; default: True where CUDA supports it.")

    # policy and data
    model_init_kwargs: dict | str | None = _option(
        None, "Keyword arguments of from_pretrained when the model is a string (dict or JSON)."
    )
    disable_dropout: bool = _option(False, "Set every dropout of the policy to 0.")
    shuffle_dataset: bool = _option(True, "Shuffle the prompts in each epoch.")
    chat_template_kwargs: dict | str | None = _option(
        None, "Further arguments of the chat template for conversational prompts (dict or JSON)."
    )

    # reference policy
    sync_ref_model: bool = _option(False, "Move the reference towards the policy (TR-DPO).")
    ref_model_mixup_alpha: float = _option(0.6, "Share of the policy in that move.")
    ref_model_sync_steps: int = _option(512, "Optimizer steps between two moves.")

    # reports
    log_completions: bool = _option(
        False, "Print a table of the training completions and write them as parquet."
    )
    num_completions_to_print: int | None = _option(
        None, "Rows of that table; default: all. The parquet files hold all."
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        judged = self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau"
        if judged and self.metric_for_best_model is None:
            # a policy loss says nothing about the policy: it is 0 at every on-policy step
            self.metric_for_best_model = "reward"
        super().__post_init__()
        for name in self._VALID_DICT_FIELDS[len(TrainingArguments._VALID_DICT_FIELDS) :]:
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                fail(name, "a dict or a JSON object", repr(value))
        self.check_trl()
        self.loss_config()
        self._check_integers()
        self.num_generations_eval = self.num_generations_eval or self.num_generations
        self.check_forward()
        self.check_sampling()
        self.check_sampler()
        self.check_rewards()
        self.check_advantages()
        self._check_batches()
        # may set a field of the loss
        self.check_replay()
        self.loss_config()
        self.check_kl()
        self.check_memory()
        check_inherited(self)

    @property
    def window_uses(self) -> int:
        """Micro-steps that one generation serves."""
        return self.steps_per_generation * self.num_iterations

    @property
    def on_policy(self) -> bool:
        """True when every use of a window falls in the optimizer step that sampled it."""
        fresh = self.gradient_accumulation_steps % self.window_uses == 0
        return fresh and not self.replay_share

    def _check_integers(self) -> None:
        lowest = {
            "num_generations": self.fewest_generations,
            "num_generations_eval": 1,
            "num_iterations": 1,
            "generation_batch_size": 1,
            "steps_per_generation": 1,
            "ref_model_sync_steps": 1,
            "num_completions_to_print": 1,
            "workspace_bytes": 1,
            "sampling_batch_size": 1,
            "top_k": 0,
        }
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                hint = "a group needs a baseline." if name == "num_generations" and low > 1 else ""
                fail(name, f"an integer >= {low}", repr(value), hint)

    def _check_batches(self) -> None:
        step = self.per_device_train_batch_size * self.world_size
        batch, steps = self.generation_batch_size, self.steps_per_generation
        if batch is not None and batch % step:
            expected = f"a multiple of per_device_train_batch_size x ranks = {step}"
            fail("generation_batch_size", expected, batch)
        # an agreeing pair is a copy of finished arguments (dataclasses.replace)
        if batch is not None and steps is not None and batch != step * steps:
            expected = f"{step * steps} with steps_per_generation = {steps}"
            fail("generation_batch_size", expected, batch, "set one of the two.")
        if steps is None:
            steps = self.gradient_accumulation_steps if batch is None else batch // step
        self.steps_per_generation, self.generation_batch_size = steps, step * steps
        if self.generation_batch_size % self.num_generations:
            expected = (
                f"a divisor of the generation batch of {self.generation_batch_size} completions "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} x ranks "
                f"{self.world_size} x steps_per_generation {self.steps_per_generation})"
            )
            fail("num_generations", expected, self.num_generations)
