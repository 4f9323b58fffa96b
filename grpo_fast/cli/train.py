"""`grpo-fast train` and `ppo`: model, data and rewards of the options, and the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fast.checks import ArgumentError, fail

if TYPE_CHECKING:
    from datasets import Dataset

    from .options import ScriptArguments

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def train(script: ScriptArguments, config: dict[str, Any], verb: str = "train") -> int | None:
    """Train as the options say, save the model, and print where everything is.

    Returns:
        The signal that ended the run before its last step, None where it came to its end.

    Args:
        script: model, data and rewards.
        config: the fields of the trainer's arguments that were set.
        verb: key of `VERBS`.

    Raises:
        ValueError: for anything that cannot be loaded or does not fit, before training starts.
    """
    from .verbs import VERBS

    args = VERBS[verb].config(**config)
    if script.eval_size and args.eval_strategy == "no":
        expected = "0 without an eval_strategy, since nothing would look at those rows"
        fail("eval_size", expected, script.eval_size, "add --eval-strategy steps.")
    rewards = load_rewards(script)
    train_dataset, eval_dataset = load_datasets(script, args.seed)
    if script.gguf_file is not None:
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "gguf_file": script.gguf_file}
    trainer = VERBS[verb].trainer()(
        model=script.model,
        reward_funcs=rewards,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=_lora(script),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.stopping.stopped is not None:
        return trainer.stopping.stopped
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model, metrics.jsonl, curves and checkpoints: {Path(args.output_dir).resolve()}")
    return None


def load_datasets(script: ScriptArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those held out at the end when `eval_size` asks for some.

    Both have a column `prompt`, and every other column of the source for the reward functions.

    Args:
        script: where the rows come from.
        seed: of a reasoning-gym dataset that `dataset_kwargs` gives none.

    Raises:
        ValueError: for a source that cannot be read, no rows, or no such column.
    """
    rows = _load_rows(script, seed)
    if len(rows) == 0:
        fail("dataset", "at least one row", f"none in {script.dataset!r}")
    column = script.prompt_column
    if column not in rows.column_names:
        expected = f"a column of {script.dataset!r} ({', '.join(rows.column_names)})"
        fail("prompt_column", expected, repr(column))
    if column != "prompt":
        if "prompt" in rows.column_names:
            hint = "rename or drop that column."
            got = f"{column!r} beside a column 'prompt' in {script.dataset!r}"
            fail("prompt_column", "the only column of prompts", got, hint)
        rows = rows.rename_column(column, "prompt")
    if script.chat:
        rows = rows.map(_as_message)
    if script.eval_size >= len(rows):
        expected = f"fewer than the {len(rows)} rows of the dataset"
        fail("eval_size", expected, script.eval_size)
    if script.eval_dataset is not None:
        if script.eval_size:
            fail("eval_size", "0 beside an eval_dataset", script.eval_size)
        return rows, load_datasets(_other(script), seed)[0]
    if script.eval_size == 0:
        return rows, None
    kept = len(rows) - script.eval_size
    return rows.select(range(kept)), rows.select(range(kept, len(rows)))


def _other(script: ScriptArguments) -> ScriptArguments:
    """The same columns and template, of the rows to evaluate on."""
    return replace(script, dataset=script.eval_dataset, eval_dataset=None, eval_size=0)


def load_rewards(script: ScriptArguments) -> list[Any]:
    """The rewards that the options name, as `GRPOTrainer` takes them.

    Raises:
        ValueError: for a function or a task that cannot be loaded.
    """
    from grpo_fast.rewards import load_reward

    # a checkpoint folder may have a colon in its path, a module has none
    return [
        load_reward(spec) if ":" in spec and not Path(spec).exists() else spec
        for spec in script.reward or [script.dataset]
    ]


def _load_rows(script: ScriptArguments, seed: int) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    from grpo_fast.rewards import reasoning_gym_dataset

    from .options import REASONING_GYM

    name, kwargs = script.dataset, dict(script.dataset_kwargs or {})
    if name.startswith(REASONING_GYM):
        if script.dataset_split != "train":
            expected = "'train' with a reasoning-gym task, which has no splits"
            fail("dataset_split", expected, repr(script.dataset_split), "use eval_size.")
        settings = {"size": 1000, "seed": seed, **kwargs}
        return reasoning_gym_dataset(name.removeprefix(REASONING_GYM), **settings)
    kind = _FORMATS.get(Path(name).suffix)
    if kind is not None and not Path(name).is_file():
        fail("dataset", "a file", f"{name!r}, where there is none")
    if kind is not None and Path(name).stat().st_size == 0:
        fail("dataset", "at least one row", f"an empty file, {name!r}")
    source = {"path": name} if kind is None else {"path": kind, "data_files": name}
    try:
        return load_dataset(**source, split=script.dataset_split, **kwargs)
    # the boundary to datasets: its readers raise whatever theirs do, and do not name the file
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"dataset {name!r} cannot be loaded: {cause}") from error


def _as_message(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row["prompt"], str):
        fail("chat", "string prompts", type(row["prompt"]).__name__)
    return {"prompt": [{"role": "user", "content": row["prompt"]}]}


def _lora(script: ScriptArguments) -> Any:
    if script.lora_r is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        hint = "pip install peft."
        raise ArgumentError("lora_r", "peft to be installed", "no such package", hint) from error
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=2 * script.lora_r if script.lora_alpha is None else script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=script.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
