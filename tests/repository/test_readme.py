"""Snippets and commands of README.md and docs/ run; what a script writes there is up to date.

`PYTHONPATH=.:tests/support python tests/repository/test_readme.py` writes the tables of variants
and of products and the tree anew.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from products import TABLE, measured

from grpo_fast import PRESETS, LossConfig, cli, linear_policy_loss
from grpo_fast.presets import AGGREGATIONS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# Pages whose every snippet is complete. In those of the adapters some show a change of a script.
WHOLE = ("README.md", "docs/losses.md", "docs/options.md", "docs/routes.md", "docs/precision.md")
WHOLE += ("docs/benchmarks.md", "docs/trainer.md", "docs/ppo.md", "docs/integrations.md")
PROSE = ("README.md", "CONTRIBUTING.md", "kernels/README.md")
PROSE += tuple(f"docs/{path.name}" for path in sorted(DOCS.glob("*.md")))
FOLDERS = {
    "kernels": "Triton only: from logits to statistics, losses and gradients",
    "benchmarks": "cases; contestants in peers/, clocks in measure/, pages in report/, results/",
    "tests": "the truth is reference.py in float64",
    "docs": "the pages above, and one for each adapter",
    "requirements": "pinned versions, and what each peer needs",
    ".ci": "what every change has to pass",
}
_TRL_EIGHT = dict.fromkeys(
    ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"), "yes"
)
# read in the packages' code; what is not named is not there
PEERS = {
    "TRL 1.16": {**_TRL_EIGHT, "gspo": "level", "gmpo": "experimental", "rloo": "yes"},
    "Liger 0.8.5": {**_TRL_EIGHT, "gspo": "level"},
    "verl 0.9.1": {
        **dict.fromkeys(("cispo", "sapo", "gspo_token", "gmpo", "ppo", "gpg"), "yes"),
        **dict.fromkeys(("dapo", "dr_grpo", "grpo", "dppo_tv", "dppo_kl", "reinforce"), "yes"),
        "rloo": "advantage",
    },
    "unsloth-zoo 2026.10": {**_TRL_EIGHT, "gspo": "level"},
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


SNIPPETS = [(page, k, code) for page in WHOLE for k, code in enumerate(blocks(page, "python"))]


ALL = "\n".join(text_of(page) for page in WHOLE)


def variants_table() -> str:
    names = ("`loss_type`", "objective", "ratio", "aggregation", "denominator", *PEERS, "source")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, preset in PRESETS.items():
        scope = "accumulation window, all ranks" if preset.window else "micro-batch"
        unit = AGGREGATIONS[preset.weights]
        levels = ", ".join(preset.levels).replace("_", " ") or "none"
        cells = (
            f"`{name}`",
            preset.objective,
            levels,
            preset.weights.replace("_", " "),
            f"{unit} of the {scope}",
            *(peer.get(name, "-") for peer in PEERS.values()),
            preset.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def products_table() -> str:
    lines = ["| case | measured | bound |", "|---|---|---|"]
    for name, *case, bound in TABLE:
        lines.append(f"| {name} | {measured(*case):.2f} | {bound} |")
    with torch.no_grad():
        lines.append(f"| `torch.no_grad` | {measured('dapo', 1.0, False, False):.2f} | 2.1 |")
    return "\n".join(lines)


def first_sentence(module: Path) -> str:
    """What the docstring of a module says first, without a full stop."""
    words = " ".join(ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))).split())
    return words.split(". ")[0].rstrip(".")


def tree() -> str:
    """Rooms of the package by their docstrings, then the other folders."""
    package = ROOT / "grpo_fast"
    files = sorted(path for path in package.glob("*.py") if path.stem != "__init__")
    rooms = sorted(path.parent for path in package.glob("*/__init__.py"))
    lines = ["grpo_fast/"]
    lines += [f"  {path.name:<16}{first_sentence(path)}" for path in files]
    lines += [f"  {path.name + '/':<16}{first_sentence(path / '__init__.py')}" for path in rooms]
    lines += [f"{name + '/':<18}{what}" for name, what in FOLDERS.items()]
    return "\n".join(["```text", *lines, "```"])


class Block(NamedTuple):
    """What a script writes into a page, between two marks."""

    page: Path
    name: str
    how: str
    text: Callable[[], str]

    def replaced(self) -> str:
        """The page with the block as it should be."""
        start = f"<!-- {self.name}: {self.how}; do not edit -->"
        end = f"<!-- end of {self.name} -->"
        before, rest = self.page.read_text(encoding="utf-8").split(start)
        return f"{before}{start}\n{self.text()}\n{end}{rest.split(end)[1]}"


BLOCKS = (
    Block(
        DOCS / "losses.md",
        "variants",
        "written by test_readme.py from PRESETS",
        variants_table,
    ),
    Block(DOCS / "routes.md", "products", "written by test_readme.py", products_table),
    Block(README, "tree", "written by test_readme.py", tree),
)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_blocks_are_what_the_code_says(block):
    assert block.page.read_text(encoding="utf-8") == block.replaced()


def test_peers_are_compared_by_names_that_exist():
    assert {name for peer in PEERS.values() for name in peer} <= set(PRESETS)


def test_the_front_page_is_short():
    assert len(text_of("README.md").splitlines()) <= 160
    code = blocks("README.md", "python")
    # the loss in 12 lines of code, the trainer in 12
    assert len(code) == 2
    for block in code:
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 12


def test_every_folder_is_in_the_tree():
    known = {path.parts[0] for path in map(Path, tracked()) if len(path.parts) > 1}
    assert known == {"grpo_fast", *FOLDERS}


def tracked() -> list[str]:
    """The files that git knows."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a checkout and git")
    command = ["git", "-C", str(ROOT), "ls-files"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_three_uses_are_shown():
    code = "\n".join(code for page, _, code in SNIPPETS)
    for name in ("policy_loss(", "linear_policy_loss(", "linear_logprob(", "GRPOTrainer("):
        assert name in code


def shortened(code: str, folder: Path) -> str:
    """A snippet of the trainer with a tiny model and two steps."""
    from tiny_trainer import model, tokenizer

    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    code = code.replace("Qwen/Qwen3-0.6B", str(folder / "model"))
    return code.replace("max_steps=200", "max_steps=2")


@pytest.mark.parametrize("page, number, code", SNIPPETS, ids=[f"{p}-{k}" for p, k, _ in SNIPPETS])
def test_snippets_run(page, number, code, tmp_path, monkeypatch):
    if re.search(r"transformers|POTrainer", code):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    if "POTrainer" in code:
        code = shortened(code, tmp_path)
    scope: dict = {}
    exec(compile(code, f"{page}, snippet {number}", "exec"), scope)
    if "trainer" in scope:
        assert (tmp_path / scope["args"].output_dir / "metrics.jsonl").is_file()
        assert scope["trainer"].state.global_step == 2
        return
    assert scope["loss"].isfinite() and scope["loss"].item() != 0
    leaves = [scope[name] for name in ("logits", "hidden", "weight") if name in scope]
    leaves += scope["model"].parameters() if "model" in scope else []
    assert leaves and all(leaf.grad.abs().sum() > 0 for leaf in leaves)


def defines(name: str) -> bool:
    """Whether grpo_fast.a.b is a module here, or a name in the text of the module before it."""
    *parts, last = name.split(".")
    module = ROOT.joinpath(*parts)
    inside = module / last
    if (inside / "__init__.py").is_file() or inside.with_suffix(".py").is_file():
        return True
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    return file.is_file() and re.search(rf"\b{last}\b", file.read_text("utf-8")) is not None


def named_in(text: str) -> set[str]:
    """Dotted names of ours: imports, entry points, options of other trainers."""
    found = set(re.findall(r"\bgrpo_fast(?:\.[A-Za-z_]\w*)+", text))
    for module, names in re.findall(r"from (grpo_fast[\w.]*) import ([\w, ]+)", text):
        found |= {f"{module}.{name.split(' as ')[0].strip()}" for name in names.split(",")}
    return {name for name in found if not name.endswith(".md")}


@pytest.mark.parametrize("page", PROSE)
def test_every_name_of_ours_in_a_page_exists(page):
    text = text_of(page)
    assert {name for name in named_in(text) if not defines(name)} == set()
    rules = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"`(?:\w+=\S+ )?make\s([\w.-]+)`", text)) <= rules | {".venv"}


