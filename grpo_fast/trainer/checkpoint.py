"""What Trainer's checkpoints lack: rollout window, reference, counters, a mark of completeness."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MARKER = "grpo_fast_complete.json"
REFERENCE = "grpo_fast_reference.safetensors"
_FORMAT = 1
# written by whoever loads or saves a model, without influence on what it computes
_VOLATILE = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


# keys that 0.1.0 before 2026-11-27 wrote beside the fields that they were made of
_DERIVED = ("loss.text",)


def rank_file(rank: int, suffix: str) -> str:
    """Name of a rank's own file: `json` for counters, `safetensors` for the window."""
    return f"grpo_fast_rank{rank}.{suffix}"


def digest(value: Any) -> str:
    """Short hash of anything JSON can write."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """Hash of a model's configuration and of the name, shape and trainability of each parameter."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    config = {k: v for k, v in config.items() if k not in _VOLATILE}
    parameters = [(n, list(p.shape), p.requires_grad) for n, p in model.named_parameters()]
    peft = getattr(model, "peft_config", {})
    adapters = {name: [c.peft_type, c.to_dict().get("lora_alpha")] for name, c in peft.items()}
    return digest([type(model).__name__, config, parameters, adapters])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    _sync(part)
    os.replace(part, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def invalidate(folder: Path) -> None:
    """Take the marker away before a checkpoint of the same step is written over."""
    (folder / MARKER).unlink(missing_ok=True)


def save_rank(folder: Path, rank: int, window: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Write one rank's window (dicts of tensors or None) and its JSON-able state."""
    entries = [(i, name, value) for i, micro in enumerate(window) for name, value in micro.items()]
    other = {name for _, name, v in entries if v is not None and not isinstance(v, Tensor)}
    if other:
        raise ValueError(f"a micro-batch may hold tensors and None only, not {sorted(other)}.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous().clone()
        for index, name, value in entries
        if value is not None
    }
    absent = [[name for name, value in micro.items() if value is None] for micro in window]
    save_file(tensors, folder / rank_file(rank, "safetensors"))
    write_json(folder / rank_file(rank, "json"), {"absent": absent, "state": state})


def load_rank(folder: Path, rank: int, device: torch.device) -> tuple[list[dict], dict[str, Any]]:
    """Read what `save_rank` wrote -> (window, state)."""
    stored = json.loads((folder / rank_file(rank, "json")).read_text(encoding="utf-8"))
    tensors = load_file(folder / rank_file(rank, "safetensors"))
    window: list[dict] = [dict.fromkeys(names) for names in stored["absent"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        window[int(index)][name] = value.to(device)
    return window, stored["state"]


def save_reference(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write the weights of the reference policy."""
    unique = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    save_file(unique, folder / REFERENCE)


def load_reference(folder: Path) -> dict[str, Tensor]:
    """Read what `save_reference` wrote."""
    return load_file(folder / REFERENCE)


def seal(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Declare a checkpoint complete: flush its files, then write the marker with their sizes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    for path in files:
        _sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_json(folder / MARKER, {"format": _FORMAT, "files": sizes, "fingerprint": fingerprint})
    _sync(folder)


def problem(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be resumed, or None when it is complete."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / MARKER).is_file():
        return (
            f"it is incomplete (no {MARKER}): the save was interrupted or another program wrote it"
        )
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = dict(marker["files"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return f"{MARKER} is damaged"
    if marker.get("format") != _FORMAT:
        return f"{MARKER} has format {marker.get('format')!r}, expected {_FORMAT}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes, expected {size}"
    return None


def _folders(output_dir: Path) -> list[tuple[int, Path]]:
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def rotate(current: Path, limit: int | None, best: str | None) -> None:
    """Delete checkpoints beside `current` until `limit` remain: incomplete ones, then the oldest.

    The one just written and the best one stay, even if that makes two with a limit of one.
    """
    if not limit:
        return
    kept = {current.resolve(), *([Path(best).resolve()] if best else [])}
    others = [path for _, path in _folders(current.parent) if path.resolve() not in kept]
    others.sort(key=lambda path: (problem(path) is None, path.stat().st_mtime_ns))
    for path in others[: len(others) - max(limit - len(kept), 0)]:
        shutil.rmtree(path, ignore_errors=True)


def newest(output_dir: str) -> tuple[Path, list[str]]:
    """Newest complete checkpoint of a folder, and why newer ones were passed over.

    Raises:
        ValueError: when none is complete, with the reason for each.
    """
    skipped = []
    for _, path in reversed(_folders(Path(output_dir))):
        reason = problem(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path}: {reason}")
    listing = "; ".join(skipped) if skipped else "it holds no checkpoint-<step> folder"
    raise ValueError(f"resume_from_checkpoint: nothing to resume in {output_dir}: {listing}.")


def check(folder: Path, fingerprint: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse a checkpoint that is incomplete or comes from another configuration.

    Args:
        defaults: the value of a key that a checkpoint lacks, because it is older than the option.

    Raises:
        ValueError: naming the folder and the reason, or every differing key with both values.
    """
    reason = problem(folder)
    if reason:
        raise ValueError(f"resume_from_checkpoint: cannot resume {folder}: {reason}.")
    stored = json.loads((folder / MARKER).read_text(encoding="utf-8"))["fingerprint"]
    # through JSON, as the stored one went: tuples become lists
    current = json.loads(json.dumps(fingerprint))
    defaults = json.loads(json.dumps(defaults))
    stored = {k: v for k, v in stored.items() if k not in _DERIVED}
    stored = {**{k: v for k, v in defaults.items() if k in current}, **stored}
    keys = [k for k in (stored | current) if stored.get(k) != current.get(k)]
    if keys:
        listing = ", ".join(f"{k} was {stored.get(k)!r}, is {current.get(k)!r}" for k in keys)
        raise ValueError(
            f"resume_from_checkpoint: {folder} comes from another configuration: {listing}."
        )
