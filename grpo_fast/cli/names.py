"""Names of the options of the commands that train, read from source text: a typo is answered
before transformers is imported, which takes ten seconds of CPU."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from pathlib import Path

_OURS = Path(__file__).resolve().parent.parent
_PARSER = ("config", "help", "help_all")
# class of options -> its file; its parents have to be rows of this table, or of transformers
_CLASSES = {
    "ForwardOptions": "trainer/forward_options.py",
    "GRPOConfig": "trainer/config.py",
    "KLOptions": "trainer/kl.py",
    "LossOptions": "trainer/loss_options.py",
    "MemoryOptions": "trainer/memory_options.py",
    "PPOConfig": "trainer/ppo_config.py",
    "ReplayOptions": "trainer/replay_options.py",
    "RewardOptions": "trainer/reward_options.py",
    "SamplingOptions": "trainer/sampling_options.py",
    "ScriptArguments": "cli/options.py",
    "TRLOptions": "trainer/trl_options.py",
}
_INHERITED = "TrainingArguments"


def fields_of(name: str) -> set[str] | None:
    """Annotated fields of a dataclass and of its parents; None where its source says too little."""
    path = _inherited_path() if name == _INHERITED else _OURS / _CLASSES.get(name, "")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, AttributeError, SyntaxError, UnicodeDecodeError):
        return None
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name != name:
            continue
        stated = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        found = {n.target.id for n in stated if "ClassVar" not in ast.unparse(n.annotation)}
        for base in node.bases:
            further = fields_of(base.id) if isinstance(base, ast.Name) else None
            if further is None:
                return None
            found |= further
        return found
    return None


def _inherited_path() -> Path | None:
    spec = importlib.util.find_spec("transformers")
    return spec and spec.origin and Path(spec.origin).parent / "training_args.py"


def option_names(config: str = "GRPOConfig") -> set[str] | None:
    """Names of all options, with underscores; None where they cannot be read.

    Args:
        config: name of the class of the trainer's arguments.
    """
    parts = (fields_of(config), fields_of("ScriptArguments"))
    if None in parts:
        return None
    return {n for part in parts for n in part if not n.startswith("_")} | set(_PARSER)


def check_names(argv: list[str], config: str = "GRPOConfig") -> None:
    """Refuse an unknown option; whatever else is wrong is for the parser.

    Args:
        config: name of the class of the trainer's arguments.

    Raises:
        ValueError: an unknown option; the nearest one is named.
    """
    known = option_names(config)
    if known is None:
        return
    for token in argv:
        option = token.split("=")[0]
        name = option.lstrip("-").replace("-", "_")
        if not token.startswith("--") or name in known or name.removeprefix("no_") in known:
            continue
        raise ValueError(f"unknown option {option}{nearest_option(name, sorted(known))}")


def nearest_option(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown option."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        return "; --help-all lists the options."
    return f"; did you mean --{close[0].replace('_', '-')}?"
