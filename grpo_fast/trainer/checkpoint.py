"""What Trainer's checkpoints lack: the state of our parts, and a mark of completeness."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import operator
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo_fast.checks import fail
from grpo_fast.models.sharding import plain_name

logger = logging.getLogger(__name__)

MARKER = "grpo_fast_complete.json"
# 1: window, reference and counters by name; 2: a list of parts
_FORMATS = (1, 2)
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


class Stateful(Protocol):
    """A part of a run that a checkpoint holds.

    `reset()`, if it has one, is called when training begins. `shared = True` says that its state is
    the same on every rank: the checkpoint then holds it once.
    """

    def state_dict(self) -> Any:
        """Its state: tensors, and what JSON can write, in dicts with names and in lists."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned; tuples come as lists, tensors on the CPU."""
        ...


def rank_file(rank: int, suffix: str) -> str:
    """Name of a rank's own file: `safetensors` for tensors, `json` for all else."""
    return f"grpo_fast_rank{rank}.{suffix}"


def shared_file(name: str) -> str:
    """Name of the file of a part that is the same on every rank."""
    return f"grpo_fast_{name}.safetensors"


def digest(value: Any) -> str:
    """Short hash of anything JSON can write."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """Hash of a model's configuration and of the name, shape and trainability of each parameter."""
    config = model.config.to_dict() if hasattr(model, "config") else {}
    config = {k: v for k, v in config.items() if k not in _VOLATILE}
    # an engine empties, renames and wraps: the digest is of the model before it did
    parameters = [
        (plain_name(n), list(getattr(p, "ds_shape", p.shape)), p.requires_grad)
        for n, p in model.named_parameters()
    ]
    peft = getattr(model, "peft_config", {})
    adapters = {name: [c.peft_type, c.to_dict().get("lora_alpha")] for name, c in peft.items()}
    return digest([type(model).__name__.removeprefix("FSDP"), config, parameters, adapters])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, default=str), encoding="utf-8")
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


def save_parts(folder: Path, rank: int, parts: Mapping[str, Stateful], main: bool) -> None:
    """Write the state of every part: a rank's own in its files, a shared one once.

    Args:
        parts: {name: part}. A state holds tensors, and what JSON can write, in dicts and lists; the
            state of a shared part is one dict of tensors, or None.
        main: whether this rank writes the shared ones. All ranks ask for them.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    shared = {name: states.pop(name) for name in parts if _is_shared(parts[name])}
    folder.mkdir(parents=True, exist_ok=True)
    found: list[tuple[tuple, Tensor]] = []
    tree = _without_tensors(states, (), found)
    places = {".".join(map(str, path)): path for path, _ in found}
    save_file(_copies(zip(places, (t for _, t in found), strict=True)), _rank(folder, rank)[1])
    write_json(_rank(folder, rank)[0], {"parts": tree, "tensors": places})
    for name, state in shared.items():
        if main and state is not None:
            save_file(_copies(state.items()), folder / shared_file(name))


def load_parts(folder: Path, rank: int, parts: Mapping[str, Stateful]) -> None:
    """Give every part the state that `save_parts` wrote.

    A part that the checkpoint lacks, being older, stays as it is, with a warning. A shared part
    gets None where there is no file of it.

    Raises:
        ValueError: the checkpoint has the state of a part that is not here.
    """
    states = _read_rank(folder, rank)
    shared = [name for name in parts if _is_shared(parts[name])]
    files = {p.stem.removeprefix("grpo_fast_") for p in folder.glob("grpo_fast_*.safetensors")}
    once = {name for name in files if not re.fullmatch(r"rank\d+", name)}
    foreign = sorted((states.keys() | once) - parts.keys())
    if foreign:
        hint = "resume with the trainer that wrote it"
        fail("resume_from_checkpoint", f"the state of {', '.join(parts)}", foreign, hint)
    for name, part in parts.items():
        if name in shared:
            part.load_state_dict(load_file(folder / shared_file(name)) if name in once else None)
        elif name in states:
            part.load_state_dict(states[name])
        else:
            logger.warning("resume_from_checkpoint: %s has no %s, which starts anew", folder, name)


def _is_shared(part: Stateful) -> bool:
    return getattr(part, "shared", False)


def _rank(folder: Path, rank: int) -> tuple[Path, Path]:
    return folder / rank_file(rank, "json"), folder / rank_file(rank, "safetensors")


def _copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in named}


def _without_tensors(value: Any, path: tuple, found: list[tuple[tuple, Tensor]]) -> Any:
    """The same tree with None for each tensor, which goes to `found` with the way to it."""
    if isinstance(value, Tensor):
        found.append((path, value))
        return None
    if isinstance(value, Mapping):
        return {str(k): _without_tensors(v, (*path, str(k)), found) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, (*path, i), found) for i, v in enumerate(value)]
    return value


def _read_rank(folder: Path, rank: int) -> dict[str, Any]:
    """The states of a rank's own parts, tensors on the CPU."""
    state_file, tensor_file = _rank(folder, rank)
    stored = json.loads(state_file.read_text(encoding="utf-8"))
    tensors = load_file(tensor_file)
    if "parts" not in stored:
        return _format_1(stored, tensors)
    for key, (*parents, last) in stored["tensors"].items():
        functools.reduce(operator.getitem, parents, stored["parts"])[last] = tensors[key]
    return stored["parts"]


