"""How Trainer's loop is bent to rollouts: data, windows, exact denominators, evaluation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from grpo_fast.config import LossConfig
from grpo_fast.models.head import evaluating
from grpo_fast.models.packing import PackedBatch
from grpo_fast.models.reference import ReferencePolicy
from grpo_fast.models.router import router_loss_of
from grpo_fast.models.sharding import reshard
from grpo_fast.objective import weights
from grpo_fast.rewards.containment import generators_kept
from grpo_fast.rollout.rollouts import Sampler

from .completions import CompletionLog
from .entropy import EntropyBonus
from .kl import KLController, KLStop, StepKL, make_controller
from .metrics import MEANS, Metrics
from .resume import ResumableTrainer
from .sampler import ShardSampler, WindowSampler, check_dataset
from .samplers import saved_on_failure, together
from .window import MicroBatch, Window

Example = dict[str, Any]


class RolloutTrainer(ResumableTrainer):
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
        micro_batch: class of the micro-batches.
    """

    # compute_loss returns the exact addend of the optimizer step
    loss_is_scaled_for_ga = True
    micro_batch: type[MicroBatch] = MicroBatch

    # what a subclass sets before `train`
    sampler: Sampler
    reference: ReferencePolicy | None = None
    router_coef: float = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        steps, uses = self.args.steps_per_generation, self.args.window_uses
        self.window = Window(self.micro_batch, steps, uses, self.args.device)
        self.metrics = Metrics(self.args.device, self.token_means)
        self.completions, self.eval_completions = CompletionLog(), CompletionLog()
        self.stateful.update(window=self.window, metrics=self.metrics, completions=self.completions)
        self.entropy = EntropyBonus(self.args)
        if self.entropy.adaptive:
            self.stateful["entropy"] = self.entropy
        self._control_kl()

    @property
    def token_means(self) -> tuple[str, ...]:
        """Means over tokens that `loss` returns and that are logged."""
        further = ("approx_kl",) if self.args.logs_approx_kl else ()
        return (*MEANS, *further, *(("aux_loss",) if self.router_coef else ()))

    def _control_kl(self) -> None:
        args, stopped = self.args, self.args.target_kl is not None
        _, start = args.kl_coefficient
        self.kl: KLController = make_controller(
            args.kl_controller, start, args.kl_target, args.kl_horizon
        )
        self.kl_stop = KLStop(args.target_kl) if stopped else None
        self.step_kl = StepKL() if stopped or args.kl_controller != "fixed" else None
        if args.kl_controller != "fixed":
            self.stateful["kl"] = self.kl
        if self.kl_stop is not None:
            self.stateful["kl_stop"] = self.kl_stop

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

    def with_router_loss(
        self, model: nn.Module, packed: PackedBatch, head_fn: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One packed forward whose loss has the router loss of its experts, where there is one.

        loss + router_coef * router loss / micro-batches of the optimizer step, as in TRL.
        """
        if not self.router_coef:
            return model(**packed.inputs(), head_fn=head_fn)
        router_fn = router_loss_of(self.model, packed)
        out = model(**packed.inputs(), head_fn=head_fn, router_fn=router_fn)
        (loss, metrics), aux = out
        steps = self.current_gradient_accumulation_steps if torch.is_grad_enabled() else 1
        return loss + self.router_coef * aux / steps, {**metrics, "aux_loss": aux.detach()}

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
        self.go_on()
        micro_batches, synced = [], False
        for examples in drawn:
            if self.window.spent:
                with saved_on_failure(self, at_boundary=not micro_batches):
                    if not synced:
                        together(self.accelerator, lambda: self.sampler.sync(self.model))
                    synced = True
                    fresh = self.rollout(examples, self.args.num_generations, self.metrics)
                self.window.fill(self.prepare(fresh))
                if self.kl_stop is not None:
                    self.kl_stop.new_window()
            micro_batches.append(self.window.next())
        denominators = self.denominators(micro_batches)
        masks = [micro.trained for micro in micro_batches]
        self.entropy.begin(self.loss_config, masks, denominators, self.accelerator)
        pairs = zip(micro_batches, denominators, strict=True)
        # the second value only tells Trainer that the loss is scaled already
        return [replace(micro, denominator=d) for micro, d in pairs], torch.ones((), device=device)

    def denominators(self, micro_batches: list[MicroBatch]) -> list[Tensor]:
        """What each micro-batch's loss divides by: the count of this optimizer step over all ranks.

        DDP averages gradients over the ranks, hence the division by their number. bnpo is local to
        a micro-batch and averaged over the micro-batches that there are.
        """
        counts = [self._counted(micro) for micro in micro_batches]
        if not self.loss_config.preset.window:
            return [count.clamp(min=1) * len(counts) for count in counts]
        if not counts:
            return []
        total = self.accelerator.reduce(torch.stack(counts).sum(), "sum")
        return [total / self.accelerator.num_processes] * len(counts)

    def _counted(self, micro: MicroBatch) -> Tensor:
        if micro.count is not None:
            return micro.count.float()
        return weights.count(self.loss_config, micro.trained, micro.packed.cu_seqlens).float()

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
        self.entropy.add(loss, metrics)
        if self.step_kl is not None:
            self.step_kl.add(metrics, inputs.packed.cu_seqlens.numel() - 1)
        return (loss, metrics) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: MicroBatch, *args: Any, **kwargs: Any) -> Any:
        """A micro-step; an empty one, of loss 0 and without a gradient, in a stopped window."""
        if self.kl_stop is not None and self.kl_stop.stopped:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, *args, **kwargs)

    def current_loss_config(self) -> LossConfig:
        """The loss of this step: with the coefficients of its entropy and of a moving beta."""
        config = self.loss_config
        if self.entropy.on:
            config = replace(config, entropy_coef=self.entropy.coefficient_of_step)
        in_loss = self.args.kl_coefficient[0] == "beta" and not self.args.kl_in_reward
        if self.args.kl_controller == "fixed" or not in_loss:
            return config
        return replace(config, beta=self.kl.coefficient)

    def before_step(self) -> None:
        """Judge the KL of the coming optimizer step, whose gradients are complete.

        A step that is dropped has no gradient: the optimizer, its moments and its weight decay
        leave every weight as it is, while the schedule and all counters go on.
        """
        policy_loss = self.entropy.end(self.accelerator)
        if policy_loss is not None:
            self.metrics.add("policy_loss", policy_loss)
        sums = None if self.step_kl is None else self.step_kl.take(self.accelerator)
        if self.kl_stop is not None:
            tokens = max(sums["tokens"], 1.0) if sums else 1.0
            if self.kl_stop.judge(sums[self.args.target_kl_to] / tokens if sums else 0.0):
                self.model.zero_grad(set_to_none=True)
            self.metrics.add("skipped_steps", self.kl_stop.skipped, "max")
        if self.args.kl_controller != "fixed":
            self.learn_kl(sums)

    def learn_kl(self, sums: dict[str, float] | None) -> None:
        """Tell the controller of the KL to the reference of the coming step, and log what it uses.

        The coefficient that the step was made with is logged; the next one has the new one. With
        kl_in_reward it has learned of the window already.
        """
        if self.args.kl_in_reward:
            return
        self.metrics.add("kl_coef", self.kl.coefficient)
        if sums and sums["completions"]:
            self.kl.update(sums["reference"] / sums["completions"], int(sums["completions"]))

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
        """Sample, score and measure every prompt of this rank's shard; no update, and training's
        random numbers go on as if nothing had been drawn."""
        metrics = Metrics(self.args.device, self.token_means)
        groups = self.args.num_generations_eval
        self.callback_handler.eval_dataloader = dataloader
        together(self.accelerator, lambda: self.sampler.sync(self.model))
        self.check_prepared()
        with generators_kept(), evaluating(self.model):
            for drawn, counts in self.evenly(dataloader):
                examples = [example for example in drawn for _ in range(groups)]
                seen = metrics if counts else Metrics(self.args.device, self.token_means)
                fresh = self.rollout(examples, groups, seen, evaluate=True)
                for micro in self.prepare(fresh, evaluate=True):
                    if not counts:
                        micro.mask = torch.zeros_like(micro.packed.ids, dtype=torch.bool)
                    self.entropy.begin(self.loss_config, [micro.trained], [self._counted(micro)])
                    with self.accelerator.autocast():
                        loss, values = self.loss(self.model, micro)
                    reshard(self.model)
                    seen.add("loss", loss.item())
                    seen.add_tokens(values)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        values = self.named(metrics.reduce(self.accelerator), evaluate=True)
        named = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        named |= self.entropy.logs(named, f"{metric_key_prefix}_")
        return EvalLoopOutput(None, None, named, len(dataloader.dataset))


class StepCallback(TrainerCallback):
    """The epoch's order, the KL and the time of a step, and the moving reference."""

    def __init__(self, trainer: RolloutTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Set the order: set_epoch does not reach the sampler in all of Accelerate's wrappers."""
        self.trainer.prompt_order.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Look at the step before it is taken."""
        self.trainer.before_step()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Measure the step, and move the reference before a checkpoint of this step is written."""
        trainer = self.trainer
        trainer.metrics.add("step_time", time.perf_counter() - trainer._step_began)
        if args.sync_ref_model and state.global_step % args.ref_model_sync_steps == 0:
            trainer.reference.sync(trainer.model, args.ref_model_mixup_alpha)
