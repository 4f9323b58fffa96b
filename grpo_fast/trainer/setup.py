"""What GRPOTrainer checks and builds first: arguments, tokenizer, policy, sampling settings."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from grpo_fast.checks import ArgumentError, fail
from grpo_fast.models.head import innermost
from grpo_fast.models.head_precision import cast_head_to_fp32
from grpo_fast.models.loading import load_policy, load_processing, tokenizer_kwargs
from grpo_fast.models.rope import shared_limit
from grpo_fast.rewards import RewardSet

from .config import GRPOConfig
from .memory import hold, loading_of
from .sampler import check_dataset, column_names
from .sharding import loaded_whole

# columns that TRL shows to a vision model
_UNSEEN = {"image", "images", "video", "videos", "audio"}


def check_arguments(
    args: GRPOConfig, train_dataset: Any, eval_dataset: Any, model: Any, peft_config: Any
) -> dict[str, Any]:
    """Everything that can be refused before a file is read or written.

    Returns:
        {name: dataset} of all datasets given.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(args, GRPOConfig):
        fail("args", "a GRPOConfig", type(args).__name__)
    if args.n_gpu > 1:
        hint = (
            "nn.DataParallel is not supported: start one process for each with torchrun or "
            "accelerate launch, or set CUDA_VISIBLE_DEVICES."
        )
        fail("args", "one GPU in a process", f"{args.n_gpu} GPUs", hint)
    adapter = peft_config is not None or hasattr(model, "peft_config")
    if args.sync_ref_model and adapter:
        expected = "False with an adapter, whose reference is its base model and cannot move"
        fail("sync_ref_model", expected, True, "set it to False or train without peft_config.")
    if peft_config is not None and hasattr(model, "peft_config"):
        expected = "None with a model that is a PeftModel already"
        fail("peft_config", expected, type(peft_config).__name__)
    if not isinstance(model, (str, nn.Module)):
        fail("model", "a name, a path or a model", type(model).__name__)
    if args.model_init_kwargs and not isinstance(model, str):
        expected = "None with a model that is built already"
        fail("model_init_kwargs", expected, args.model_init_kwargs)
    datasets = {} if train_dataset is None else {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets.update({f"eval_dataset[{key!r}]": value for key, value in eval_dataset.items()})
    elif eval_dataset is not None:
        datasets["eval_dataset"] = eval_dataset
    if not datasets:
        fail("train_dataset", "a dataset", None)
    for name, dataset in datasets.items():
        check_dataset(name, dataset)
        unseen = sorted(_UNSEEN.intersection(column_names(dataset)))
        if unseen:
            hint = "rename the column if only rewards read it, or use TRL's trainer and our adapter"
            fail(name, "text alone, since the policy is shown no images", repr(unseen[0]), hint)
    check_writable(args.output_dir)
    check_loggers(args.report_to)
    return datasets


def check_loggers(report_to: list[str]) -> None:
    """Refuse loggers whose package is missing, before the model is loaded."""
    from transformers import integrations

    for name in report_to:
        # of unknown ones Trainer has a list
        probe = getattr(integrations, f"is_{name}_available", None)
        if probe is not None and not probe():
            fail("report_to", "loggers that are installed", repr(name), f"pip install {name}")


def check_writable(output_dir: str) -> None:
    """Refuse an output folder that cannot be made or written, without making it."""
    path = Path(output_dir).absolute()
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not existing.is_dir():
        fail("output_dir", "a folder that can be written", output_dir, f"{existing} is a file.")
    # permission bits say nothing about a read-only file system, and nothing to root: try it
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        hint = f"{existing} takes no new folder ({error})."
        raise ArgumentError(
            "output_dir", "a folder that can be written", output_dir, hint
        ) from error


def tokenizer_of(
    model: Any, processing_class: PreTrainedTokenizerBase | None, args: GRPOConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or that of the model's checkpoint; it has a padding token."""
    if processing_class is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        if not name:
            fail("processing_class", "a tokenizer for a model without a checkpoint", None)
        init_kwargs = init_kwargs_of(args)
        source = tokenizer_kwargs(getattr(model, "config", None), init_kwargs)
        with _reading(name):
            return load_processing(name, gguf_file=init_kwargs.get("gguf_file"), **source)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        fail("processing_class", "a tokenizer", type(processing_class).__name__)
    if processing_class.pad_token_id is None:
        if processing_class.eos_token_id is None:
            expected = "a tokenizer with a padding or an end-of-sequence token"
            fail("processing_class", expected, "neither", "set pad_token.")
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def init_kwargs_of(args: GRPOConfig) -> dict[str, Any]:
    """Keywords of from_pretrained for the policy."""
    trust = {"trust_remote_code": True} if args.trust_remote_code else {}
    return {**trust, **(args.model_init_kwargs or {})}


def policy_of(model: Any, args: GRPOConfig, peft_config: Any) -> nn.Module:
    """The policy, loaded when a name was given, in its adapter when peft_config was."""
    loaded = isinstance(model, str)
    if loaded:
        with loaded_whole(args), _reading(model):
            model = load_policy(model, **loading_of(args, peft_config))
    if args.cast_lm_head_to_fp32:
        cast_head_to_fp32(model)
    if args.disable_dropout:
        disable_dropout(model)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
    model = hold(model, args, loaded)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        expected = "at least one parameter that is trained"
        fail("model", expected, "none with requires_grad", "pass a peft_config, or unfreeze some.")
    return model


@contextmanager
def _reading(name: str) -> Iterator[None]:
    # transformers says that a checkpoint is not there, or no such thing, in many words
    try:
        yield
    except OSError as error:
        expected = "a folder or a hub name of a causal language model with its tokenizer"
        said = str(error).strip().splitlines()
        reason = said[0].rstrip(".") if said else type(error).__name__
        raise ArgumentError("model", expected, repr(name), f"{reason}.") from error


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: modules, and the probabilities attention layers keep as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def generation_of(
    args: GRPOConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[GenerationConfig, set[int]]:
    """Sampling settings, and the tokens that end a completion: the tokenizer's and the model's."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    eos_ids = {token for token in (tokenizer.eos_token_id, *ends) if token is not None}
    config = GenerationConfig(
        max_new_tokens=args.max_completion_length,
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        **(args.generation_kwargs or {}),
    )
    return config, eos_ids


def prompt_room(model: nn.Module, args: GRPOConfig) -> int | None:
    """Tokens of context left for a prompt, None when the model names no limit."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # generation and packing put sequences beside each other
    alone = shared_limit(innermost(model))
    context = alone if context is None else min(context, alone or context)
    if context is None:
        return None
    if args.max_completion_length >= context:
        expected = f"less than the model's context of {context} tokens"
        got, hint = args.max_completion_length, "it leaves no room for a prompt."
        fail("max_completion_length", expected, got, hint)
    return context - args.max_completion_length


def rewards_of(
    reward_funcs: Any,
    processing_classes: Any,
    args: GRPOConfig,
    datasets: dict[str, Any],
    complete: bool = True,
) -> RewardSet:
    """The rewards of a run, whose columns every dataset has; complete: as in `check_columns`."""
    # what names a place in the policy's repository says nothing of another one
    own = ("gguf_file", "revision", "code_revision", "subfolder")
    init_kwargs = {k: v for k, v in init_kwargs_of(args).items() if k not in own}
    rewards = RewardSet(
        reward_funcs,
        processing_classes,
        args.reward_weights,
        args.device,
        init_kwargs,
        timeout=args.reward_timeout,
        max_completion_length=args.max_completion_length,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    for dataset in datasets.values():
        columns = column_names(dataset)
        rewards.check_columns(columns, complete)
        if "rewards" in columns:
            whole = hasattr(dataset, "column_names")
            rewards.check_routes(dataset["rewards"] if whole else (r["rewards"] for r in dataset))
    return rewards