def _format_1(stored: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The states in a checkpoint of 0.1.0 before 2026-11-27."""
    window: list[dict[str, Any]] = [dict.fromkeys(names) for names in stored["absent"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        window[int(index)][name] = value
    state = stored["state"]
    counters = {name: state[name] for name in ("tokens_seen", "loss_since_log", "last_logged")}
    return {
        "window": {"served": state["micro_step"], "micro_batches": window},
        "counters": counters,
        "metrics": state["metrics"],
        "completions": state["completions"],
    }


def seal(folder: Path, fingerprint: dict[str, Any], followed: dict[str, Any] | None = None) -> None:
    """Declare a checkpoint complete: flush its files, then write the marker with their sizes and
    hashes.

    Args:
        followed: arguments that a resumed run takes from itself.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    for path in files:
        _sync(path)
    names = [path.relative_to(folder).as_posix() for path in files]
    marker = {
        "format": _FORMATS[-1],
        "files": {name: path.stat().st_size for name, path in zip(names, files, strict=True)},
        "sha256": dict(zip(names, _hashes(files), strict=True)),
        "fingerprint": fingerprint,
        "followed": followed or {},
    }
    write_json(folder / MARKER, marker)
    _sync(folder)


def _hashes(files: list[Path]) -> list[str]:
    def one(path: Path) -> str:
        total = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
        return total.hexdigest()

    # hashing holds no GIL, and a large checkpoint is several files
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, files))


def changes(folder: Path, followed: dict[str, Any]) -> list[str]:
    """What the run of a complete checkpoint was told otherwise, of the arguments that a resumed
    run follows: one line each."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    stored = marker.get("followed", {})
    current = json.loads(json.dumps(followed, default=str))
    return [
        f"{name} was {stored[name]!r}, is {value!r}"
        for name, value in current.items()
        if name in stored and stored[name] != value
    ]


def problem(folder: Path, hashed: bool = False) -> str | None:
    """Why a checkpoint folder cannot be resumed, or None when it is complete.

    Args:
        hashed: read every file, too, and compare its hash.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / MARKER).is_file():
        return (
            f"it is incomplete (no {MARKER}): the save was interrupted or another program wrote it"
        )
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes, hashes = dict(marker["files"]), dict(marker.get("sha256", {}))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return f"{MARKER} is damaged"
    if marker.get("format") not in _FORMATS:
        known = " or ".join(map(str, _FORMATS))
        return f"{MARKER} has format {marker.get('format')!r}, expected {known}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes, expected {size}"
    if hashed:
        for name, found in zip(hashes, _hashes([folder / name for name in hashes]), strict=True):
            if found != hashes[name]:
                return f"its file {name} is damaged: its hash is not the one that was written"
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
        reason = problem(path, hashed=True)
        if reason is None:
            return path, skipped
        skipped.append(f"{path}: {reason}")
    listing = "; ".join(skipped) if skipped else "it holds no checkpoint-<step> folder"
    expected = f"a complete checkpoint in {output_dir}"
    fail("resume_from_checkpoint", expected, f"none: {listing}")


def check(
    folder: Path, fingerprint: dict[str, Any], defaults: dict[str, Any], hashed: bool = True
) -> None:
    """Refuse a checkpoint that is incomplete or comes from another configuration.

    Args:
        defaults: the value of a key that a checkpoint lacks, because it is older than the option.
        hashed: compare the hash of every file, too.

    Raises:
        ValueError: naming the folder and the reason, or every differing key with both values.
    """
    reason = problem(folder, hashed)
    if reason:
        fail("resume_from_checkpoint", "a complete checkpoint", f"{folder}: {reason}")
    stored = json.loads((folder / MARKER).read_text(encoding="utf-8"))["fingerprint"]
    # through JSON, as the stored one went: tuples become lists
    current = json.loads(json.dumps(fingerprint, default=str))
    defaults = json.loads(json.dumps(defaults, default=str))
    stored = {k: v for k, v in stored.items() if k not in _DERIVED}
    stored = {**{k: v for k, v in defaults.items() if k in current}, **stored}
    keys = [k for k in (stored | current) if stored.get(k) != current.get(k)]
    if keys:
        listing = ", ".join(f"{k} was {stored.get(k)!r}, is {current.get(k)!r}" for k in keys)
        expected = "a checkpoint of this configuration"
        fail("resume_from_checkpoint", expected, f"{folder} of another one: {listing}")
