"""How Trainer's loop is bent to rollouts: data, windows, exact denominators, evaluation, resume."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from grpo_fast.config import LossConfig
from grpo_fast.models.head import evaluating
from grpo_fast.models.reference import ReferencePolicy
from grpo_fast.objective import weights
from grpo_fast.rollout.rollouts import Sampler

from . import checkpoint
from .checkpoint import Stateful
from .config import GRPOConfig
from .metrics import Metrics
from .reporting import CompletionLog
from .sampler import ShardSampler, WindowSampler, check_dataset
from .window import MicroBatch, Window

logger = logging.getLogger(__name__)

Example = dict[str, Any]

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


@dataclass
class Counters:
    """What Trainer counts and its own state leaves out."""

    tokens_seen: int = 0
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


class RolloutTrainer(Trainer):
    """Trainer whose batches are windows of rollouts; a subclass fills in the stages.

    Trainer draws one batch of prompts for each micro-step. A window is made from the first of
    `args.window_uses` of them and serves them all, so Trainer's own count of steps, epochs and
    batches to skip stays true. For each window the loop calls

        sampler.sync(model)                             the weights that sample are those trained
        rollout(examples, G, metrics)  -> [MicroBatch]  the window of this rank
        prepare(micro_batches)         -> [MicroBatch]  what needs the whole window; none here

    and for each optimizer step

        denominators(micro_batches)    -> [0-d]         what each loss divides by
        loss(model, micro_batch)       -> loss, metrics

    and what a run logs goes through `named`. `rollout`, `loss` and `named` are the subclass's.

    Attributes:
        stateful: {name: part} of all that a checkpoint holds beside Trainer's own; see `Stateful`.
            A subclass adds its parts before `train`.
        micro_batch: class of the micro-batches.
    """

    # compute_loss returns the exact addend of the optimizer step
    loss_is_scaled_for_ga = True
    micro_batch: type[MicroBatch] = MicroBatch

    # what a subclass sets before `train`
    args: GRPOConfig
    loss_config: LossConfig
    sampler: Sampler
    reference: ReferencePolicy | None = None
    data_digest: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        steps, uses = self.args.steps_per_generation, self.args.window_uses
        self.window = Window(self.micro_batch, steps, uses, self.args.device)
        self.counters = Counters()
        self.metrics = Metrics(self.args.device)
        self.completions = CompletionLog()
        self.stateful: dict[str, Stateful] = {
            "window": self.window,
            "counters": self.counters,
            "metrics": self.metrics,
            "completions": self.completions,
        }
        self._reset_run()

    def rollout(
        self,
        examples: list[Example],
        num_generations: int,
        metrics: Metrics,
        evaluate: bool = False,
    ) -> list[MicroBatch]:
        """Micro-batches of this rank's share of a window; examples repeat each prompt G times."""
        raise NotImplementedError

    def prepare(self, micro_batches: list[MicroBatch], evaluate: bool = False) -> list[MicroBatch]:
        """A stage for what needs all micro-batches of a window, once for each: nothing here.

        All ranks are here together, but in evaluation, where one may have more batches.
        """
        return micro_batches

    def loss(self, model: nn.Module, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward through the wrapped model -> (loss, metrics of the loss)."""
        raise NotImplementedError

    def named(self, values: dict[str, float], evaluate: bool = False) -> dict[str, float]:
        """What `Metrics.reduce` returned, under the names that are logged."""
        raise NotImplementedError

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
        self.prompt_order = WindowSampler(
            len(self.train_dataset),
            args.generation_batch_size // args.num_generations,
            args.num_generations,
            args.window_uses,
            args.seed if args.data_seed is None else args.data_seed,
            args.shuffle_dataset,
        )
        return self.prompt_order

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
        micro_batches, synced = [], False
        for examples in drawn:
            if self.window.spent:
                if not synced:
                    self.sampler.sync(self.model)
                synced = True
                fresh = self.rollout(examples, self.args.num_generations, self.metrics)
                self.window.fill(self.prepare(fresh))
            micro_batches.append(self.window.next())
        denominators = self.denominators(micro_batches)
        pairs = zip(micro_batches, denominators, strict=True)
        # the second value only tells Trainer that the loss is scaled already
        return [replace(micro, denominator=d) for micro, d in pairs], torch.ones((), device=device)

    def denominators(self, micro_batches: list[MicroBatch]) -> list[Tensor]:
        """What each micro-batch's loss divides by: the count of this optimizer step over all ranks.

        DDP averages gradients over the ranks, hence the division by their number. bnpo is local to
        a micro-batch and averaged over the micro-batches that there are.
        """
        counts = []
        for micro in micro_batches:
            packed, mask = micro.packed, micro.mask
            mask = torch.ones_like(packed.ids, dtype=torch.bool) if mask is None else mask
            counts.append(weights.count(self.loss_config, mask, packed.cu_seqlens).float())
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
        self.sampler.sync(self.model)
        with evaluating(self.model):
            for drawn in dataloader:
                examples = [example for example in drawn for _ in range(groups)]
                fresh = self.rollout(examples, groups, metrics, evaluate=True)
                for micro in self.prepare(fresh, evaluate=True):
                    with self.accelerator.autocast():
                        loss, values = self.loss(self.model, micro)
                    metrics.add("loss", loss.item())
                    metrics.add_tokens(values)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        values = self.named(metrics.reduce(self.accelerator), evaluate=True)
        named = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(None, None, named, len(dataloader.dataset))

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        loss = {f"loss.{k}": v for k, v in asdict(self.loss_config).items()}
        settings = {name: getattr(self.args, name) for name in _FINGERPRINT}
        return {
            **settings,
            **loss,
            "advantages": self.args.estimator,
            "model": checkpoint.model_digest(self.model),
            "train_dataset": [len(self.train_dataset), self.data_digest],
            "ranks": self.accelerator.num_processes,
        }

    def _defaults(self) -> dict[str, Any]:
        """What a checkpoint computed with where it is older than an option of the fingerprint."""
        known = {
            f.name: f.default
            for f in fields(self.args)
            if f.name in _FINGERPRINT and f.default is not MISSING
        }
        return {**known, **{f"loss.{f.name}": f.default for f in fields(self.loss_config)}}

    def _reset_run(self) -> None:
        self._resume: Path | None = None
        self._random_restored = False
        for part in self.stateful.values():
            reset = getattr(part, "reset", None)
            if reset is not None:
                reset()

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
        checkpoint.check(folder, self.fingerprint(), self._defaults())
        self._load_run_state(folder)
        return super().train(str(folder), *args, **kwargs)

    def _load_run_state(self, folder: Path) -> None:
        checkpoint.load_parts(folder, self.accelerator.process_index, self.stateful)
        self._resume = folder

    def _continue(self) -> None:
        """Restore what Trainer has reset or consumed by the time it draws the first batches."""
        folder, self._resume = self._resume, None
        self._load_rng_state(str(folder))
        self._tr_loss += self.counters.loss_since_log
        self._globalstep_last_logged = self.counters.last_logged

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
        self.counters.loss_since_log = self._tr_loss.item()
        self.counters.last_logged = self._globalstep_last_logged
        rank = self.accelerator.process_index
        checkpoint.save_parts(folder, rank, self.stateful, self.args.should_save)


class StepCallback(TrainerCallback):
    """The epoch's order, the time of a step, and the moving reference."""

    def __init__(self, trainer: RolloutTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Set the order: set_epoch does not reach the sampler in all of Accelerate's wrappers."""
        self.trainer.prompt_order.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Measure the step, and move the reference before a checkpoint of this step is written."""
        trainer = self.trainer
        trainer.metrics.add("step_time", time.perf_counter() - trainer._step_began)
        if args.sync_ref_model and state.global_step % args.ref_model_sync_steps == 0:
            trainer.reference.sync(trainer.model, args.ref_model_mixup_alpha)
