"""GRPOTrainer: generate -> score -> advantages -> batch -> loss -> log, on HF's Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
)
from transformers.utils import logging

from grpo_fast.advantages.decoupled import decoupled_advantages
from grpo_fast.advantages.table import advantages_of
from grpo_fast.checks import fail
from grpo_fast.loss.linear import linear_policy_loss
from grpo_fast.models.head import evaluating
from grpo_fast.models.packing import (
    PackedBatch,
    check_packing,
    completion_logprobs,
    default_row_length,
    pack,
)
from grpo_fast.models.policy import attach
from grpo_fast.models.reference import ReferencePolicy
from grpo_fast.models.router import router_coefficient
from grpo_fast.rewards import weighted
from grpo_fast.rollout.rollouts import Rollouts

from .config import GRPOConfig
from .kl import approximate_kl
from .loop import Example, RolloutTrainer, StepCallback
from .metrics import Metrics, add_rollouts, loss_metrics
from .prompts import encode_prompt, texts_of
from .record import completion_of, table_of
from .reporting import CORRECTED, Curves, MetricsFile, Progress
from .sampler import check_prompts
from .samplers import (
    agreement,
    agrees,
    from_function,
    in_parts,
    make_sampler,
    raw_prompts,
    together,
)
from .setup import (
    check_arguments,
    generation_of,
    policy_of,
    prompt_room,
    rewards_of,
    tokenizer_of,
)
from .streams import without_streams
from .trl_names import TRLNames
from .trl_options import check_further
from .window import MicroBatch, flat, mask_of

logger = logging.get_logger(__name__)


class GRPOTrainer(TRLNames, RolloutTrainer):
    """Trains a causal language model with GRPO on rewards of its own completions.

    A window is sampled for `steps_per_generation` micro-batches and used `num_iterations` times.
    Each stage is a method that a subclass can replace:

        generate(examples, G)            -> Rollouts       sample G completions of each prompt
        score(examples, rollouts)        -> (B, K)         rewards of this rank, NaN = unscorable
        advantages(rewards, G)           -> (B,), (P, G)   from the rewards of all ranks
        batch(rollouts, advantages)      -> [MicroBatch]   packed, with old and reference logp
        prepare(micro_batches)           -> [MicroBatch]   what needs the whole window: nothing
        loss(model, micro_batch)         -> loss, metrics  one forward through the wrapped model
        log(logs)                                          metrics, completions, TRL's names

    `generate` asks `self.sampler`, which any `grpo_fast.rollout.Sampler` can take the place of.
    `micro_batch` is the class of the micro-batches, whose fields a subclass can add to, and
    `stateful` all that a checkpoint holds beside Trainer's own.

    Args:
        model: checkpoint name or path, a causal `PreTrainedModel`, or a `PeftModel`.
        reward_funcs: one or more of: function (TRL's convention), reward model, checkpoint name.
        args: `GRPOConfig`.
        train_dataset: rows with `prompt`, text or messages; rewards get all columns. Of a stream as
            many are read as `max_steps` needs.
        eval_dataset: the same, or a dict of them.
        processing_class: tokenizer; default: the one of the model.
        reward_processing_classes: tokenizers of the reward models.
        callbacks, optimizers: as for `Trainer`.
        quantization_config, tools, environment_factory: TRL's, refused by name.
        peft_config: wraps the model in an adapter; the reference is then the model without it.
        rollout_func: samples in place of `args.sampler`, several turns and tools too; see
            `samplers.from_function`.

    Raises:
        ValueError: for bad arguments, data, head or output folder, before any work.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        refused = {"tools": tools, "environment_factory": environment_factory}
        check_further(quantization_config=quantization_config, **refused)
        args = GRPOConfig(output_dir="grpo-output") if args is None else args
        train_dataset, eval_dataset = without_streams(args, train_dataset, eval_dataset)
        datasets = check_arguments(args, train_dataset, eval_dataset, model, peft_config)
        tokenizer = tokenizer_of(model, processing_class, args)
        known = (reward_funcs, reward_processing_classes, args, datasets)
        self.rewards = rewards_of(*known, complete=rollout_func is None)
        # an adapter starts from random weights
        set_seed(args.seed)
        model = policy_of(model, args, peft_config)
        self.loss_config, self.rollout_func = args.loss_config(), rollout_func
        self.generation_config, self.eos_ids = generation_of(args, model, tokenizer)
        self.processing_class, self.args = tokenizer, args
        self.router_coef = router_coefficient(model, args.router_aux_loss_coef)
        room = prompt_room(model, args)
        digests = {n: check_prompts(n, d, self.encode, room) for n, d in datasets.items()}
        self.data_digest = digests.get("train_dataset")
        super().__init__(
            model,
            args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[MetricsFile(args.output_dir), Curves(args.output_dir), *(callbacks or [])],
            optimizers=optimizers,
        )
        # older transformers ask this instead of loss_is_scaled_for_ga, and before 5.8 Accelerate
        # divides once more
        self.model_accepts_loss_kwargs = True
        self.accelerator.gradient_accumulation_steps = 1
        self.add_callback(StepCallback(self))
        # not in a notebook, whose callback draws a table of its own
        if any(type(c) is ProgressCallback for c in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress)
        self._prepare_policy()
        # ranks that start from one seed would sample alike
        set_seed(args.seed, device_specific=True)

    def _prepare_policy(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            hint = "sampling from sharded parameters is not supported."
            fail("args", "whole parameters on every rank", engine, hint)
        attach(self.model)
        check_packing(self.model, self.processing_class.pad_token_id)
        self.row_length = default_row_length(self.model)
        peft = hasattr(self.model, "peft_config")
        if self.args.needs_reference:
            self.reference = ReferencePolicy(self.model, peft)
            self.stateful["reference"] = self.reference
        self.sampler = make_sampler(self)

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, through the chat template when it is a list of messages."""
        return encode_prompt(self.processing_class, prompt, self.args.chat_template_kwargs or {})

    def generate(self, examples: list[Example], num_generations: int) -> Rollouts:
        """Stage 1: sample `num_generations` completions of each example's prompt, in order."""

        def work() -> Rollouts:
            if self.rollout_func is not None:
                asked = [example for example in examples for _ in range(num_generations)]
                prompts = raw_prompts(asked)
                return from_function(self.rollout_func, prompts, self, self.eos_ids)
            prompts = [self.encode(example["prompt"]) for example in examples]
            with self.accelerator.autocast():
                limit = self.args.sampling_batch_size
                return in_parts(self.sampler, prompts, num_generations, limit)

        return together(self.accelerator, work)

    def score(self, examples: list[Example], rollouts: Rollouts) -> Tensor:
        """Stage 2: rewards (B, K) of this rank, float32 on the CPU, NaN = unscorable."""
        prompts = [example["prompt"] for example in examples]
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        del columns["prompt"]
        columns.update(rollouts.extras or {})
        return self.rewards.score(
            prompts,
            [completion_of(p, t) for p, t in zip(prompts, self._texts(rollouts), strict=True)],
            rollouts.completion_ids,
            columns,
            trainer_state=self.state,
            log_extra=self._extras.__setitem__,
            log_metric=self._metrics_in_use.add,
        )

    def advantages(self, rewards: Tensor, num_generations: int) -> tuple[Tensor, Tensor]:
        """Stage 3: rewards (B, K) of all ranks -> advantages (B,) and weighted rewards (P, G)."""
        total = weighted(rewards, self.rewards.weights).view(-1, num_generations)
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            weights = self.rewards.weights
            return decoupled_advantages(rewards, weights, num_generations), total
        name, options = self.args.estimator
        return advantages_of(name, total, **options).flatten(), total

    def batch(
        self, rollouts: Rollouts, advantages: Tensor, evaluate: bool = False
    ) -> list[MicroBatch]:
        """Stage 4: packed micro-batches of this rank's rollouts, advantages (B,) beside them.

        old_logp is None when every use of the window falls in the optimizer step that sampled it:
        the policy is then its own old policy.
        """
        size = self.args.per_device_eval_batch_size if evaluate else self._train_batch_size
        old = not (evaluate or self.args.on_policy or self._sampler_says_old(rollouts))
        out = []
        for start in range(0, len(advantages), size):
            part = slice(start, start + size)
            packed = pack(
                rollouts.prompt_ids[part],
                rollouts.completion_ids[part],
                pad_id=self.processing_class.pad_token_id,
                row_length=self.row_length,
                multiple=self.args.row_multiple,
                device=self.args.device,
            )
            micro = self.micro_batch(
                packed=packed,
                advantages=advantages[part].to(self.args.device, torch.float32),
                mask=mask_of(rollouts, part, packed, self.args.mask_truncated_completions),
                rollout_logp=flat(rollouts.logp, part, torch.float32, self.args.device),
            )
            self.measure(micro, old)
            if micro.rollout_logp is not None:
                self._compare(micro, first=start == 0)
            if self.reference is not None:
                micro.ref_logp = self.reference.logprobs(
                    lambda m, packed=packed: self._logprobs(m, packed)
                )
            out.append(micro)
        return out

    def _sampler_says_old(self, rollouts: Rollouts) -> bool:
        return self.args.old_logp_source == "sampler" and rollouts.logp is not None

    def measure(self, micro: MicroBatch, old: bool) -> None:
        """Fill in what the policy says of a micro-batch: old_logp where `old` asks for it."""
        if old:
            micro.old_logp = self._logprobs(self.model, micro.packed)

    def _compare(self, micro: MicroBatch, first: bool) -> None:
        """How near the sampler's log-probs are; measured on what is known, at least once a window.

        Where they agree they can be the old ones (`old_logp_source`), and need no correction then.
        """
        if first or micro.old_logp is not None:
            ours = micro.old_logp
            ours = self._logprobs(self.model, micro.packed) if ours is None else ours
            gap = agreement(ours, micro.rollout_logp, micro.mask, self._metrics_in_use)
            self._near = agrees(gap, self.args) if first else self._near
        asked = self.args.old_logp_source == "sampler"
        if asked and self._near and not micro.rollout_logp.isnan().any():
            micro.old_logp, micro.rollout_logp = micro.rollout_logp, None
            return
        logger.warning_once(CORRECTED, self.loss_config.rollout_correction)
        if asked and not self.args.on_policy:
            self.measure(micro, True)

    def loss(self, model: nn.Module, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: one packed forward through the wrapped model -> (loss, metrics of the loss)."""
        packed = micro.packed

        def head_fn(hidden: Tensor, head: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return self.policy_loss(packed.select(hidden), head, micro)

        return self.with_router_loss(model, packed, head_fn)

    def policy_loss(
        self, hidden: Tensor, head: Any, micro: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the policy on hidden (N, H), and its metrics."""
        packed = micro.packed
        loss, metrics, *terms = linear_policy_loss(
            hidden,
            head,
            packed.ids,
            micro.advantages,
            config=self.current_loss_config(),
            mask=micro.mask,
            cu_seqlens=packed.cu_seqlens,
            old_logp=micro.old_logp,
            ref_logp=micro.ref_logp,
            rollout_logp=micro.rollout_logp,
            denominator=micro.denominator,
            workspace_bytes=self.args.workspace_bytes,
            per_token="approx_kl" in self.metrics.means,
        )
        for term in terms:
            metrics["approx_kl"] = approximate_kl(term.logp, micro.old_logp, micro.mask)
        return loss, metrics

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued, the rewards among it."""
        rewards = [self.rewards.names, self.rewards.weights.tolist()]
        return {**super().fingerprint(), "rewards": rewards}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Stage 6: add the metrics since the last log; evaluation brings its own."""
        closing = "train_runtime" in logs and self.metrics.host
        if "loss" in logs or closing:
            logs = {**self.named(self.metrics.reduce(self.accelerator)), **logs}
            self.metrics.reset()
            if self.args.log_completions:
                folder = Path(self.args.output_dir) / "completions"
                limit = self.args.num_completions_to_print
                self.completions.flush(self.accelerator, folder, self.state.global_step, limit)
        super().log(logs, start_time)

    def rollout(
        self,
        examples: list[Example],
        num_generations: int,
        metrics: Metrics,
        evaluate: bool = False,
    ) -> list[MicroBatch]:
        """Stages 1 to 4 for this rank's share of a window; examples repeat each prompt G times."""
        # a rank's share may begin and end inside a group; runs of one prompt are multiples of this
        repeat = math.gcd(num_generations, len(examples))
        self._extras, self._metrics_in_use = {}, metrics
        rollouts = self.generate(examples[::repeat], repeat)
        if rollouts.version is None:
            rollouts.version = self.state.global_step
        rewards = self.score(examples, rollouts)
        columns = (
            rollouts.lengths,
            rollouts.truncated,
            [len(ids) for ids in rollouts.prompt_ids],
        )
        facts = torch.stack([torch.tensor(c, dtype=torch.float64) for c in columns], dim=1)
        everyone = torch.cat([rewards.double(), facts], dim=1)
        first = 0
        if not evaluate and self.accelerator.num_processes > 1:
            first = self.accelerator.process_index * len(examples)
            everyone = self.accelerator.gather(everyone.to(self.args.device)).cpu()
        kinds = rewards.shape[1]
        rewards, lengths, cut, prompts = everyone.float()[:, :kinds], *everyone[:, kinds:].T
        advantages, total = self.advantages(rewards, num_generations)
        add_rollouts(metrics, self.rewards.names, rewards, total, lengths, cut.bool())
        local = slice(first, first + len(examples))
        if not evaluate:
            self.counters.tokens_seen += int(lengths.sum() + prompts.sum())
            metrics.add("num_tokens", self.counters.tokens_seen, "max")
            if self.args.log_completions:
                table = table_of(
                    self.state.global_step + 1,
                    [example["prompt"] for example in examples],
                    self._texts(rollouts),
                    dict(zip(self.rewards.names, rewards[local].T.tolist(), strict=True)),
                    advantages[local].tolist(),
                    self._extras,
                )
                self.completions.rows.extend(table)
        return self.batch(rollouts, advantages[local], evaluate)

    def _texts(self, rollouts: Rollouts) -> list[str]:
        return texts_of(self.processing_class, rollouts.completion_ids)

    @torch.no_grad()
    def _logprobs(self, model: nn.Module, packed: PackedBatch) -> Tensor:
        with evaluating(model), self.accelerator.autocast():
            return completion_logprobs(
                model, packed, self.args.temperature, workspace_bytes=self.args.workspace_bytes
            )

    def named(self, values: dict[str, float], evaluate: bool = False) -> dict[str, float]:
        """TRL's names for the metrics."""
        named = {name: v for name, v in values.items() if not name.startswith("tokens/")}
        ratios = not (evaluate or self.args.on_policy)
        kl = self.reference is not None
        return {**named, **loss_metrics(values, self.loss_config.loss_type, kl, ratios)}
