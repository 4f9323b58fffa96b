"""IterativeGRPO: policy and reward model teach each other, in stages that survive a kill."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import time
from pathlib import Path
from typing import Any

from grpo_fast.checks import fail
from grpo_fast.models.loading import load_policy, load_processing
from grpo_fast.rewards import RewardSet, load_reward
from grpo_fast.rewards.model import RewardModel

from . import checkpoint
from .config import GRPOConfig
from .grpo import GRPOTrainer
from .iterative_config import IterativeConfig
from .iterative_parts import (
    Policy,
    Row,
    accuracy_on,
    agreement,
    distinct,
    mean_kl,
    mean_of,
    rewards_of_rows,
)
from .iterative_report import write_report
from .labels import (
    LABELS,
    TO_LABEL,
    LabelsNeeded,
    export,
    identifiers,
    judged,
    read_labels,
    sets_of_labels,
)
from .mixture import mixture
from .preferences import RankedSet, split_by_prompt
from .reward_config import RewardModelConfig
from .reward_model import RewardModelTrainer
from .sampler import check_dataset, column_names
from .stages import Stages, drop_run, read_rows, stage_seed, train_in, write_rows

logger = logging.getLogger(__name__)

STAGES = ("collect", "label", "reward", "policy", "report")
FILE = "file"


class IterativeGRPO:
    """The loop of iterative GRPO: for t = 1 ... T

        collect  G completions of prompts, and of held-out ones, from policy t-1
        label    by the judge -> ranked sets D_t, held-out ones apart
        reward   R_t, going on from R_(t-1), on (1 - beta) D_t + beta of the older, discount gamma
        policy   policy t, going on from policy t-1, which is its reference too; reward R_t
        report   judge, reward, accuracy of R_t on the held-out sets of every iteration, KLs

    DeepSeekMath (Shao et al., 2024), algorithm 1. Each stage is a folder that is written once,
    sealed, and seeded by (seed, t, stage); a run that was killed goes on where it was, and on a CPU
    ends bit for bit as one that was not. Optimizers and schedules begin anew in every stage.

    Args:
        model: the first policy: checkpoint name or folder.
        judge: one or more reward functions or names that `GRPOTrainer` takes, an endpoint's
            `rule:judge?...` among them; "file": people fill in a file between two runs.
        args: `IterativeConfig`.
        train_dataset: rows with `prompt`; the judge gets the other columns.
        policy_args: `GRPOConfig` of every policy stage. Its max_steps is that of one iteration.
        reward_args: `RewardModelConfig` of every reward stage.
        reward_model: checkpoint that R_1 goes on from; None: the first policy with a new score.

    Raises:
        ValueError: for bad arguments or data, before any work.
    """

    def __init__(
        self,
        model: str,
        judge: Any,
        args: IterativeConfig | None = None,
        train_dataset: Any = None,
        policy_args: GRPOConfig | None = None,
        reward_args: RewardModelConfig | None = None,
        reward_model: str | None = None,
    ) -> None:
        self.args = IterativeConfig() if args is None else args
        root = self.args.output_dir
        self.policy_args = policy_args or GRPOConfig(output_dir=root, max_steps=50)
        self.reward_args = reward_args or RewardModelConfig(output_dir=root)
        for name, value, kind in (
            ("args", self.args, IterativeConfig),
            ("policy_args", self.policy_args, GRPOConfig),
            ("reward_args", self.reward_args, RewardModelConfig),
            ("model", model, str),
        ):
            if not isinstance(value, kind):
                fail(name, f"a {kind.__name__}", type(value).__name__)
        if self.policy_args.world_size > 1:
            fail("args", "one process", f"{self.policy_args.world_size}", "train stages apart.")
        check_dataset("train_dataset", train_dataset)
        self.model, self.reward_model = model, reward_model
        self.judge = None if judge == FILE else _judge(judge, self.policy_args)
        if self.judge is not None:
            self.judge.check_columns(column_names(train_dataset))
        rows = [dict(train_dataset[i]) for i in range(len(train_dataset))]
        share = self.args.validation_split
        self.prompts, self.held_out = split_by_prompt(rows, share, self.args.seed)
        self.stages = Stages(root, self._fingerprint(rows))
        self.seconds: dict[str, list[float]] = {}

    def _fingerprint(self, rows: list[Row]) -> dict[str, Any]:
        own = dataclasses.asdict(self.args)
        for name in ("output_dir", "iterations", "patience", "min_delta"):
            del own[name]
        policy, reward = self.policy_args, self.reward_args
        names = (*GRPOTrainer.fingerprinted, "max_steps", "max_completion_length", "temperature")
        more = ("max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_steps")
        return {
            **own,
            "model": self.model,
            "reward_model": self.reward_model,
            "judge": FILE if self.judge is None else self.judge.names,
            "train_dataset": checkpoint.digest(rows),
            **{f"policy.{name}": getattr(policy, name) for name in names},
            "policy.loss": dataclasses.asdict(policy.loss_config()),
            **{f"reward.{n}": getattr(reward, n) for n in RewardModelTrainer.fingerprinted},
            **{f"reward.{name}": getattr(reward, name) for name in more},
        }

    def train(self) -> list[dict[str, Any]]:
        """Run what is missing, and return the report of each iteration.

        Raises:
            Interrupted: a signal ended a trainer before its last step.
            LabelsNeeded: the judge is a file that is not there yet.
            ValueError: the folder holds another run's stages, or damaged ones.
        """
        with self.stages.held():
            self._stage(0, "start", self._start)
            reports: list[dict[str, Any]] = []
            for t in range(1, self.args.iterations + 1):
                for name in STAGES:
                    self._stage(t, name, getattr(self, f"_{name}"))
                text = (self.folder(t, "report") / "report.json").read_text(encoding="utf-8")
                reports.append(json.loads(text))
                write_report(Path(self.args.output_dir) / "report", reports)
                self._notices(reports)
                if self._plateau(reports):
                    logger.warning("patience: no better judge score, stopped after %d", t)
                    break
        return reports

    def folder(self, t: int, stage: str) -> Path:
        """The folder of a stage."""
        return self.stages.path(f"{t:03d}-{stage}")

    def policy_folder(self, t: int) -> Path:
        """The policy after iteration t; 0 is the first one."""
        return self.folder(t, "policy" if t else "start") / "model"

    def reward_folder(self, t: int) -> str | None:
        """The reward model of iteration t, or what the first one goes on from."""
        return str(self.folder(t, "reward") / "model") if t else self.reward_model

    def _stage(self, t: int, name: str, work: Any) -> None:
        full = f"{t:03d}-{name}"
        if self.stages.done(full):
            return
        began = time.perf_counter()
        print(f"[iteration {t} of {self.args.iterations}] {name}{self._left(t, name)}", flush=True)
        self.stages.run(full, lambda folder: work(t, folder))
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def _left(self, t: int, name: str) -> str:
        """Time left, once each stage to come has been seen; stages of this process only."""
        if not set(STAGES) <= self.seconds.keys():
            return ""
        mean = {stage: sum(own) / len(own) for stage, own in self.seconds.items()}
        rest = sum(mean[stage] for stage in STAGES[STAGES.index(name) :])
        rest += (self.args.iterations - t) * sum(mean[stage] for stage in STAGES)
        return f", about {rest / 60:.1f} min left" if rest >= 60 else f", about {rest:.0f} s left"

    def _seed(self, t: int, stage: str) -> int:
        return stage_seed(self.args.seed, t, stage)

    def _start(self, t: int, folder: Path) -> None:
        """The first policy as a folder of this run, whatever becomes of where it came from."""
        kwargs = dict(self.policy_args.model_init_kwargs or {})
        load_policy(self.model, **kwargs).save_pretrained(folder / "model")
        tokenizer = load_processing(self.model, gguf_file=kwargs.get("gguf_file"))
        tokenizer.save_pretrained(folder / "model")

    def _collect(self, t: int, folder: Path) -> None:
        policy = Policy(self.policy_folder(t - 1), self.policy_args)
        order = random.Random(f"{self.args.seed}:{t}:prompts")
        count = min(self.args.collect_prompts, len(self.prompts))
        asked = order.sample(self.prompts, count)
        # the same ones in every iteration: what changes is who answers
        held_out = self.held_out[: self.args.held_out_prompts]
        rows = policy.sample(
            [*asked, *held_out],
            self.policy_args.num_generations,
            self._seed(t, "collect"),
            self.policy_args.generation_batch_size,
        )
        for index, row in enumerate(rows):
            row["id"] = f"{t:03d}-{index:05d}"
            row["held_out"] = index >= count
        write_rows(folder / "completions.jsonl", rows)

    def rows_of(self, t: int) -> list[Row]:
        """The completions collected in iteration t, held-out ones last."""
        return read_rows(self.folder(t, "collect") / "completions.jsonl")

    def _label(self, t: int, folder: Path) -> None:
        rows = self.rows_of(t)
        if self.judge is None:
            root = Path(self.args.output_dir)
            questions, labels = root / f"{t:03d}-{TO_LABEL}", root / f"{t:03d}-{LABELS}"
            if not labels.is_file():
                write_rows(questions, export(rows))
                raise LabelsNeeded(questions, labels, sum(len(r["completions"]) for r in rows))
            scores = read_labels(labels, rows)
        else:
            scores = judged(self.judge, rows)
        if not sets_of_labels([r for r in rows if not r["held_out"]], _of(rows, scores, False))[0]:
            hint = "collect more prompts, or take a judge that tells answers apart."
            got = "answers of one score for every prompt"
            fail("judge", "a preference among the answers of some prompt", got, hint)
        entries = zip(identifiers(rows), scores, strict=True)
        write_rows(folder / "scores.jsonl", [{"ids": i, "scores": s} for i, s in entries])

    def scores_of(self, t: int) -> list[list[float | None]]:
        """The judge's scores of the completions of iteration t."""
        return [row["scores"] for row in read_rows(self.folder(t, "label") / "scores.jsonl")]

    def sets(self, t: int, held_out: bool) -> list[RankedSet]:
        """The ranked sets of iteration t."""
        rows, scores = self.rows_of(t), self.scores_of(t)
        own = [row for row in rows if row["held_out"] == held_out]
        return sets_of_labels(own, _of(rows, scores, held_out))[0]

    def _reward(self, t: int, folder: Path) -> None:
        run, model = folder / "run", folder / "model"
        source = self.reward_folder(t - 1)
        if not self.args.retrain and source is not None:
            # the control: the first reward model, unchanged
            reward = RewardModel(source)
            reward.model.save_pretrained(model)
            reward.tokenizer.save_pretrained(model)
            return
        history = [self.sets(k, False) for k in range(1, t + 1)]
        beta, gamma = self.args.history_share, self.args.history_discount
        drawn = mixture(history, beta, gamma, f"{self.args.seed}:{t}", self.args.mixture_size)
        seed = self._seed(t, "reward")
        args = dataclasses.replace(self.reward_args, output_dir=str(run), seed=seed)
        held_out = self.sets(t, True)
        trainer = RewardModelTrainer(
            source or str(self.policy_folder(0)),
            args,
            [_as_row(one) for one in drawn],
            [_as_row(one) for one in held_out] or None,
        )
        train_in(trainer, run)
        trainer.save_model(str(model))
        drop_run(run)

    def _policy(self, t: int, folder: Path) -> None:
        run = folder / "run"
        args = dataclasses.replace(
            self.policy_args,
            output_dir=str(run),
            seed=self._seed(t, "policy"),
            model_init_kwargs=None,
        )
        trainer = GRPOTrainer(
            str(self.policy_folder(t - 1)), self.reward_folder(t), args, self.prompts
        )
        train_in(trainer, run)
        trainer.save_model(str(folder / "model"))
        drop_run(run)

    def _report(self, t: int, folder: Path) -> None:
        policy = Policy(self.policy_folder(t), self.policy_args)
        examples = self.held_out[: self.args.held_out_prompts]
        rows = policy.sample(
            examples,
            self.policy_args.num_generations,
            self._seed(t, "report"),
            self.policy_args.generation_batch_size,
        )
        own, entropy = policy.measure(rows)
        del policy
        others = {
            name: Policy(self.policy_folder(k), self.policy_args).measure(rows)[0]
            for name, k in (("kl_first", 0), ("kl_last", t - 1))
        }
        reward = RewardModel(self.reward_folder(t))
        before = [row for row in self.rows_of(t) if row["held_out"]]
        known = _of(self.rows_of(t), self.scores_of(t), True)
        rewards = rewards_of_rows(reward, rows)
        report: dict[str, Any] = {
            "iteration": t,
            "judge_before": mean_of(known),
            "reward_before": mean_of(rewards_of_rows(reward, before)),
            "reward": mean_of(rewards),
            **{name: mean_kl(own, logps) for name, logps in others.items()},
            "entropy": entropy,
            "distinct_1": distinct(rows, 1),
            "distinct_2": distinct(rows, 2),
            "length": sum(len(i) for r in rows for i in r["completion_ids"])
            / sum(len(r["completions"]) for r in rows),
            "pairs": sum(one.pairs for one in self.sets(t, False)),
            "accuracy": [self._accuracy(reward, self.sets(k, True)) for k in range(1, t + 1)],
        }
        if self.judge is not None:
            scores = judged(self.judge, rows)
            new, _ = sets_of_labels(rows, scores)
            report["judge"] = mean_of(scores)
            report["accuracy_new"] = self._accuracy(reward, new)
            report["agreement"] = agreement(scores, rewards)
        report["samples"] = [
            {"prompt": row["prompt"], "completion": row["completions"][0], "reward": own[0]}
            for row, own in list(zip(rows, rewards, strict=True))[:4]
        ]
        report = {k: None if _lost(v) else v for k, v in report.items()}
        checkpoint.write_json(folder / "report.json", report)

    def _accuracy(self, reward: RewardModel, sets: list[RankedSet]) -> float | None:
        return accuracy_on(reward, sets)["accuracy"] if sets else None

    def _notices(self, reports: list[dict[str, Any]]) -> None:
        last = reports[-1]
        if last["pairs"] < self.args.min_pairs:
            text = "iteration %d: the judge's scores make only %d ordered pairs (min_pairs %d)"
            logger.warning(text, last["iteration"], last["pairs"], self.args.min_pairs)
        if hacked(last):
            text = "iteration %d: the reward rose from %.3g to %.3g while the judge's score fell "
            text += "from %.3g to %.3g: the policy may have learnt the reward model's mistakes"
            names = ("iteration", "reward_before", "reward", "judge_before", "judge")
            logger.warning(text, *(last[name] for name in names))

    def _plateau(self, reports: list[dict[str, Any]]) -> bool:
        if not self.args.patience:
            return False
        name = "judge" if self.judge is not None else "judge_before"
        scores = [r[name] for r in reports if r.get(name) is not None]
        if len(scores) <= self.args.patience:
            return False
        best = max(scores[: -self.args.patience])
        return max(scores[-self.args.patience :]) < best + max(self.args.min_delta, 1e-12)


def hacked(report: dict[str, Any]) -> bool:
    """Whether an iteration raised its reward and lowered the judge's score, on held-out prompts."""
    values = [report.get(k) for k in ("reward_before", "reward", "judge_before", "judge")]
    if any(value is None for value in values):
        return False
    return values[1] > values[0] and values[3] < values[2]


def _lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _of(rows: list[Row], scores: list[Any], held_out: bool) -> list[Any]:
    return [s for row, s in zip(rows, scores, strict=True) if row["held_out"] == held_out]


def _as_row(one: RankedSet) -> Row:
    return {"prompt": one.prompt, "completions": one.completions, "scores": one.ratings}


def _judge(judge: Any, args: GRPOConfig) -> RewardSet:
    judges = judge if isinstance(judge, (list, tuple)) else [judge]
    judges = [
        load_reward(one) if isinstance(one, str) and ":" in one and not Path(one).exists() else one
        for one in judges
    ]
    return RewardSet(judges, device=args.device, timeout=args.reward_timeout)
