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
from grpo_fast.models.sharding import reshard
from grpo_fast.rewards import weighted
from grpo_fast.rollout.hf import HFSampler
from grpo_fast.rollout.rollouts import Rollouts

from .config import GRPOConfig
from .head_sharding import HeadSharding
from .kl import approximate_kl
from .loop import Example, RolloutTrainer, StepCallback
from .metrics import Metrics, add_rollouts, loss_metrics
from .record import completion_of, table_of
from .reporting import CORRECTED, Curves, MetricsFile, Progress
from .sampler import check_prompts, is_conversational
from .setup import (
    check_arguments,
    generation_of,
    policy_of,
    prompt_room,
    rewards_of,
    tokenizer_of,
)
from .window import MicroBatch, flat, mask_of

logger = logging.get_logger(__name__)


class GRPOTrainer(RolloutTrainer):
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
        train_dataset: map-style rows with `prompt`, text or messages; rewards get all columns.
        eval_dataset: the same, or a dict of them.
        processing_class: tokenizer; default: the one of the model.
        reward_processing_classes: tokenizers of the reward models.
        callbacks, optimizers: as for `Trainer`.
        peft_config: wraps the model in an adapter; the reference is then the model without it.

    Raises:
        ValueError: for bad arguments, data, head or output folder, before any work.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = GRPOConfig(output_dir="grpo-output") if args is None else args
        datasets = check_arguments(args, train_dataset, eval_dataset, model, peft_config)
        tokenizer = tokenizer_of(model, processing_class, args)
        self.rewards = rewards_of(reward_funcs, reward_processing_classes, args, datasets)
        # an adapter starts from random weights
        set_seed(args.seed)
        model = policy_of(model, args, peft_config)
        self.loss_config = args.loss_config()
        self.generation_config, self.eos_ids = generation_of(args, model, tokenizer)
        self.processing_class, self.args = tokenizer, args
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
        self.check_engine()
        attach(self.model)
        check_packing(self.model, self.processing_class.pad_token_id)
        self.row_length = default_row_length(self.model)
        peft = hasattr(self.model, "peft_config")
        if self.args.head_sharding is not None:
            self.head_sharding = HeadSharding(self)
        if self.args.needs_reference:
            self.reference = ReferencePolicy(self.model, peft, self.shard_frozen)
            self.stateful["reference"] = self.reference
        self.sampler = HFSampler(
            self.model,
            generation_config=self.generation_config,
            pad_id=self.processing_class.pad_token_id,
            eos_ids=self.eos_ids,
            gather=self.args.ds3_gather_for_generation,
        )

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, through the chat template when it is a list of messages."""
        if not is_conversational(prompt):
            return self.processing_class(prompt)["input_ids"]
        answered = prompt[-1]["role"] == "assistant"
        return self.processing_class.apply_chat_template(
            prompt,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=not answered,
            continue_final_message=answered,
            **(self.args.chat_template_kwargs or {}),
        )

    def generate(self, examples: list[Example], num_generations: int) -> Rollouts:
        """Stage 1: sample `num_generations` completions of each example's prompt, in order."""
        prompts = [self.encode(example["prompt"]) for example in examples]
        with self.accelerator.autocast():
            return self.sampler.sample(prompts, num_generations)

    def score(self, examples: list[Example], rollouts: Rollouts) -> Tensor:
        """Stage 2: rewards (B, K) of this rank, float32 on the CPU, NaN = unscorable."""
        prompts = [example["prompt"] for example in examples]
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        del columns["prompt"]
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
        old = not (evaluate or self.args.on_policy)
        if rollouts.logp is not None:
            logger.warning_once(CORRECTED, self.loss_config.rollout_correction)
        out = []
        for start in range(0, len(advantages), size):
            part = slice(start, start + size)
            packed = pack(
                rollouts.prompt_ids[part],
                rollouts.completion_ids[part],
                pad_id=self.processing_class.pad_token_id,
                row_length=self.row_length,
                device=self.args.device,
            )
            micro = self.micro_batch(
                packed=packed,
                advantages=advantages[part].to(self.args.device, torch.float32),
                mask=mask_of(rollouts, part, packed, self.args.mask_truncated_completions),
                rollout_logp=flat(rollouts.logp, part, torch.float32, self.args.device),
            )
            self.measure(micro, old)
            if self.reference is not None:
                micro.ref_logp = self.reference.logprobs(
                    lambda m, packed=packed: self._logprobs(m, packed)
                )
            out.append(micro)
        return out

    def measure(self, micro: MicroBatch, old: bool) -> None:
        """Fill in what the policy says of a micro-batch: old_logp where `old` asks for it."""
        if old:
            micro.old_logp = self._logprobs(self.model, micro.packed)

    def loss(self, model: nn.Module, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: one packed forward through the wrapped model -> (loss, metrics of the loss)."""
        packed = micro.packed

        def head_fn(hidden: Tensor, head: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return self.policy_loss(packed.select(hidden), head, micro)

        return model(**packed.inputs(), head_fn=head_fn)

    def policy_loss(
        self, hidden: Tensor, head: Any, micro: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the policy on hidden (N, H), and its metrics."""
        packed, config = micro.packed, self.current_loss_config()
        if self.head_sharding is not None:
            return self.head_sharding.loss(hidden, head, micro, config, self.args.workspace_bytes)
        loss, metrics, *terms = linear_policy_loss(
            hidden,
            head,
            packed.ids,
            micro.advantages,
            config=config,
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
        # without an engine ranks evaluate unequal numbers of batches, and are not here together
        alone = evaluate and self.engine is None
        together = (lambda _, stage: stage()) if alone else self.on_every_rank
        rollouts = together("sampling", lambda: self.generate(examples[::repeat], repeat))
        if rollouts.version is None:
            rollouts.version = self.state.global_step
        rewards = together("a reward", lambda: self.score(examples, rollouts))
        columns = (
            [len(ids) for ids in rollouts.completion_ids],
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
        return self.processing_class.batch_decode(rollouts.completion_ids, skip_special_tokens=True)

    @torch.no_grad()
    def _logprobs(self, model: nn.Module, packed: PackedBatch) -> Tensor:
        budget = self.args.workspace_bytes
        with evaluating(model), self.accelerator.autocast():
            if self.head_sharding is not None:
                logp = self.head_sharding.logprobs(model, packed, self.args.temperature, budget)
            else:
                logp = completion_logprobs(
                    model, packed, self.args.temperature, workspace_bytes=budget
                )
        reshard(model)
        return logp

    def named(self, values: dict[str, float], evaluate: bool = False) -> dict[str, float]:
        """TRL's names for the metrics."""
        named = {name: v for name, v in values.items() if not name.startswith("tokens/")}
        ratios = not (evaluate or self.args.on_policy)
        kl = self.reference is not None
        return {**named, **loss_metrics(values, self.loss_config.loss_type, kl, ratios)}
