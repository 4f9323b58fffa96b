"""PPOTrainer: the stages of GRPOTrainer with a critic, rewards of tokens and GAE."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.advantages import (
    explained_variance,
    gae,
    length_lam,
    token_kl,
    token_rewards,
    whiten,
)
from grpo_fast.checks import fail
from grpo_fast.engine.logprob import linear_logprob
from grpo_fast.models.critic import (
    NAME,
    add_critic,
    load_critic,
    save_critic,
    separate_critic,
    shared_critic,
    without_critic,
)
from grpo_fast.models.head import evaluating
from grpo_fast.objective.value import value_loss
from grpo_fast.objective.weights import token_weights
from grpo_fast.rewards import weighted
from grpo_fast.rollout.rollouts import Rollouts

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

    def _prepare_policy(self) -> None:
        # the reference is copied here, so that it holds no critic
        super()._prepare_policy()
        args = self.args
        if args.critic == "shared":
            critic = shared_critic(self.model, args.value_detach)
        else:
            critic = separate_critic(self.model, args.critic_model, self.processing_class)
        if args.disable_dropout:
            disable_dropout(critic)
        self.critic = add_critic(self.model, critic)

    @property
    def token_means(self) -> tuple[str, ...]:
        """Means over tokens that `loss` returns and that are logged."""
        means = (*super().token_means, "approx_kl", "value_loss", "value_clip_ratio")
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
        return super().batch(rollouts, advantages, evaluate)

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
        done = [self._estimate(micro) for micro in micro_batches]
        masks = [micro.mask for micro in done]
        if done and self.args.whiten_advantages:
            white = whiten([micro.advantages for micro in done], masks, total=total)
            done = [replace(m, advantages=a) for m, a in zip(done, white, strict=True)]
        if done:
            self._report(done, masks, total, evaluate)
        return done

    def _estimate(self, micro: MicroBatch) -> MicroBatch:
        args, bounds, scores = self.args, micro.packed.cu_seqlens, micro.advantages
        mask, judged = micro.mask, ~scores.isnan()
        if not judged.all():
            # what could not be judged teaches nothing, neither policy nor critic
            of_tokens = judged.repeat_interleave(bounds.diff())
            mask = of_tokens if mask is None else mask & of_tokens
            scores = torch.where(judged, scores, torch.zeros_like(scores))
        coefficient = self.kl.coefficient
        kl = None
        if coefficient and micro.ref_logp is not None:
            kl = token_kl(micro.old_logp, micro.ref_logp, args.kl_reward_estimator)
        rewards = token_rewards(scores, bounds, kl=kl, kl_coef=coefficient, mask=mask)
        alpha = args.lam_length_alpha
        lam = args.lam if alpha is None else length_lam(bounds, alpha, mask)
        given = {"gamma": args.gamma, "mask": mask}
        advantages, returns = gae(rewards, micro.values, bounds, lam=lam, **given)
        if args.value_lam is not None:
            _, returns = gae(rewards, micro.values, bounds, lam=args.value_lam, **given)
        return replace(micro, advantages=advantages, returns=returns, mask=mask)

    def _report(
        self,
        done: list[MicroBatch],
        masks: list[Tensor | None],
        total: Callable[[Tensor], Tensor],
        evaluate: bool,
    ) -> None:
        """Log how good the critic is and how far the policy has gone; teach the controller."""
        metrics = self._metrics_in_use
        returns, values = [m.returns for m in done], [m.values for m in done]
        share, variance = explained_variance(returns, values, masks, total=total)
        metrics.add("explained_variance", share.item())
        metrics.add("returns_variance", variance.item())
        if self.reference is None:
            return
        gaps = [m.old_logp - m.ref_logp for m in done]
        pairs = zip(gaps, masks, strict=True)
        kept = [g if k is None else torch.where(k, g, torch.zeros_like(g)) for g, k in pairs]
        count = sum(m.packed.cu_seqlens.numel() - 1 for m in done)
        sums = torch.stack((sum(k.sum() for k in kept), kept[0].new_tensor(float(count))))
        kl, completions = total(sums).tolist()
        kl /= max(completions, 1.0)
        metrics.add("kl_per_completion", kl)
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
        self.kl.update(kl, int(completions))

    def learn_kl(self, sums: dict[str, float] | None) -> None:
        """Nothing before a step: the controller learns of each window in `prepare`."""

    def loss(self, model: nn.Module, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 6: actor + vf_coef * value in one packed forward; the critic alone in warm-up.

        Both are weighted by the tokens in the same way and divided by the same denominator; the
        half of the squared error is in `value`, and the entropy bonus in `actor`.
        """
        packed = micro.packed

        def head_fn(hidden: Tensor, head: Any) -> tuple[Tensor, dict[str, Tensor]]:
            rows = packed.select(hidden)
            actor, metrics = self.policy_loss(rows, head, micro)
            value, own = self._value(self.critic(packed, rows), micro)
            if self.warming_up:
                # a gradient of 0 for every parameter, which DDP waits for
                actor = 0.0 * actor
            return actor + self.args.vf_coef * value, {**metrics, **own}

        return self.with_router_loss(model, packed, head_fn)

    def _value(self, values: Tensor, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted value loss, with a graph to the values, and its means over tokens."""
        args, mask = self.args, micro.mask
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        each, slope, binds = value_loss(
            values.detach(),
            micro.returns,
            micro.values,
            kind=args.value_loss,
            cliprange=args.cliprange_value,
            delta=args.huber_delta,
        )
        bounds = micro.packed.cu_seqlens
        weight = token_weights(self.loss_config, mask, bounds, micro.denominator)
        # the difference is 0, and its derivative the slope
        graph = each + slope * (values - values.detach())
        loss = (weight * torch.where(mask, graph, torch.zeros_like(graph))).sum()
        count = mask.sum().clamp(min=1)
        means = {"value_loss": each, "value_clip_ratio": binds.float()}
        means = {
            n: torch.where(mask, v, torch.zeros_like(v)).sum() / count for n, v in means.items()
        }
        return loss, means

    @property
    def warming_up(self) -> bool:
        """Whether the critic alone learns in this optimizer step."""
        return self.state.global_step < self.args.value_warmup_steps

    def before_step(self) -> None:
        """Judge the KL; in the warm-up also take every gradient from the policy, so that neither
        weight decay nor the value's gradient moves it."""
        super().before_step()
        if self.warming_up:
            of_critic = {id(p) for p in self.critic.parameters()}
            for parameter in self.model.parameters():
                if id(parameter) not in of_critic:
                    parameter.grad = None

    def named(self, values: dict[str, float], evaluate: bool = False) -> dict[str, float]:
        """TRL's names for the metrics; without groups none of theirs."""
        named = super().named(values, evaluate)
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
            save_critic(self.critic, Path(folder) / NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        load_critic(self.critic, Path(resume_from_checkpoint) / NAME)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_critic(self.critic, Path(self.state.best_model_checkpoint) / NAME)
