"""GRPOTrainer: generate -> score -> advantages -> batch -> loss -> log, on HF's Trainer."""

from __future__ import annotations

from dataclasses import replace
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

from grpo_fast.checks import fail
from grpo_fast.loss.linear import linear_policy_loss
from grpo_fast.models.head import evaluating
from grpo_fast.models.packing import PackedBatch, completion_logprobs
from grpo_fast.models.policy import attach
from grpo_fast.models.reference import ReferencePolicy
from grpo_fast.models.router import router_coefficient
from grpo_fast.models.sharding import reshard
from grpo_fast.models.shared_prompts import packer_of
from grpo_fast.rollout.rollouts import Rollouts

from .active import active_part, count_of
from .banner import Banner
from .config import GRPOConfig
from .curves import CURVES, Curves, Row
from .head_sharding import HeadSharding
from .kl import approximate_kl
from .kl_reward import with_kl
from .loop import Example, StepCallback
from .memory import watch_memory
from .prompts import encode_prompt
from .replay import GroupReplay
from .reporting import CORRECTED, MetricsFile, Progress
from .sampler import check_prompts
from .samplers import (
    agreement,
    agrees,
    from_function,
    in_parts,
    make_sampler,
    raw_prompts,
)
from .scored import ScoredTrainer
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


class GRPOTrainer(TRLNames, ScoredTrainer):
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

    Attributes:
        curves: what curves.png shows, (metric, title) for each panel.
    """

    curves: tuple[Row, ...] = CURVES

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
        self.check_sources(model, tokenizer, args)
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
            callbacks=[
                MetricsFile(args.output_dir),
                Curves(args.output_dir, self.curves),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        # older transformers ask this instead of loss_is_scaled_for_ga, and before 5.8 Accelerate
        # divides once more
        self.model_accepts_loss_kwargs = True
        self.accelerator.gradient_accumulation_steps = 1
        self.add_callback(StepCallback(self))
        self.add_callback(Banner(self))
        watch_memory(self)
        # not in a notebook, whose callback draws a table of its own
        if any(type(c) is ProgressCallback for c in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress)
        self._prepare_policy()
        self.replay = GroupReplay.of(args)
        if self.replay is not None:
            self.stateful["replay"] = self.replay
        # ranks that start from one seed would sample alike
        set_seed(args.seed, device_specific=True)

    def check_sources(self, model: Any, tokenizer: Any, args: GRPOConfig) -> None:
        """Refuse what a subclass would load beside the model, before anything is: nothing here."""

    def _prepare_policy(self) -> None:
        self.check_engine()
        attach(self.model)
        share = self.args.share_prompts
        packer = packer_of(self.model, self.processing_class.pad_token_id, share)
        self.packer = replace(packer, multiple=self.args.row_multiple)
        if share and self.packer.reason and self.is_world_process_zero():
            logger.warning("Prompts are computed once per completion: %s.", self.packer.reason)
        peft = hasattr(self.model, "peft_config")
        if self.args.head_sharding is not None:
            self.head_sharding = HeadSharding(self)
        if self.args.needs_reference:
            self.reference = ReferencePolicy(self.model, peft, self.shard_frozen)
            self.stateful["reference"] = self.reference
        self.sampler = make_sampler(self)

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, through the chat template when it is a list of messages."""
        return encode_prompt(self.processing_class, prompt, self.args.chat_template_kwargs or {})

    def generate(self, examples: list[Example], num_generations: int) -> Rollouts:
        """Stage 1: sample `num_generations` completions of each example's prompt, in order."""

        if self.rollout_func is not None:
            asked = [example for example in examples for _ in range(num_generations)]
            return from_function(self.rollout_func, raw_prompts(asked), self, self.eos_ids)
        prompts = [self.encode(example["prompt"]) for example in examples]
        with self.accelerator.autocast():
            limit = self.args.sampling_batch_size
            return in_parts(self.sampler, prompts, num_generations, limit)

    def prepare(self, micro_batches: list[MicroBatch], evaluate: bool = False) -> list[MicroBatch]:
        """With kl_in_reward, advantages of the rewards minus the KL; else nothing."""
        if not self.args.kl_in_reward or not micro_batches:
            return micro_batches
        return with_kl(self, micro_batches, evaluate)

    def batch(
        self, rollouts: Rollouts, advantages: Tensor, evaluate: bool = False
    ) -> list[MicroBatch]:
        """Stage 4: packed micro-batches of this rank's rollouts, advantages (B,) beside them.

        old_logp is None when every use of the window falls in the optimizer step that sampled it:
        the policy is then its own old policy. So it is where nothing asks for it.
        """
        size = self.args.per_device_eval_batch_size if evaluate else self._train_batch_size
        old = self.args.measures_old and not (evaluate or self._sampler_says_old(rollouts))
        if rollouts.logp is not None and self.args.ratio_to != "old":
            expected = "'old' with a sampler that gives its log-probs"
            fail("ratio_to", expected, repr(self.args.ratio_to))
        whole, skips = self.args.mask_truncated_completions, self.skips_inactive and not evaluate
        out = []
        for start in range(0, len(advantages), size):
            part = slice(start, start + size)
            given, scores, count = rollouts.part(part), advantages[part], None
            if skips:
                count = count_of(given, self.loss_config, whole).to(self.args.device)
                given, scores = active_part(given, scores, whole)
            packed = self.packer.pack(given.prompt_ids, given.completion_ids, self.args.device)
            micro = self.micro_batch(
                packed=packed,
                advantages=scores.to(self.args.device, torch.float32),
                mask=mask_of(given, slice(None), packed, whole),
                rollout_logp=flat(given.logp, slice(None), torch.float32, self.args.device),
                count=count,
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

    @property
    def skips_inactive(self) -> bool:
        """Whether completions without a gradient need no forward: what `skip_inactive_completions`
        asks for, where neither the loss nor a stage that a subclass replaced could need them."""
        stages = ("loss", "policy_loss", "measure", "prepare")
        ours = all(getattr(type(self), n) is getattr(GRPOTrainer, n) for n in stages)
        config = self.loss_config
        needs = (
            self.reference is not None
            or self.replay is not None
            or self.router_coef != 0
            or self.entropy.on
            or self.step_kl is not None
            or config.beta != 0
            or config.entropy_coef != 0
            or config.top_entropy_quantile < 1
        )
        return self.args.skip_inactive_completions and ours and not needs

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
        if asked and self.args.measures_old:
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
        packed, config = micro.packed, self.current_loss_config()
        if self.head_sharding is not None:
            return self.head_sharding.loss(hidden, head, micro, config, self.args.workspace_bytes)
        below = micro.old_logp if self.args.ratio_to == "old" else micro.ref_logp
        loss, metrics, *terms = linear_policy_loss(
            hidden,
            head,
            packed.ids,
            micro.advantages,
            config=config,
            mask=micro.mask,
            cu_seqlens=packed.cu_seqlens,
            old_logp=below,
            ref_logp=micro.ref_logp,
            rollout_logp=micro.rollout_logp,
            denominator=micro.denominator,
            workspace_bytes=self.args.workspace_bytes,
            per_token="approx_kl" in self.metrics.means,
        )
        for term in terms:
            metrics["approx_kl"] = approximate_kl(term.logp, micro.old_logp, micro.mask)
        return loss, metrics

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
