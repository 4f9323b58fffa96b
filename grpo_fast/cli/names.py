"""Names of the options of `grpo-fast train`, read from source text: a typo is answered before
transformers is imported, which takes ten seconds of CPU."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from pathlib import Path

_OURS = Path(__file__).resolve().parent.parent
_PARSER = ("config", "help", "help_all")
_PARENTS = {"TrainingArguments", "KLOptions"}


def fields_of(path: Path, name: str) -> set[str] | None:
    """Annotated fields of a dataclass without parents but those of `_PARENTS`; None where its
    source says too little."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name != name:
            continue
        parents = {base.id for base in node.bases if isinstance(base, ast.Name)}
        if len(node.bases) != len(parents) or parents - _PARENTS:
            return None
        stated = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        return {n.target.id for n in stated if "ClassVar" not in ast.unparse(n.annotation)}
    return None


def option_names() -> set[str] | None:
    """Names of all options, with underscores; None where they cannot be read."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    inherited = fields_of(Path(spec.origin).parent / "training_args.py", "TrainingArguments")
    config = fields_of(_OURS / "trainer" / "config.py", "GRPOConfig")
    kl = fields_of(_OURS / "trainer" / "kl.py", "KLOptions")
    script = fields_of(_OURS / "cli" / "options.py", "ScriptArguments")
    parts = (inherited, config, kl, script)
    if None in parts:
        return None
    return {n for part in parts for n in part if not n.startswith("_")} | set(_PARSER)


def check_names(argv: list[str]) -> None:
    """Refuse an unknown option; whatever else is wrong is for the parser.

    Raises:
        ValueError: an unknown option; the nearest one is named.
    """
    known = option_names()
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
