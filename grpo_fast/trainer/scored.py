"""What a window of rollouts is worth, and what of it is told: rewards, advantages, logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast.advantages.decoupled import decoupled_advantages
from grpo_fast.advantages.table import advantages_of
from grpo_fast.rewards import RewardSet, weighted
from grpo_fast.rollout.rollouts import Rollouts

from .active import forward_share
from .loop import Example, RolloutTrainer
from .metrics import Metrics, add_rollouts, loss_metrics
from .prompts import texts_of
from .record import completion_of, table_of
from .replay import GroupReplay, mix
from .samplers import together
from .window import MicroBatch


class ScoredTrainer(RolloutTrainer):
    """The stages of a window that rewards decide, and the logs; the policy's are the subclass's.

        generate(examples, G)       -> Rollouts
        batch(rollouts, advantages) -> [MicroBatch]

    Attributes:
        rewards: what scores completions.
    """

    rewards: RewardSet
    replay: GroupReplay | None = None

    def generate(self, examples: list[Example], num_generations: int) -> Rollouts:
        """Stage 1: `num_generations` completions of each example's prompt, in order."""
        raise NotImplementedError

    def batch(
        self, rollouts: Rollouts, advantages: Tensor, evaluate: bool = False
    ) -> list[MicroBatch]:
        """Stage 4: micro-batches of this rank's rollouts, advantages (B,) beside them."""
        raise NotImplementedError

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

        def sample() -> Rollouts:
            return self.generate(examples[::repeat], repeat)

        # without an engine ranks evaluate unequal numbers of batches, and are not here together
        alone = evaluate and self.engine is None
        rollouts = sample() if alone else together(self.accelerator, sample)
        if rollouts.version is None:
            rollouts.version = self.state.global_step

        def score() -> Tensor:
            return self.score(examples, rollouts)

        rewards = score() if alone else self.on_every_rank("a reward", score)
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
            kept = self.eval_completions if evaluate else self.completions
            kept.rows += table_of(
                self.state.global_step + (not evaluate),
                [example["prompt"] for example in examples],
                self._texts(rollouts),
                dict(zip(self.rewards.names, rewards[local].T.tolist(), strict=True)),
                advantages[local].tolist(),
                self._extras,
            )
        fresh = self.batch(rollouts, advantages[local], evaluate)
        metrics.add("forward_share", forward_share(rollouts, fresh))
        replay = None if evaluate else self.replay
        return fresh if replay is None else mix(self, replay, fresh, rollouts)

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
        if self.args.kl_in_reward:
            # a reward still lacks its KL, see `prepare`
            return total.flatten(), total
        return self.of_groups(total), total

    def of_groups(self, total: Tensor) -> Tensor:
        """Rewards (P, G) -> advantages (B,), by the estimator of the options."""
        name, options = self.args.estimator
        return advantages_of(name, total, **options).flatten()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Stage 6: add the metrics since the last log; evaluation brings its own."""
        closing = "train_runtime" in logs and self.metrics.host
        if "loss" in logs or closing:
            logs = {**self.named(self.metrics.reduce(self.accelerator)), **logs}
            logs |= self.entropy.logs(logs)
            self.metrics.reset()
            if self.args.log_completions:
                folder = Path(self.args.output_dir) / "completions"
                limit = self.args.num_completions_to_print
                self.completions.flush(self.accelerator, folder, self.state.global_step, limit)
        elif self.eval_completions.rows:
            folder = Path(self.args.output_dir) / "completions"
            step = self.state.global_step
            self.eval_completions.flush(self.accelerator, folder, step, 0, "eval")
        super().log(logs, start_time)

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued, the rewards among it."""
        rewards = [self.rewards.names, self.rewards.weights.tolist()]
        return {**super().fingerprint(), "rewards": rewards}

    def named(self, values: dict[str, float], evaluate: bool = False) -> dict[str, float]:
        """TRL's names for the metrics."""
        named = {name: v for name, v in values.items() if not name.startswith("tokens/")}
        ratios = not (evaluate or self.args.on_policy) or self.args.ratio_to != "old"
        kl = self.reference is not None
        return {**named, **loss_metrics(values, self.loss_config.loss_type, kl, ratios)}

    def _texts(self, rollouts: Rollouts) -> list[str]:
        return texts_of(self.processing_class, rollouts.completion_ids)
