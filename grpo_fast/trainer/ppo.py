"""PPOTrainer: the stages of GRPOTrainer with a critic, rewards of tokens and GAE."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.advantages import whiten
from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.engine.logprob import linear_logprob
from grpo_fast.models.critic import (
    NAME,
    add_critic,
    check_source,
    load_critic,
    save_critic,
    separate_critic,
    shared_critic,
    takes_segments,
    width_of,
    without_critic,
)
from grpo_fast.models.head import evaluating
from grpo_fast.models.loading import config_of
from grpo_fast.models.packing import PackedBatch
from grpo_fast.rewards import weighted
from grpo_fast.rollout.rollouts import Rollouts

from .curves import CURVES
from .epochs import DealtBatch, DealtWindow
from .estimates import critic_report, estimate, value_term, window_kl
from .grpo import GRPOTrainer
from .ppo_config import PPOConfig
from .resume import ResumableTrainer
from .setup import disable_dropout
from .window import MicroBatch

logger = logging.getLogger(__name__)

_FINGERPRINTED = (
    "gamma",
    "lam",
    "lam_length_alpha",
    "value_lam",
    "whiten_advantages",
    "kl_coef",
    "kl_reward_estimator",
    "missing_eos_penalty",
    "critic",
    "value_detach",
    "value_loss",
    "cliprange_value",
    "huber_delta",
    "vf_coef",
    "value_warmup_steps",
    "reshuffle",
    "penalty_coef",
)
# further panels of curves.png
_CURVES = (
    ("value_loss", "value loss"),
    ("explained_variance", "explained variance of the returns"),
    ("returns_variance", "variance of the returns"),
    ("clip_ratio/region_mean", "share of tokens that the clip stops"),
    ("approx_kl", "approximate KL to the old policy (nats per token)"),
    ("kl_coef", "coefficient of the KL"),
    ("kl_per_completion", "KL to the reference (nats per completion)"),
    ("skipped_steps", "steps that target_kl has dropped"),
)


def _alone(value: Tensor) -> Tensor:
    return value


class PPOTrainer(GRPOTrainer):
    """Trains a causal language model and a critic with PPO on rewards of its own completions.

    The stages of `GRPOTrainer`, of which these are others:

        advantages(rewards, G)       -> (B,), (P, G)   the reward of each completion, as it is
        measure(micro_batch)                           old log-probs and values in one forward
        prepare(micro_batches)       -> [MicroBatch]   rewards of tokens, GAE, whitening
        loss(model, micro_batch)     -> loss, metrics  actor + vf_coef * value, in one forward

    In `advantages` and the table of completions the advantage is the reward; the advantages (N,)
    of tokens are made in `prepare`, once for each window, and stay as they are in all its epochs.

    Args:
        args: `PPOConfig`. All else as for `GRPOTrainer`, but for an optimizer in `optimizers`,
            which could not know the critic.

    Raises:
        ValueError: for bad arguments, data, head, critic or output folder, before any work.

    Source: Proximal Policy Optimization Algorithms (2017); Training language models to follow
    instructions with human feedback (2022).
    """

    fingerprinted = (*ResumableTrainer.fingerprinted, *_FINGERPRINTED)
    curves = (*CURVES, *_CURVES)
    micro_batch = DealtBatch
    args: PPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        *others: Any,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        **named: Any,
    ) -> None:
        args = PPOConfig(output_dir="ppo-output") if args is None else args
        if not isinstance(args, PPOConfig):
            fail("args", "a PPOConfig", type(args).__name__)
        if optimizers[0] is not None:
            hint = "set value_learning_rate, or override create_optimizer"
            fail("optimizers", "no optimizer, which would lack the critic", "one", hint)
        adapter = peft_config is not None or hasattr(model, "peft_config")
        if args.critic == "separate" and args.critic_model is None and adapter:
            expected = "a checkpoint: the backbone of a model with an adapter is not copied"
            fail("critic_model", expected, None)
        super().__init__(
            model,
            reward_funcs,
            args,
            *others,
            optimizers=optimizers,
            peft_config=peft_config,
            **named,
        )
        if args.deals:
            seed = f"{args.seed}:{self.accelerator.process_index}"
            kept = self.window
            self.window = DealtWindow(
                kept.kind, kept.size, kept.uses, kept.device, pack=self.pack, seed=seed
            )
            self.stateful["window"] = self.window

    def check_sources(self, model: Any, tokenizer: Any, args: PPOConfig) -> None:
        """Refuse a critic of another tokenizer, kind or width before anything is loaded."""
        if args.critic_model is None:
            return
        width = None
        if args.critic == "shared":
            width = width_of(config_of(model, args.model_init_kwargs))
        check_source(args.critic_model, tokenizer, args.critic, width)

    def _prepare_policy(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            fail("args", "one process or DDP: no critic is sharded yet", engine)
        # the reference is copied here, so that it holds no critic
        super()._prepare_policy()
        args = self.args
        if args.critic == "shared":
            critic = shared_critic(self.model, args.value_detach, args.critic_model)
        else:
            critic = separate_critic(self.model, args.critic_model, self.processing_class)
        if args.disable_dropout:
            disable_dropout(critic)
        self.critic = add_critic(self.model, critic)
        # what the critic cannot read, the policy does without
        if self.packer.segments and not takes_segments(critic, self.packer.pad_id):
            self.packer = replace(self.packer, segments=False, share=False)

    @property
    def skips_inactive(self) -> bool:
        """False: the critic learns of every completion."""
        return False

    @property
    def token_means(self) -> tuple[str, ...]:
        """Means over tokens that `loss` returns and that are logged."""
        means = (*super().token_means, "approx_kl", "value_loss", "value_clip_ratio")
        if self.args.penalty_coef > 0:
            means = (*means, "kl_to_old")
        return tuple(dict.fromkeys(means))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer; the critic has groups of its own with value_learning_rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.value_learning_rate
        if rate is None:
            return optimizer
        of_critic = {id(p) for p in self.critic.parameters()}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in of_critic]
            group["params"] = [p for p in group["params"] if id(p) not in of_critic]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def advantages(self, rewards: Tensor, num_generations: int) -> tuple[Tensor, Tensor]:
        """Stage 3: rewards (B, K) of all ranks -> weighted rewards, as (B,) and (P, G)."""
        total = weighted(rewards, self.rewards.weights).view(-1, num_generations)
        return total.flatten(), total

    def batch(
        self, rollouts: Rollouts, advantages: Tensor, evaluate: bool = False
    ) -> list[MicroBatch]:
        """Stage 4: packed micro-batches, with rewards (B,) where their advantages will be."""
        if self.args.missing_eos_penalty is not None:
            cut = torch.tensor(rollouts.truncated, dtype=advantages.dtype)
            advantages = advantages - self.args.missing_eos_penalty * cut
        micro_batches = super().batch(rollouts, advantages, evaluate)
        if self.args.deals and not evaluate:
            prompts = iter(rollouts.prompt_ids)
            for micro in micro_batches:
                count = micro.packed.cu_seqlens.numel() - 1
                micro.prompts = list(itertools.islice(prompts, count))
        return micro_batches

    def pack(self, prompts: list[list[int]], completions: list[list[int]]) -> PackedBatch:
        """A micro-batch of an epoch, packed anew."""
        return self.packer.pack(prompts, completions, self.args.device)

    @torch.no_grad()
    def measure(self, micro: MicroBatch, old: bool) -> None:
        """Fill in old_logp and values, by one forward for both."""
        packed = micro.packed

        def both(hidden: Tensor, head: Any) -> tuple[Tensor, Tensor]:
            rows = packed.select(hidden)
            out = linear_logprob(
                rows,
                head,
                packed.ids,
                temperature=self.args.temperature,
                workspace_bytes=self.args.workspace_bytes,
            )
            return out.logp, self.critic(packed, rows)

        with evaluating(self.model), self.accelerator.autocast():
            micro.old_logp, micro.values = self.model(**packed.inputs(), head_fn=both)

    @torch.no_grad()
    def prepare(self, micro_batches: list[MicroBatch], evaluate: bool = False) -> list[MicroBatch]:
        """Stage 5: advantages and returns (N,) of a window from rewards (S,) and values."""
        total: Callable[[Tensor], Tensor] = _alone
        if not evaluate:
            total = lambda value: self.accelerator.reduce(value, "sum")  # noqa: E731
        # a controller moves the coefficient of the penalty where there is one
        coefficient = self.args.kl_coef if self.args.penalty_coef > 0 else self.kl.coefficient
        done = [estimate(micro, self.args, coefficient) for micro in micro_batches]
        if done and self.args.whiten_advantages:
            masks = [micro.mask for micro in done]
            white = whiten([micro.advantages for micro in done], masks, total=total)
            done = [replace(m, advantages=a) for m, a in zip(done, white, strict=True)]
        if done:
            self._report(done, total, evaluate)
        return done

    def _report(
        self, done: list[MicroBatch], total: Callable[[Tensor], Tensor], evaluate: bool
    ) -> None:
        """Log how good the critic is and how far the policy has gone; teach the controller."""
        metrics = self._metrics_in_use
        for name, value in critic_report(done, total)._asdict().items():
            metrics.add(name, value)
        if self.reference is None:
            return
        kl, completions = window_kl(done, total)
        metrics.add("kl_per_completion", kl)
        if self.args.penalty_coef == 0:
            metrics.add("kl_coef", self.kl.coefficient)
        if evaluate:
            return
        if kl < -0.1:
            # beyond the noise of sampling
            logger.warning(
                "The KL to the reference is %.3g nats per completion. A negative one pays the "
                "policy; it comes from a sampler that is not the policy (top_k, top_p, penalties).",
                kl,
            )
        if self.args.penalty_coef == 0:
            self.kl.update(kl, completions)

    def learn_kl(self, sums: dict[str, float] | None) -> None:
        """With a penalty, tell the controller of the KL to the old policy that the last step of a
        window starts from; else it has learned of the window in `prepare`."""
        last = self.window.spent or (self.kl_stop is not None and self.kl_stop.stopped)
        if self.args.penalty_coef > 0 and last and sums and sums["completions"]:
            self.kl.update(sums["old"] / sums["completions"], int(sums["completions"]))

    def current_loss_config(self) -> LossConfig:
        """The loss of this step: with the coefficient of a controller that moves the penalty."""
        if self.args.kl_controller == "fixed" or self.args.penalty_coef == 0:
            return self.loss_config
        return replace(self.loss_config, beta=self.kl.coefficient)

    def policy_loss(
        self, hidden: Tensor, head: Any, micro: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the policy; its KL is that to the old policy where there is a penalty."""
        if self.args.penalty_coef == 0:
            return super().policy_loss(hidden, head, micro)
        loss, metrics = super().policy_loss(hidden, head, replace(micro, ref_logp=micro.old_logp))
        metrics["kl_to_old"] = metrics.pop("kl")
        return loss, metrics

    def loss(self, model: nn.Module, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 6: actor + vf_coef * value in one packed forward; the critic alone in warm-up.

        Both are weighted by the tokens in the same way and divided by the same denominator; the
        half of the squared error is in `value`, and the entropy bonus in `actor`.
        """
        packed = micro.packed

        def head_fn(hidden: Tensor, head: Any) -> tuple[Tensor, dict[str, Tensor]]:
            rows = packed.select(hidden)
            actor, metrics = self.policy_loss(rows, head, micro)
            value, own = value_term(self.critic(packed, rows), micro, self.args, self.loss_config)
            if self.warming_up:
                # a gradient of 0 for every parameter, which DDP waits for
                actor = 0.0 * actor
            return actor + self.args.vf_coef * value, {**metrics, **own}

        return self.with_router_loss(model, packed, head_fn)

    @property
    def warming_up(self) -> bool:
        """Whether the critic alone learns in this optimizer step."""
        return self.state.global_step < self.args.value_warmup_steps

    def before_step(self) -> None:
        """Judge the KL; in the warm-up also take every gradient from the policy, so that neither
        weight decay nor the value's gradient moves it."""
        if self.args.penalty_coef > 0:
            # what this step was made with
            self.metrics.add("kl_coef", self.kl.coefficient)
        super().before_step()
        if self.warming_up:
            of_critic = {id(p) for p in self.critic.parameters()}
            for parameter in self.model.parameters():
                if id(parameter) not in of_critic:
                    parameter.grad = None

    def named(self, values: dict[str, float], evaluate: bool = False) -> dict[str, float]:
        """TRL's names for the metrics; without groups none of theirs."""
        named = super().named(values, evaluate)
        if self.args.penalty_coef > 0:
            # the loss knows the KL to the old policy alone
            named.pop("kl", None)
        groups = self.args.num_generations_eval if evaluate else self.args.num_generations
        if groups == 1:
            named = {
                n: v for n, v in named.items() if n not in ("reward_std", "frac_reward_zero_std")
            }
        return named

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy as a plain causal language model, and the critic in a folder beside it."""
        state = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, without_critic(state))
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            save_critic(self.critic, Path(folder) / NAME, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        load_critic(self.critic, Path(resume_from_checkpoint) / NAME)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_critic(self.critic, Path(self.state.best_model_checkpoint) / NAME)
