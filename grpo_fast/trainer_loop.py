"""How Trainer's loop is bent to rollouts: data, windows, exact denominators, evaluation, resume."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from . import checkpoint, weights
from .heads import evaluating
from .reporting import Metrics
from .sampler import ShardSampler, WindowSampler, check_dataset

logger = logging.getLogger(__name__)

Example = dict[str, Any]
MicroBatch = dict[str, Tensor | None]

# arguments that decide what a step computes, beside the loss
_FINGERPRINT = (
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
    "mask_truncated_completions",
    "multi_objective_aggregation",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "disable_dropout",
    "shuffle_dataset",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


class RolloutTrainer(Trainer):
    """Trainer whose batches are windows of rollouts; `GRPOTrainer` fills in the stages.

    Trainer draws one batch of prompts for each micro-step. A window is made from the first of
    `args.window_uses` of them and serves them all, so Trainer's own count of steps, epochs and
    batches to skip stays true.
    """

    # compute_loss returns the exact addend of the optimizer step
    loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> DataLoader:
        """A rank's share of each window, once for every micro-step that the window serves."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> WindowSampler:
        args = self.args
        self.sampler = WindowSampler(
            len(self.train_dataset),
            args.generation_batch_size // args.num_generations,
            args.num_generations,
            args.window_uses,
            args.seed if args.data_seed is None else args.data_seed,
            args.shuffle_dataset,
        )
        return self.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], Tensor | None]:
        """The micro-batches of the coming optimizer step, each with its exact denominator.

        Windows that begin in this step are sampled here: weights change between optimizer steps
        only, so sampling ahead of the accumulation is sampling from the current policy.
        """
        self._step_began = time.perf_counter()
        drawn = list(itertools.islice(epoch_iterator, num_batches))
        if self._resume is not None:
            self._continue()
        micro_batches = []
        for examples in drawn:
            position = self._micro_step % self.args.window_uses
            if position == 0:
                self.window = self.rollout(examples, self.args.num_generations, self.metrics)
            micro_batches.append(self.window[position % self.args.steps_per_generation])
            self._micro_step += 1
        denominators = self.denominators(micro_batches)
        pairs = zip(micro_batches, denominators, strict=True)
        # the second value only tells Trainer that the loss is scaled already
        return [{**micro, "denominator": d} for micro, d in pairs], torch.ones((), device=device)

    def denominators(self, micro_batches: list[MicroBatch]) -> list[Tensor]:
        """What each micro-batch's loss divides by: the count of this optimizer step over all ranks.

        DDP averages gradients over the ranks, hence the division by their number. bnpo is local to
        a micro-batch and averaged over the micro-batches that there are.
        """
        counts = []
        for micro in micro_batches:
            mask = micro["mask"]
            mask = torch.ones_like(micro["ids"], dtype=torch.bool) if mask is None else mask
            counts.append(weights.count(self.loss_config, mask, micro["cu_seqlens"]).float())
        if not self.loss_config.preset.window:
            return [count.clamp(min=1) * len(counts) for count in counts]
        if not counts:
            return []
        total = self.accelerator.reduce(torch.stack(counts).sum(), "sum")
        return [total / self.accelerator.num_processes] * len(counts)

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The `loss` stage, its metrics kept on the device."""
        loss, metrics = self.loss(model, inputs)
        self.metrics.add_tokens(metrics)
        return (loss, metrics) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Prompts of this rank; a batch is filled by `num_generations_eval` completions of each."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = (
                self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
            )
        check_dataset("eval_dataset", eval_dataset)
        ranks = self.accelerator.process_index, self.accelerator.num_processes
        size = max(1, self.args.per_device_eval_batch_size // self.args.num_generations_eval)
        shard = ShardSampler(len(eval_dataset), *ranks)
        return DataLoader(eval_dataset, batch_size=size, sampler=shard, collate_fn=list)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sample, score and measure every prompt of this rank's shard; no update."""
        metrics, groups = Metrics(self.args.device), self.args.num_generations_eval
        self.callback_handler.eval_dataloader = dataloader
        with evaluating(self.model):
            for drawn in dataloader:
                examples = [example for example in drawn for _ in range(groups)]
                for micro in self.rollout(examples, groups, metrics, evaluate=True):
                    with self.accelerator.autocast():
                        loss, values = self.loss(self.model, micro)
                    metrics.add("loss", loss.item())
                    metrics.add_tokens(values)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        values = self._named(metrics.reduce(self.accelerator), evaluate=True)
        named = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(None, None, named, len(dataloader.dataset))

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        loss = {f"loss.{k}": v for k, v in vars(self.loss_config).items()}
        settings = {name: getattr(self.args, name) for name in _FINGERPRINT}
        return {
            **settings,
            **loss,
            "advantages": self.args.estimator,
            "model": checkpoint.model_digest(self.model),
            "train_dataset": [len(self.train_dataset), self._data_digest],
            "ranks": self.accelerator.num_processes,
            "rewards": [self.rewards.names, self.rewards.weights.tolist()],
        }

    def _reset_run(self) -> None:
        self.window: list[MicroBatch] = []
        self._micro_step = 0
        self._tokens_seen = 0
        self._resume: dict[str, Any] | None = None
        self._random_restored = False
        self.metrics.reset()
        self.completions.rows = []

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> Any:
        """Train; True resumes the newest complete checkpoint of the output folder.

        Raises:
            ValueError: there is no training data; the checkpoint is incomplete or comes from
                another configuration.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset: training needs one, got None.")
        self._reset_run()
        if not resume_from_checkpoint:
            return super().train(None, *args, **kwargs)
        if resume_from_checkpoint is True:
            folder, skipped = checkpoint.newest(self.args.output_dir)
            for reason in skipped:
                logger.warning("resume_from_checkpoint: skipped %s", reason)
        else:
            folder = Path(resume_from_checkpoint)
        checkpoint.check(folder, self.fingerprint())
        self._load_run_state(folder)
        return super().train(str(folder), *args, **kwargs)

    def _load_run_state(self, folder: Path) -> None:
        rank, device = self.accelerator.process_index, self.args.device
        self.window, state = checkpoint.load_rank(folder, rank, device)
        self._micro_step, self._tokens_seen = state["micro_step"], state["tokens_seen"]
        self.metrics.load_state_dict(state["metrics"])
        self.completions.rows = state["completions"]
        if self.reference is not None and not self.reference.peft:
            self.reference.load_state_dict(checkpoint.load_reference(folder))
        self._resume = {"folder": str(folder), **state}

    def _continue(self) -> None:
        """Restore what Trainer has reset or consumed by the time it draws the first batches."""
        state, self._resume = self._resume, None
        self._load_rng_state(state["folder"])
        self._tr_loss += state["loss_since_log"]
        self._globalstep_last_logged = state["last_logged"]

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
                checkpoint.seal(folder, self.fingerprint())
            checkpoint.rotate(folder, limit, self.state.best_model_checkpoint)

    def _save_run_state(self, folder: Path) -> None:
        state = {
            "micro_step": self._micro_step,
            "tokens_seen": self._tokens_seen,
            "metrics": self.metrics.state_dict(),
            "completions": self.completions.rows,
            "loss_since_log": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
        }
        unfinished = self._micro_step % self.args.window_uses
        rank = self.accelerator.process_index
        checkpoint.save_rank(folder, rank, self.window if unfinished else [], state)
        if self.reference is not None and not self.reference.peft and self.args.should_save:
            checkpoint.save_reference(folder, self.reference.state_dict())


class StepCallback(TrainerCallback):
    """The epoch's order, the time of a step, and the moving reference."""

    def __init__(self, trainer: RolloutTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Set the order: set_epoch does not reach the sampler in all of Accelerate's wrappers."""
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Measure the step, and move the reference before a checkpoint of this step is written."""
        trainer = self.trainer
        trainer.metrics.add("step_time", time.perf_counter() - trainer._step_began)
        if args.sync_ref_model and state.global_step % args.ref_model_sync_steps == 0:
            trainer.reference.sync(trainer.model, args.ref_model_mixup_alpha)
