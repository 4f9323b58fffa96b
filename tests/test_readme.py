"""The README's snippets run and its variants table is PRESETS.

`python tests/test_readme.py` writes the table anew.
"""

import re
from pathlib import Path

import pytest

from grpo_fast import PRESETS
from grpo_fast.config import AGGREGATIONS

README = Path(__file__).resolve().parent.parent / "README.md"
MARKS = (
    "<!-- variants: written by tests/test_readme.py from PRESETS; do not edit -->",
    "<!-- end of variants -->",
)


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def variants_table() -> str:
    lines = [
        "| `loss_type` | objective | weights | denominator | source |",
        "|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        scope = "accumulation window, all ranks" if preset.window else "micro-batch"
        unit = AGGREGATIONS[preset.weights]
        scheme = preset.weights.replace("_", " ")
        cells = (f"`{name}`", preset.objective, scheme, f"{unit} of the {scope}", preset.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_variants_table_is_presets():
    text = README.read_text(encoding="utf-8")
    assert text.split(MARKS[0])[1].split(MARKS[1])[0].strip() == variants_table()


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
    before, rest = README.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    text = f"{before}{MARKS[0]}\n{variants_table()}\n{MARKS[1]}{after}"
    README.write_text(text, encoding="utf-8")
