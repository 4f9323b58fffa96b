"""What GRPOTrainer checks and builds first: arguments, tokenizer, policy, sampling settings."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from grpo_fast.checks import fail
from grpo_fast.models.head import innermost
from grpo_fast.models.loading import load_policy, load_processing
from grpo_fast.models.rope import shared_limit

from .config import GRPOConfig
from .sampler import check_dataset, column_names

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
        raise ValueError(f"args must be a GRPOConfig, got {type(args).__name__}.")
    if args.n_gpu > 1:
        raise ValueError(
            f"args: nn.DataParallel over {args.n_gpu} GPUs is not supported; start one process for "
            "each with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES."
        )
    if args.fsdp or args.deepspeed:
        raise ValueError(
            "args: sampling from sharded parameters (fsdp, deepspeed) is not supported."
        )
    adapter = peft_config is not None or hasattr(model, "peft_config")
    if args.sync_ref_model and adapter:
        raise ValueError(
            "sync_ref_model: the reference of an adapter is its base model, which cannot move; "
            "set it to False or train without peft_config."
        )
    if peft_config is not None and hasattr(model, "peft_config"):
        raise ValueError("peft_config: model is a PeftModel already, expected None.")
    if not isinstance(model, (str, nn.Module)):
        raise ValueError(f"model must be a name, a path or a model, got {type(model).__name__}.")
    if args.model_init_kwargs and not isinstance(model, str):
        raise ValueError("model_init_kwargs: model is built already, expected None.")
    datasets = {} if train_dataset is None else {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets.update({f"eval_dataset[{key!r}]": value for key, value in eval_dataset.items()})
    elif eval_dataset is not None:
        datasets["eval_dataset"] = eval_dataset
    if not datasets:
        raise ValueError("train_dataset: expected a dataset, got None.")
    for name, dataset in datasets.items():
        check_dataset(name, dataset)
        unseen = sorted(_UNSEEN.intersection(column_names(dataset)))
        if unseen:
            hint = "rename the column if only rewards read it, or use TRL's trainer and our adapter"
            fail(name, "text alone, since the policy is shown no images", repr(unseen[0]), hint)
    check_writable(args.output_dir)
    return datasets


def check_writable(output_dir: str) -> None:
    """Refuse an output folder that cannot be made or written, without making it."""
    path = Path(output_dir).absolute()
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise ValueError(f"output_dir: cannot write {output_dir}: {existing} is not a folder.")
    # permission bits say nothing about a read-only file system, and nothing to root: try it
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise ValueError(
            f"output_dir: cannot write {output_dir}: {existing} takes no new folder ({error})."
        ) from error


def tokenizer_of(
    model: Any, processing_class: PreTrainedTokenizerBase | None, args: GRPOConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or that of the model's checkpoint; it has a padding token."""
    if processing_class is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        if not name:
            raise ValueError(
                "processing_class: expected a tokenizer for a model without a checkpoint."
            )
        return load_processing(name, gguf_file=(args.model_init_kwargs or {}).get("gguf_file"))
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        kind = type(processing_class).__name__
        raise ValueError(f"processing_class must be a tokenizer, got {kind}.")
    if processing_class.pad_token_id is None:
        if processing_class.eos_token_id is None:
            raise ValueError(
                "processing_class: has neither a padding nor an end-of-sequence token."
            )
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def policy_of(model: Any, args: GRPOConfig, peft_config: Any) -> nn.Module:
    """The policy, loaded when a name was given, in its adapter when peft_config was."""
    if isinstance(model, str):
        model = load_policy(model, **(args.model_init_kwargs or {}))
    if args.disable_dropout:
        disable_dropout(model)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
    return model


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
        raise ValueError(
            f"max_completion_length = {args.max_completion_length} leaves no room for a prompt in "
            f"the context of {context} tokens."
        )
    return context - args.max_completion_length