def test_plans_are_what_the_command_prints(capsys):
    shown = re.findall(r"```bash\ngrpo-fast (plan .*?)```\n\n```text\n(.*?)```", ALL, re.DOTALL)
    assert shown
    for command, printed in shown:
        assert cli.main(command.split()) == 0
        assert capsys.readouterr().out == printed


def test_the_page_of_options_has_every_option():
    rows = re.findall(r"^\| (`.*?) \| ([\w, ]+) \|", text_of("docs/options.md"), re.MULTILINE)
    fields = {field.name for field in dataclasses.fields(LossConfig)}
    arguments = set(inspect.signature(linear_policy_loss).parameters)
    arguments -= {"hidden", "weight", "ids"}
    named: set[str] = set()
    for names, where in rows:
        inside = set(re.findall(r"`(\w+)`", names))
        kinds = {"field": fields, "argument": arguments}
        known = fields | arguments if "," in where or where == "both" else kinds[where]
        assert inside <= known, names
        named |= inside
    assert named == fields | arguments


def test_every_extra_is_named():
    extras = text_of("setup.py").partition("extras_require={")[2].partition("\n    },")[0]
    names = re.findall(r"^        \"(\w+)\":", extras, re.MULTILINE)
    assert names and re.findall(r"^\| `(\w+)` \|", text_of("docs/install.md"), re.M) == names


if __name__ == "__main__":
    for block in BLOCKS:
        block.page.write_text(block.replaced(), encoding="utf-8")
