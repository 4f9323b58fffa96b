"""Options of `grpo-fast train` and `ppo`: the command line over a YAML file over the defaults."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from grpo_fast.checks import fail

from .verbs import VERBS

REASONING_GYM = "reasoning_gym:"
EPILOG = """\
A YAML file holds the same names (`max_steps: 100`); the command line wins over it. Every field of
transformers.TrainingArguments is an option as well: --help-all lists them. To go on from the newest
checkpoint in the output folder: --resume-from-checkpoint latest.
"""
# fields that the command line shows beside those of ours
_COMMON = (
    "output_dir",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "warmup_steps",
    "seed",
    "save_steps",
    "eval_steps",
    "eval_strategy",
    "report_to",
    "resume_from_checkpoint",
    "use_liger_kernel",
)


def _option(default: object, text: str, **metadata: Any):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ScriptArguments:
    """What to train, on what, for what: the options that are no field of the trainer's.

    Raises:
        ValueError: for a number out of range, or options that belong together and are not.
    """

    _argument_group_name = "model, data and rewards"

    demo: bool = _option(
        False, "Run the embedded demo, which is also what happens without a model and a dataset."
    )
    model: str | None = _option(None, "Hub name or folder of the model.")
    gguf_file: str | None = _option(None, "GGUF file in that place; its weights are unpacked.")
    dataset: str | None = _option(
        None, "A .jsonl, .json, .csv or .parquet file, a hub name, or reasoning_gym:TASK."
    )
    dataset_split: str = _option("train", "Split of the dataset, such as 'train[:1000]'.")
    dataset_kwargs: dict | str | None = _option(
        None,
        "JSON arguments of load_dataset, or size, seed and settings of the reasoning-gym task.",
    )
    eval_size: int = _option(0, "Hold out so many rows at the end of the dataset for evaluation.")
    prompt_column: str = _option("prompt", "Column with the prompts: strings or lists of messages.")
    chat: bool = _option(False, "Ask string prompts as a user message in the chat template.")
    reward: list[str] | None = _option(
        None,
        "rule:math or another rule (docs/rewards.md), module:function, a reward model's "
        "checkpoint, or reasoning_gym:TASK; repeat it for several. A reasoning_gym dataset brings "
        "its own.",
        action="extend",
    )
    lora_r: int | None = _option(None, "Train a LoRA adapter of this rank instead of all weights.")
    lora_alpha: float | None = _option(None, "LoRA scale; default: twice the rank.")
    lora_dropout: float = _option(0.0, "LoRA dropout.")
    lora_target_modules: list[str] | None = _option(
        None, "Layers that get an adapter; default: every linear layer but the lm_head."
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_kwargs, str):
            self.dataset_kwargs = _json_object(self.dataset_kwargs)
        if self.eval_size < 0:
            fail("eval_size", "an integer >= 0", self.eval_size)
        if self.lora_r is not None and self.lora_r < 1:
            fail("lora_r", "an integer >= 1", self.lora_r)
        if not 0 <= self.lora_dropout < 1:
            fail("lora_dropout", "a number in [0, 1)", self.lora_dropout)
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if (
                self.lora_r is None
                and getattr(self, name) != self.__dataclass_fields__[name].default
            ):
                value, hint = getattr(self, name), "set lora_r as well, or leave it out."
                fail(name, "no value without lora_r", value, hint)
        self.demo = self.demo or self._says_nothing
        if self.demo:
            given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
            given.remove("demo")
            if given:
                expected = "no value in the demo, which has its own model, dataset and reward"
                hint = "give --model and --dataset, and no --demo."
                fail(given[0], expected, getattr(self, given[0]), hint)
        elif self.model is None or self.dataset is None:
            missing = "model" if self.model is None else "dataset"
            fail(missing, "a value beside the other options", "none")
        elif not self.reward and not self.dataset.startswith(REASONING_GYM):
            hint = "only a reasoning_gym dataset brings its own."
            fail("reward", "at least one", "none", hint)

    @property
    def _says_nothing(self) -> bool:
        return self.model is None and self.dataset is None and not self.reward


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each option once, spelled with hyphens."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "_" not in name]
        if action.nargs == 0:
            return ", ".join(names)
        kinds = {"+": "VALUE ...", "?": "[true|false]"}
        metavar = "|".join(map(str, action.choices)) if action.choices else "VALUE"
        return f"{', '.join(names)} {kinds.get(action.nargs, metavar)}"


class _Loader(yaml.SafeLoader):
    """A key that is there twice is an error; YAML's own reader takes the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, of keys that are all different."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                line = node.value[place][0].start_mark.line + 1
                raise yaml.YAMLError(f"{key!r} is there twice, the second time in line {line}")
        return super().construct_mapping(node, deep)


