"""How a run is saved and continued, at any optimizer step and bit for bit on the CPU."""

from __future__ import annotations

import functools
import logging
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig

from . import checkpoint
from .checkpoint import Stateful
from .config import GRPOConfig
from .folder import run_folder
from .identity import code_digest, columns_digest
from .sharding import ShardedTrainer
from .stopping import Stopping

logger = logging.getLogger(__name__)

# what a command line or a YAML file makes of a yes
_TRUTHS = {"True": True, "true": True, "latest": True, "False": False, "false": False, "": False}
# part of the optimizer's saved state, which takes the place of what the arguments say
_OPTIMIZER = (
    "learning_rate",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
# not saved: a resumed run follows its own arguments, and says so
_FOLLOWED = (
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
)


@dataclass
class Counters:
    """What Trainer counts and its own state leaves out."""

    tokens_seen: int = 0
    loss_of_run: float = 0.0
    loss_since_log: float = 0.0
    last_logged: int = 0

    def reset(self) -> None:
        """Back to the start of a run."""
        self.load_state_dict(asdict(Counters()))

    def state_dict(self) -> dict[str, Any]:
        """The numbers by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)


class ResumableTrainer(ShardedTrainer):
    """Trainer whose checkpoints hold a run: its parts, and what has to be the same to go on.

    Attributes:
        stateful: {name: part} of all that a checkpoint holds beside Trainer's own; see `Stateful`.
            A subclass adds its parts before `train`.
        fingerprinted: arguments that decide what a step computes, beside the loss.
    """

    fingerprinted: tuple[str, ...] = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "num_iterations",
        "num_generations",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "generation_kwargs",
        "chat_template_kwargs",
        "use_adaptive_entropy",
        "entropy_coef_min",
        "entropy_coef_max",
        "entropy_coef_delta",
        "entropy_target",
        "router_aux_loss_coef",
        "cast_lm_head_to_fp32",
        "mask_truncated_completions",
        "multi_objective_aggregation",
        "sync_ref_model",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "kl_controller",
        "kl_target",
        "kl_horizon",
        "target_kl",
        "target_kl_to",
        "replay_share",
        "replay_discount",
        "replay_size",
        "ratio_to",
        "log_kl",
        "disable_dropout",
        "shuffle_dataset",
        "seed",
        "data_seed",
        "head_sharding",
        "bf16",
        "fp16",
        "mlp_tile",
        "quantization",
        "bf16_stochastic_rounding",
        *_OPTIMIZER,
    )

    # what a subclass sets before `train`
    args: GRPOConfig
    loss_config: LossConfig
    data_digest: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counters = Counters()
        self.stateful: dict[str, Stateful] = {"counters": self.counters}
        self.stopping = Stopping(self)
        self.add_callback(self.stopping)
        self._reset_run()

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        loss = {f"loss.{k}": v for k, v in asdict(self.loss_config).items()}
        settings = {name: getattr(self.args, name) for name in self.fingerprinted}
        if self.args.kl_in_reward:
            # the beta of the loss is 0 then
            settings["kl_in_reward"] = self.args.beta
        return {
            **settings,
            **loss,
            "advantages": self.args.estimator,
            "model": checkpoint.model_digest(self.model),
            "train_dataset": [len(self.train_dataset), self.data_digest],
            "train_dataset columns": self._columns,
            "ranks": self.accelerator.num_processes,
            "engine": self.engine,
        }

    @functools.cached_property
    def _columns(self) -> str:
        return columns_digest(self.train_dataset)

    def _defaults(self) -> dict[str, Any]:
        """What a checkpoint computed with where it is older than an option of the fingerprint."""
        known = {
            f.name: f.default
            for f in fields(self.args)
            if f.name in self.fingerprinted and f.default is not MISSING
        }
        # they were not recorded before 2026-11-27, and nobody left them at their defaults
        known |= {name: getattr(self.args, name) for name in _OPTIMIZER}
        known["engine"] = None
        known["train_dataset columns"] = self._columns
        return {**known, **{f"loss.{f.name}": f.default for f in fields(self.loss_config)}}

    def _reset_run(self) -> None:
        self._resume: Path | None = None
        self._random_restored = False
        for part in self.stateful.values():
            reset = getattr(part, "reset", None)
            if reset is not None:
                reset()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> Any:
        """Train; True resumes the newest complete checkpoint of the output folder, None asks
        `args.resume_from_checkpoint`. A finished run is loaded, and nothing else happens.

        SIGTERM and Ctrl-C end the run after the step that is under way, with a checkpoint of it;
        `stopping.stopped` is then the signal. A second one ends it at once.

        Raises:
            ValueError: there is no training data; the checkpoint is incomplete, damaged or comes
                from another configuration; another process trains in the output folder.
        """
        if self.train_dataset is None:
            fail("train_dataset", "a dataset to train on", None)
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
            resume_from_checkpoint = _TRUTHS.get(resume_from_checkpoint, resume_from_checkpoint)
        self._reset_run()
        main = self.is_world_process_zero()
        with run_folder(self.args.output_dir, main) as own, self.stopping.listening():
            folder = None
            if resume_from_checkpoint:
                folder = self._checkpoint_of(resume_from_checkpoint)
            if folder is None or folder.resolve().parent != Path(self.args.output_dir).resolve():
                own.set_aside()
            done = None if folder is None else self._finished(folder)
            if done is None:
                done = super().train(folder and str(folder), *args, **kwargs)
                if self.stopping.stopped is not None and main:
                    logger.warning(self.stopping.sentence())
            return done

    def _checkpoint_of(self, choice: str | bool) -> Path:
        """The checkpoint to continue, checked, its run state loaded."""
        if choice is True:
            folder, skipped = checkpoint.newest(self.args.output_dir)
            for reason in skipped:
                logger.warning("resume_from_checkpoint: skipped %s", reason)
        else:
            folder = Path(choice)
        checkpoint.check(folder, self.fingerprint(), self._defaults(), hashed=choice is not True)
        for line in checkpoint.changes(folder, self._followed()):
            logger.warning("resume_from_checkpoint: %s, which the resumed run follows", line)
        self._load_run_state(folder)
        return folder

    def _followed(self) -> dict[str, Any]:
        """Arguments that may differ from those of the run that is continued."""
        rewards = getattr(self, "rewards", None)
        code = {} if rewards is None else {"code of the rewards": code_digest(rewards.functions)}
        return {**{name: getattr(self.args, name, None) for name in _FOLLOWED}, **code}

    def _finished(self, folder: Path) -> TrainOutput | None:
        """The state and the weights of a run that has no step left; None when there is one."""
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        same = state.num_train_epochs == self.args.num_train_epochs
        last = self.args.max_steps if self.args.max_steps > 0 else state.max_steps if same else None
        if last is None or state.global_step < last:
            return None
        self._load_from_checkpoint(str(folder))
        self.state, self._resume = state, None
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        logger.warning(
            "resume_from_checkpoint: %s has all of its %d steps; nothing is trained", folder, last
        )
        total = self.counters.loss_of_run + self.counters.loss_since_log
        return TrainOutput(state.global_step, total / state.global_step, {})

    def _load_run_state(self, folder: Path) -> None:
        checkpoint.load_parts(folder, self.accelerator.process_index, self.stateful)
        self._resume = folder

    def go_on(self) -> None:
        """Restore what Trainer has reset or consumed when it draws the first batches of a run."""
        if self._resume is None:
            return
        folder, self._resume = self._resume, None
        self._load_rng_state(str(folder))
        self._tr_loss += self.counters.loss_since_log
        self._total_loss_scalar += self.counters.loss_of_run
        self._globalstep_last_logged = self.counters.last_logged

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Trainer divides by the steps since the resume; the loss is that of all of them
        done = super()._finalize_training(*args, **kwargs)
        return done._replace(training_loss=self._mean_loss(), metrics=self._with_loss(done.metrics))

    def _mean_loss(self) -> float:
        return self._total_loss_scalar / max(self.state.global_step, 1)

    def _with_loss(self, logs: dict[str, float]) -> dict[str, float]:
        return {**logs, "train_loss": self._mean_loss()} if "train_loss" in logs else logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's; `train_loss` is the mean over all steps of the run."""
        super().log(self._with_loss(logs), start_time)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Trainer calls this once more after the first step's batches are drawn and sampled
        if not self._random_restored:
            super()._load_rng_state(checkpoint)
            self._random_restored = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, then ours, then the marker; only then are older ones deleted."""
        args, main = self.args, self.args.should_save
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if main:
            checkpoint.invalidate(folder)
        self.accelerator.wait_for_everyone()
        if not args.save_only_model:
            self._save_run_state(folder)
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if main:
            if not args.save_only_model:
                checkpoint.seal(folder, self.fingerprint(), self._followed())
            checkpoint.rotate(folder, limit, self.state.best_model_checkpoint)

    def _save_run_state(self, folder: Path) -> None:
        self.counters.loss_since_log = self._tr_loss.item()
        self.counters.loss_of_run = self._total_loss_scalar
        self.counters.last_logged = self._globalstep_last_logged
        rank = self.accelerator.process_index
        checkpoint.save_parts(folder, rank, self.stateful, self.args.should_save)
