"""`grpo-fast reward-model` and `grpo-fast iterate`: their options, data and runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from grpo_fast.checks import fail
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.iterative_config import IterativeConfig
from grpo_fast.trainer.labels import LabelsNeeded
from grpo_fast.trainer.reward_config import RewardModelConfig
from grpo_fast.trainer.stages import Interrupted

from .options import _COMMON, EPILOG, TrainParser, _Help, _json_object, _option

_REWARD = """\
Train a reward model on ranked answers: pairs, or sets of any size, in a .jsonl or .parquet file.

examples:
  grpo-fast reward-model --demo
  grpo-fast reward-model --model ./model --dataset pairs.jsonl --validation-split 0.1 \\
      --eval-strategy epoch --output-dir ./reward
"""
_ITERATE = """\
Iterate: collect completions, label them, retrain the reward model, train the policy, report.

examples:
  grpo-fast iterate --demo
  grpo-fast iterate --model ./model --dataset prompts.jsonl --judge my_judges:quality \\
      --iterations 3 --max-steps 100 --reward-args '{"learning_rate": 1e-5}' --output-dir runs/loop
  grpo-fast iterate --model ./model --dataset prompts.jsonl --judge file --output-dir runs/people
"""


@dataclass
class RewardScript:
    """What `grpo-fast reward-model` trains, and on what."""

    _argument_group_name = "model and data"

    model: str | None = _option(None, "Hub name or folder of a reward or a language model.")
    gguf_file: str | None = _option(None, "GGUF file in that place; its weights are unpacked.")
    dataset: str | None = _option(None, "A .jsonl or .parquet file of preferences.")
    eval_dataset: str | None = _option(None, "The same, held out; default: validation_split.")
    lora_r: int | None = _option(None, "Train a LoRA adapter of this rank, merged when saved.")
    demo: bool = _option(False, "Human ratings of words by vaderSentiment; nothing is downloaded.")


@dataclass
class IterateScript:
    """What `grpo-fast iterate` trains, on what, and who judges."""

    _argument_group_name = "model, data and judge"

    model: str | None = _option(None, "Hub name or folder of the first policy.")
    gguf_file: str | None = _option(None, "GGUF file in that place; its weights are unpacked.")
    dataset: str | None = _option(None, "A .jsonl or .parquet file with a column prompt.")
    judge: list[str] | None = _option(
        None,
        "A reward as for train, repeated for several; or file: people fill in labels between runs.",
        action="extend",
    )
    reward_model: str | None = _option(None, "Reward model to go on from.")
    reward_args: dict | str | None = _option(None, "Fields of RewardModelConfig (JSON).")
    demo: bool = _option(False, "SmolLM2-135M-Instruct learns sums; nothing is downloaded.")


# one field of IterativeConfig each; what GRPOConfig has too is that
_SHARED = ("output_dir", "seed")
_HINTS = typing.get_type_hints(IterativeConfig)
LoopOptions = dataclasses.make_dataclass(
    "LoopOptions",
    [
        (f.name, _HINTS[f.name], dataclasses.field(default=f.default, metadata=f.metadata))
        for f in dataclasses.fields(IterativeConfig)
        if f.name not in _SHARED
    ],
)
LoopOptions._argument_group_name = "the loop"


class LoopParser(TrainParser):
    """The options of some dataclasses; bad ones are `ValueError`s."""

    def __init__(self, verb: str, description: str, classes: list[type]) -> None:
        self._hints = {k: v for c in classes for k, v in typing.get_type_hints(c).items()}
        HfArgumentParser.__init__(
            self,
            classes,
            prog=f"grpo-fast {verb}",
            usage=f"grpo-fast {verb} [--config FILE.yaml] [options]",
            description=description,
            epilog=EPILOG,
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
        )
        self.classes = classes
        self.add_argument("--config", help="YAML file with any of these options.")
        self.add_argument("-h", "--help", action="store_true", help="Show the main options.")
        self.add_argument("--help-all", action="store_true", help="Show every option.")
        for action in self._actions:
            self._repair(action)
        self.names = {f.name for c in classes for f in dataclasses.fields(c) if f.init}

    def show_help(self, everything: bool) -> None:
        """Print the options: those of the verb, or all."""
        inherited = {f.name for f in dataclasses.fields(TrainingArguments)} - set(_COMMON)
        own = {name for c in self.classes for name in c.__dict__.get("__annotations__", {})}
        for action in self._actions:
            hidden = not everything and action.dest in inherited - own
            if hidden or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS
        first = self.classes[0]._argument_group_name
        self._action_groups.sort(key=lambda group: group.title != first)
        self.print_help()

    def read(self, argv: list[str]) -> dict[str, Any] | None:
        """The values given, the command line over the YAML file; None when help was asked for."""
        given = self.given(argv)
        everything = given.pop("help_all", False)
        if given.pop("help", False) or everything:
            self.show_help(everything)
            return None
        config = given.pop("config", None)
        return {**(self.from_yaml(config) if config else {}), **given}


def _split(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """Take the fields of a dataclass out of the values."""
    names = [f.name for f in dataclasses.fields(kind) if f.name in values]
    return {name: values.pop(name) for name in names}


def _need(script: Any, names: tuple[str, ...]) -> None:
    given = [f.name for f in dataclasses.fields(script) if getattr(script, f.name) != f.default]
    if script.demo:
        others = [name for name in given if name != "demo"]
        if others:
            expected = "no value with --demo, which brings its own model and data"
            fail(others[0], expected, getattr(script, others[0]))
        return
    for name in names:
        if not getattr(script, name):
            fail(name, "a value, or --demo", "none")


def reward_model(argv: list[str]) -> int:
    """Train a reward model as the options say; returns 0.

    Raises:
        ValueError: for anything that cannot be loaded or does not fit, before training starts.
    """
    values = LoopParser("reward-model", _REWARD, [RewardScript, RewardModelConfig]).read(argv)
    if values is None:
        return 0
    script = RewardScript(**_split(values, RewardScript))
    _need(script, ("model", "dataset"))
    resume = values.get("resume_from_checkpoint")
    if resume == "latest":
        values["resume_from_checkpoint"] = True
    if script.demo:
        from .reward_demo import run

        run(values)
        return 0
    from grpo_fast.trainer.preferences import load_preferences
    from grpo_fast.trainer.reward_model import RewardModelTrainer

    args = RewardModelConfig(**values)
    if script.gguf_file is not None:
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "gguf_file": script.gguf_file}
    held_out = None if script.eval_dataset is None else load_preferences(script.eval_dataset)
    trainer = RewardModelTrainer(
        script.model, args, load_preferences(script.dataset), held_out, peft_config=_lora(script)
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.stopping.stopped is not None:
        print("go on with the same command and --resume-from-checkpoint true", file=sys.stderr)
        return 128 + trainer.stopping.stopped
    if trainer.eval_dataset:
        print({name: round(value, 4) for name, value in trainer.evaluate().items()})
    trainer.save_model()
    folder = Path(args.output_dir).resolve()
    print(f"reward model: {folder}; use it with grpo-fast train --reward {folder}")
    return 0


def _lora(script: RewardScript) -> Any:
    if script.lora_r is None:
        return None
    if script.lora_r < 1:
        fail("lora_r", "an integer >= 1", script.lora_r)
    from peft import LoraConfig

    return LoraConfig(r=script.lora_r, lora_alpha=2 * script.lora_r, task_type="SEQ_CLS")


def iterate(argv: list[str]) -> int:
    """Run the loop as the options say; 0, 3 when it waits for people's labels, or 128 and a signal.

    Raises:
        ValueError: for anything that cannot be loaded or does not fit, before any work.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    values = LoopParser("iterate", _ITERATE, [IterateScript, LoopOptions, GRPOConfig]).read(argv)
    if values is None:
        return 0
    script = IterateScript(**_split(values, IterateScript))
    _need(script, ("model", "dataset", "judge"))
    if isinstance(script.reward_args, str):
        script.reward_args = _json_object(script.reward_args)
    loop = {**_split(values, LoopOptions), **{n: values[n] for n in _SHARED if n in values}}
    if script.demo:
        from .iterate_demo import run

        return _to_its_end(lambda: run(loop, values))
    from grpo_fast.trainer.iterative import FILE, IterativeGRPO

    args = IterativeConfig(**loop)
    kwargs = {} if script.gguf_file is None else {"gguf_file": script.gguf_file}
    policy = GRPOConfig(**{"max_steps": 50, **values, "output_dir": args.output_dir})
    policy.model_init_kwargs = {**(policy.model_init_kwargs or {}), **kwargs} or None
    chosen = {"output_dir": args.output_dir, "use_cpu": policy.use_cpu, "report_to": "none"}
    made = IterativeGRPO(
        script.model,
        FILE if script.judge == [FILE] else script.judge,
        args,
        _prompts(script.dataset),
        policy,
        RewardModelConfig(**{**chosen, **(script.reward_args or {})}),
        script.reward_model,
    )
    status = _to_its_end(made.train)
    if not status:
        print(f"report: {(Path(args.output_dir) / 'report' / 'index.md').resolve()}")
    return status


def _to_its_end(work: Any) -> int:
    try:
        work()
    except LabelsNeeded as waiting:
        print(f"grpo-fast iterate: {waiting}")
        return 3
    except Interrupted as stopped:
        print(f"grpo-fast iterate: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    return 0


def _prompts(name: str) -> list[dict[str, Any]]:
    from grpo_fast.trainer.preferences import load_preferences

    return load_preferences(name)