class TrainParser(HfArgumentParser):
    """The options of `ScriptArguments` and the trainer's; bad ones are `ValueError`s.

    Args:
        verb: key of `VERBS`.
    """

    def __init__(self, verb: str = "train") -> None:
        self.config = VERBS[verb].config
        classes = [ScriptArguments, self.config]
        # HfArgumentParser rewrites the annotations of the fields it reads
        self._hints = {k: v for c in classes for k, v in typing.get_type_hints(c).items()}
        super().__init__(
            classes,
            prog=f"grpo-fast {verb}",
            usage=f"grpo-fast {verb} [--config FILE.yaml] [options]",
            description=VERBS[verb].description,
            epilog=EPILOG,
            formatter_class=_Help,
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("--config", help="YAML file with any of these options.")
        self.add_argument("-h", "--help", action="store_true", help="Show the options of ours.")
        self.add_argument("--help-all", action="store_true", help="Show every option.")
        for action in self._actions:
            self._repair(action)
        self.names = {f.name for c in classes for f in dataclasses.fields(c) if f.init}

    def _repair(self, action: argparse.Action) -> None:
        hint = self._hints.get(action.dest)
        # a flag whose default is None would need a value
        if _admits(hint, bool) and action.nargs is None:
            action.nargs, action.const = "?", True
        # a dictionary that transformers does not offer as a string
        if _admits(hint, dict) and action.type is not str:
            action.type = _json_object

    def error(self, message: str) -> NoReturn:
        """Leave by an exception: the caller prints it."""
        raise ValueError(message)

    def given(self, argv: list[str]) -> dict[str, Any]:
        """The options that the command line names, with their values.

        Raises:
            ValueError: for an unknown option (the nearest is suggested) or a wrong value.
        """
        absent = object()
        # an action that extends a list must not start from `absent`
        space = argparse.Namespace(
            **{a.dest: absent for a in self._actions if not isinstance(a, argparse._ExtendAction)}
        )
        space, unknown = self.parse_known_args(argv, space)
        if unknown:
            raise ValueError(self._unknown(unknown[0]))
        values = {key: value for key, value in vars(space).items() if value is not absent}
        if values.get("reward", absent) is None:
            del values["reward"]
        return values

    def _unknown(self, token: str) -> str:
        if not token.startswith("-"):
            return f"unexpected argument {token!r}: options start with --."
        known = [name for name in self._option_string_actions if "_" not in name]
        name = token.split("=")[0]
        return f"unknown option {name}{_nearest(name.replace('_', '-'), known)}"

    def from_yaml(self, path: str) -> dict[str, Any]:
        """The options that a YAML file sets.

        Raises:
            ValueError: for a file that is missing or no mapping, an unknown key (the nearest is
                suggested) or a value of the wrong type.
        """
        if not Path(path).is_file():
            fail("--config", "a file", repr(path))
        try:
            content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {path}: not readable as YAML: {error}") from error
        if content is None:
            # without any option the demo would start
            raise ValueError(f"--config {path}: expected `name: value` lines, got an empty file.")
        if not isinstance(content, dict):
            raise ValueError(f"--config {path}: expected `name: value` lines, got {content!r}.")
        actions = {action.dest: action for action in self._actions if action.dest in self.names}
        values = {}
        for key, value in content.items():
            name = str(key).replace("-", "_")
            if name not in self.names:
                hint = _nearest(name, sorted(self.names))
                raise ValueError(f"--config {path}: unknown key {key!r}{hint}")
            try:
                values[name] = self._convert(actions[name], value)
            except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"--config {path}: {key}: {error}") from error
        return values

    def _convert(self, action: argparse.Action, value: Any) -> Any:
        """What the command line would have made of the value: YAML reads 1e-5 as a string."""
        hint = self._hints[action.dest]
        if value is None:
            if not _admits(hint, type(None)):
                raise ValueError("expected a value, got null.")
            return None
        if isinstance(value, dict):
            if not _admits(hint, dict):
                raise ValueError(f"expected a single value, got {value!r}.")
            return value
        if action.nargs == "+":
            return [
                _typed(action, item) for item in (value if isinstance(value, list) else [value])
            ]
        if isinstance(value, list):
            if not _admits(hint, list):
                raise ValueError(f"expected a single value, got {value!r}.")
            return value
        return _typed(action, value)

    def show_help(self, everything: bool) -> None:
        """Print the options: ours and the common ones, or all."""
        inherited = {f.name for f in dataclasses.fields(TrainingArguments)} - set(_COMMON)
        ours = [c for c in self.config.__mro__ if c not in TrainingArguments.__mro__]
        own = {name for c in ours for name in c.__dict__.get("__annotations__", {})}
        for action in self._actions:
            hidden = not everything and action.dest in inherited - own
            # no_ forms repeat their option's text
            if hidden or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS
        # argparse prints its own group, here that of the trainer, before every other
        self._action_groups.sort(key=lambda g: g.title != ScriptArguments._argument_group_name)
        self.print_help()


def parse(argv: list[str], verb: str = "train") -> tuple[ScriptArguments, dict[str, Any]] | None:
    """The script's options, and the trainer's fields that were set; None when help was asked for.

    Args:
        verb: key of `VERBS`.

    Raises:
        ValueError: for bad options, in one sentence.
    """
    parser = TrainParser(verb)
    given = parser.given(argv)
    everything = given.pop("help_all", False)
    if given.pop("help", False) or everything:
        parser.show_help(everything)
        return None
    config = given.pop("config", None)
    values = {**(parser.from_yaml(config) if config else {}), **given}
    # Trainer takes True for the newest checkpoint in output_dir
    if values.get("resume_from_checkpoint") in ("latest", "True", "true"):
        values["resume_from_checkpoint"] = True
    elif values.get("resume_from_checkpoint") in ("False", "false"):
        del values["resume_from_checkpoint"]
    names = {f.name for f in dataclasses.fields(ScriptArguments)}
    script = ScriptArguments(**{key: value for key, value in values.items() if key in names})
    return script, {key: value for key, value in values.items() if key not in names}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text!r}.")
    return value


def _admits(hint: Any, kind: type) -> bool:
    """True when the annotation, or one part of its union, is of this kind."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = typing.get_args(hint) if union else (hint,)
    return any(kind in (choice, typing.get_origin(choice)) for choice in choices)


def _typed(action: argparse.Action, value: Any) -> Any:
    convert = action.type or str
    try:
        result = convert(str(value))
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        kind = getattr(convert, "__name__", "value").removeprefix("string_to_").strip("_")
        raise ValueError(f"expected {kind}, got {value!r}.") from error
    if action.choices is not None and result not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r}.")
    return result


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; --help-all lists the options."
