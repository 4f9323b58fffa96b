"""The README's snippets run, and its tables of variants and of products are what the code says.

`python tests/repository/test_readme.py` writes the tables anew.
"""

import re
from pathlib import Path

import pytest
import torch
from products import TABLE, measured

from grpo_fast import PRESETS
from grpo_fast.presets import AGGREGATIONS

README = Path(__file__).resolve().parents[2] / "README.md"
VARIANTS = (
    "<!-- variants: written by tests/repository/test_readme.py from PRESETS; do not edit -->",
    "<!-- end of variants -->",
)
PRODUCTS = (
    "<!-- products: written by tests/repository/test_readme.py; do not edit -->",
    "<!-- end of products -->",
)
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


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


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


@pytest.mark.parametrize("marks, table", [(VARIANTS, variants_table), (PRODUCTS, products_table)])
def test_tables_are_what_the_code_says(marks, table):
    text = README.read_text(encoding="utf-8")
    assert text.split(marks[0])[1].split(marks[1])[0].strip() == table()


def test_peers_are_compared_by_names_that_exist():
    assert {name for peer in PEERS.values() for name in peer} <= set(PRESETS)


def test_three_uses_are_shown():
    code = "\n".join(snippets())
    assert len(snippets()) == 3
    for name in ("policy_loss(", "linear_policy_loss(", "GRPOTrainer("):
        assert name in code


@pytest.mark.parametrize("number", [0, 1])
def test_loss_snippets_run(number, capsys):
    scope: dict = {}
    exec(compile(snippets()[number], f"README snippet {number}", "exec"), scope)
    assert scope["loss"].isfinite() and scope["loss"].item() != 0
    gradients = [scope[n].grad for n in ("logits", "hidden", "weight") if n in scope]
    assert all(g.abs().sum() > 0 for g in gradients)


def test_trainer_snippet_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from tiny_trainer import model, tokenizer

    folder = tmp_path / "model"
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    code = snippets()[2].replace("Qwen/Qwen3-0.6B", str(folder))
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code.replace("max_steps=200", "max_steps=2"), "README snippet", "exec"), scope)
    folder = tmp_path / "runs" / "readme"
    assert (folder / "metrics.jsonl").is_file() and scope["trainer"].state.global_step == 2


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for marks, table in ((VARIANTS, variants_table), (PRODUCTS, products_table)):
        before, rest = text.split(marks[0])
        text = f"{before}{marks[0]}\n{table()}\n{marks[1]}{rest.split(marks[1])[1]}"
    README.write_text(text, encoding="utf-8")
