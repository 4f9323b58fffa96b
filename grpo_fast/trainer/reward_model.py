"""RewardModelTrainer: ranked sets -> packed scores -> Bradley-Terry or Plackett-Luce."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
)

from grpo_fast.checks import fail
from grpo_fast.models.classifier import (
    detach_rows,
    pack_texts,
    packed_scores,
)
from grpo_fast.models.head import evaluating, innermost
from grpo_fast.objective.preference import PREFERENCE_LOSSES, centring
from grpo_fast.rewards.model import RewardModel

from . import checkpoint
from .preference_metrics import preference_metrics
from .preferences import matrices, ranked_sets
from .reporting import MetricsFile
from .resume import ResumableTrainer
from .reward_config import RewardModelConfig
from .reward_parts import EpochOrder, Order, RewardCurves, RewardProgress, Sums, check_parts
from .reward_setup import (
    Encoded,
    PreferenceBatch,
    classifier_for,
    classifier_tokenizer,
    encoded,
    sets_of,
)
from .setup import check_writable

# attribute of a saved configuration: mean and std of the scores of the held-out answers
SCORES = "grpo_fast_scores"
# packed and padded scores of one model, relative to the largest of them; bf16 keeps 8 bits
_AGREE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
_AGREE_FP32 = 1e-3


class RewardModelTrainer(ResumableTrainer):
    """Trains a sequence classifier with one label on ranked answers.

        loss = sum over sets of loss_m / number of sets of the optimizer step over all ranks

    All answers of a micro-batch are one packed forward, and each score is read at the last token by
    length. What `save_model` writes is a plain `AutoModelForSequenceClassification` with its
    tokenizer: a reward for `GRPOTrainer`, for TRL and for transformers itself. An adapter is merged
    into it. Checkpoints are resumed as those of `GRPOTrainer`.

    Args:
        model: checkpoint name or folder of a reward model or a language model, a model of either
            kind, or a `PeftModel` of a classifier.
        args: `RewardModelConfig`.
        train_dataset: rows with prompt, chosen, rejected[, margin], or prompt, completions and
            ranks or scores; text or messages. See `ranked_sets`.
        eval_dataset: the same, or a dict of them; None: `args.validation_split`.
        processing_class: tokenizer; default: the one of the model.
        callbacks, optimizers: as for `Trainer`.
        peft_config: wraps the model in an adapter; its score is trained whole.

    Raises:
        ValueError: for bad arguments, data, model or output folder, before any work.
    """

    loss_is_scaled_for_ga = True
    fingerprinted = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "preference_loss",
        "margin_scale",
        "center_rewards_coefficient",
        "max_length",
        "truncate",
        "append_eos",
        "disable_dropout",
        "shuffle_dataset",
        "seed",
        "data_seed",
        "bf16",
        "fp16",
        "learning_rate",
        "weight_decay",
        "optim",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
    )

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: RewardModelConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = RewardModelConfig(output_dir="reward-output") if args is None else args
        check_parts(args, model, train_dataset, peft_config)
        check_writable(args.output_dir)
        train, held_out, self.dropped = sets_of(args, train_dataset, eval_dataset)
        tokenizer = classifier_tokenizer(model, processing_class, args)
        set_seed(args.seed)
        model = classifier_for(model, args, tokenizer, peft_config)
        config = innermost(model).config
        self.render = args.render(getattr(config, "max_position_embeddings", None))
        self.render.to(config)
        self.data_digest = checkpoint.digest([vars(one) for one in train])
        callbacks = [
            MetricsFile(args.output_dir),
            RewardCurves(args.output_dir),
            *(callbacks or []),
        ]
        super().__init__(
            model,
            args,
            data_collator=list,
            train_dataset=encoded("train_dataset", train, tokenizer, self.render),
            eval_dataset={
                name: encoded(name or "eval_dataset", sets, tokenizer, self.render)
                for name, sets in held_out.items()
            }
            or None,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True
        self.accelerator.gradient_accumulation_steps = 1
        self.sums = Sums()
        self.stateful["sums"] = self.sums
        self.add_callback(Order(self))
        if any(type(c) is ProgressCallback for c in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(RewardProgress)

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        return {
            **{name: getattr(self.args, name) for name in self.fingerprinted},
            "model": checkpoint.model_digest(self.model),
            "train_dataset": [len(self.train_dataset), self.data_digest],
            "ranks": self.accelerator.num_processes,
        }

    def _defaults(self) -> dict[str, Any]:
        return {}

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        self.order = EpochOrder(len(self.train_dataset), seed, args.shuffle_dataset)
        return self.order

    def batch(self, sets: list[Encoded]) -> PreferenceBatch:
        """Sets -> one packed micro-batch on this rank's device."""
        ids = [one for row in sets for one in row.ids]
        packed = pack_texts(ids, self.model, self.processing_class.pad_token_id)
        parts = matrices([row.ranked for row in sets], self.args.margin_scale)
        lengths = torch.tensor([len(one) for one in ids])
        return PreferenceBatch(packed, *(part.to(self.args.device) for part in (*parts, lengths)))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[PreferenceBatch], Tensor]:
        """The micro-batches of the coming optimizer step, with the count of its sets."""
        drawn = list(itertools.islice(epoch_iterator, num_batches))
        self.go_on()
        sets = torch.tensor(float(sum(len(one) for one in drawn)), device=self.args.device)
        total = self.accelerator.reduce(sets, "sum") / self.accelerator.num_processes
        batches = [replace(self.batch(one), denominator=total) for one in drawn]
        return batches, torch.ones((), device=device)

    def _prepare_inputs(self, inputs: PreferenceBatch) -> PreferenceBatch:
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PreferenceBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the loss of the optimizer step."""
        scores = packed_scores(model, inputs.packed)[inputs.places]
        loss = self.set_losses(scores, inputs).sum() / inputs.denominator
        measured = preference_metrics(
            scores.detach().cpu(), inputs.ratings.cpu(), inputs.lengths[inputs.places].cpu()
        )
        pairs = measured.pop("pairs")
        for name in ("accuracy", "margin", "longer_accuracy"):
            self.sums.add(name, measured[name], pairs)
        self.sums.add("score_mean", measured["score_mean"], 1.0)
        return (loss, scores) if return_outputs else loss

    def set_losses(self, scores: Tensor, batch: PreferenceBatch) -> Tensor:
        """(M,), the loss of each set from its scores (M, K), the centring term in it."""
        args = self.args
        margins = {} if args.preference_loss == "plackett_luce" else {"margins": batch.margins}
        losses = PREFERENCE_LOSSES[args.preference_loss](scores, batch.ratings, **margins)
        if args.center_rewards_coefficient:
            losses = losses + args.center_rewards_coefficient * centring(scores, batch.ratings)
        return losses

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs and the metrics since the last one."""
        if "loss" in logs:
            logs = {**self.sums.reduce(self.accelerator), **logs}
            self.sums.reset()
        super().log(logs, start_time)

    @torch.no_grad()
    def measure(self, sets: list[Encoded]) -> dict[str, float]:
        """Loss and `preference_metrics` of sets, each rank its share; the model in eval mode."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        size, own = self.args.per_device_eval_batch_size, sets[rank::world]
        rows: list[tuple[list[float], list[float], list[float], float]] = []
        with evaluating(self.model), self.accelerator.autocast():
            for start in range(0, len(own), size):
                batch = self.batch(own[start : start + size])
                scores = packed_scores(self.model, batch.packed)[batch.places]
                losses = self.set_losses(scores, batch).tolist()
                lengths = batch.lengths[batch.places].tolist()
                rows += zip(scores.tolist(), batch.ratings.tolist(), lengths, losses, strict=True)
        rows = gather_object(rows) if world > 1 else rows
        width = max(len(row[0]) for row in rows)
        fill = [float("nan")] * width
        columns = [torch.tensor([(row[i] + fill)[:width] for row in rows]) for i in range(3)]
        loss = sum(row[3] for row in rows) / len(rows)
        return {"loss": loss, **preference_metrics(*columns)}

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the held-out sets, log them, and return them.

        Raises:
            ValueError: there are none.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, str):
            given = {given: self.eval_dataset[given]}
        if not given:
            fail("eval_dataset", "sets to measure", None, "set validation_split or give some.")
        given = given if isinstance(given, dict) else {"": given}
        named = {}
        for name, rows in given.items():
            sets = rows
            if not isinstance(rows[0], Encoded):
                ranked, _ = ranked_sets(name or "eval_dataset", rows, self.args.drop_ties)
                sets = encoded(name or "eval_dataset", ranked, self.processing_class, self.render)
            start = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
            named.update({start + key: value for key, value in self.measure(sets).items()})
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def score(self, prompts: list[Any], completions: list[Any]) -> list[float]:
        """Scores as whoever loads the saved folder gets them, bit for bit on the CPU in float32."""
        with evaluating(self.model):
            return RewardModel(innermost(self.model), self.processing_class)(prompts, completions)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the reward model as a folder of its own: whole, checked, and ready to be used.

        Raises:
            ValueError: transformers' own forward reads other scores than this trainer.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        stats = self._held_out_scores()
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.check_scores()
        model = copy.deepcopy(self.accelerator.unwrap_model(self.model))
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        detach_rows(model)
        if stats:
            setattr(model.config, SCORES, stats)
        model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _held_out_scores(self) -> dict[str, float] | None:
        if not self.eval_dataset:
            return None
        measured = self.measure([one for sets in self.eval_dataset.values() for one in sets])
        return {"mean": measured["score_mean"], "std": measured["score_std"]}

    @torch.no_grad()
    def check_scores(self) -> None:
        """Compare transformers' own padded forward with our packed one on sets of this run.

        Raises:
            ValueError: they differ, and by how much.
        """
        sets = list(self.train_dataset)[:4]
        ids = [one for row in sets for one in row.ids]
        pairs = [(e.ranked.prompt, c) for e in sets for c in e.ranked.completions]
        theirs = torch.tensor(self.score(*map(list, zip(*pairs, strict=True))))
        with evaluating(self.model):
            packed = pack_texts(ids, self.model, self.processing_class.pad_token_id)
            ours = packed_scores(self.model, packed).cpu()
        gap = ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0)).item()
        allowed = _AGREE.get(innermost(self.model).dtype, _AGREE_FP32)
        if not gap <= allowed:
            hint = "a padding token that ends a text makes transformers read another token"
            expected = f"the scores of this trainer within {allowed:g} from transformers' forward"
            fail("model", expected, f"a difference of {gap:.3g}", hint)
