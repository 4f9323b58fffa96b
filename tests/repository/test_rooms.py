"""Which room may import which: the arrows of CONTRIBUTING.md, for every import statement of the
package, those inside functions too. `importlib.import_module` is not read; only
`grpo_fast/__init__.py` uses it for modules of ours."""

import ast

from imports import ROOT, imports_of, package_imports, parts_of

from grpo_fast import LossConfig
from grpo_fast.presets import OBJECTIVES, PRESETS

# room -> the rooms that it may import, besides itself
GROUND = {"presets", "checks"}
LOW = GROUND | {"config", "rows"}
LOSS = LOW | {"objective", "engine", "plan"}
DATA = LOSS | {"loss", "advantages", "rewards", "reference", "models", "rollout"}
ARROWS = {
    "presets": set(),
    "checks": set(),
    "config": GROUND,
    "rows": GROUND,
    "objective": LOW,
    "engine": LOW | {"kernels"},
    "advantages": LOW,
    "rewards": LOW,
    "reference": LOW,
    "plan": LOW | {"objective", "engine", "models"},
    "loss": LOSS,
    "models": LOW | {"engine"},
    "rollout": LOW | {"engine", "models"},
    "trainer": DATA,
    "cli": DATA | {"trainer"},
    "integrations": DATA,
    # what `import grpo_fast` offers
    "grpo_fast": DATA | {"trainer"},
}
# the only files, besides those of engine/ and loss/, that may see the chunk loop
SEES_CHUNKS = {"grpo_fast/plan/shape.py", "grpo_fast/__init__.py"}
# (file, imported name) that breaks an arrow today, and why it stands; empty is the aim
KNOWN: dict[tuple[str, str], str] = {}
IMPORTS = package_imports()


def room(name: str) -> str:
    """grpo_fast.loss.linear -> loss; of `import grpo_fast` alone, grpo_fast."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ARROWS | {"kernels": ()} else "grpo_fast"


def room_of_file(path: str) -> str:
    return room(".".join(parts_of(ROOT / path)))


def unexpected(found) -> list[str]:
    """Imports that are in no row of KNOWN, as file:line and name."""
    broken = [i for i in found if (i.path, i.name) not in KNOWN]
    return [f"{i.path}:{i.line} imports {i.name}" for i in broken]


def breaks_an_arrow(found) -> bool:
    here, there = room_of_file(found.path), room(found.name)
    # `from grpo_fast import __version__` is no arrow
    return there not in {here, "grpo_fast"} and there not in ARROWS[here]


def sees_chunks(found) -> bool:
    inner = found.name.split(".")[1:3]
    is_loop = inner in (["engine", "chunks"], ["engine", "gemm"])
    allowed = room_of_file(found.path) in ("engine", "loss") or found.path in SEES_CHUNKS
    return is_loop and not allowed


def test_the_table_has_every_room():
    folder = ROOT / "grpo_fast"
    rooms = {p.stem for p in folder.glob("*.py")} | {
        p.name for p in folder.iterdir() if (p / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} == set(ARROWS) - {"grpo_fast"}


def test_arrows_point_where_they_may():
    assert unexpected(i for i in IMPORTS if breaks_an_arrow(i)) == []


def test_only_the_engine_the_loss_and_the_facts_of_a_shape_see_chunks():
    assert unexpected(i for i in IMPORTS if sees_chunks(i)) == []


def test_no_circle_between_rooms():
    """By the statements themselves, so that a row of ARROWS cannot allow one."""
    edges: dict[str, set[str]] = {}
    for found in IMPORTS:
        here, there = room_of_file(found.path), room(found.name)
        if here != there and "grpo_fast" not in (here, there):
            edges.setdefault(here, set()).add(there)
    done: set[str] = set()
    while rest := set(edges) - done:
        free = {here for here in rest if edges[here] & set(edges) <= done}
        assert free, f"a circle among {sorted(rest)}"
        done |= free


def test_kernels_import_only_kernels():
    for path in (ROOT / "kernels").glob("*.py"):
        for found in imports_of(path):
            assert found.name.startswith("grpo_fast.kernels."), found


def test_known_rows_are_still_needed():
    broken = {(i.path, i.name) for i in IMPORTS if breaks_an_arrow(i) or sees_chunks(i)}
    assert set(KNOWN) <= broken


# names of losses and of their functions, but for words that mean something else elsewhere
VARIANTS = {*PRESETS, *OBJECTIVES}
# the tables, and the definition that everything is compared with
NAMES_THEM = {"grpo_fast/presets.py", "grpo_fast/reference.py"}
BELOW_THE_TRAINER = ("advantages", "config", "engine", "loss", "models", "objective", "plan")


def strings_of(path) -> list[tuple[int, str]]:
    """Line and text of every string that is no documentation."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    stated = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    constants = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in stated)
    return [(n.lineno, n.value) for n in constants if isinstance(n.value, str)]


def test_no_variant_is_named_below_the_trainer():
    """A variant is one row: no `if loss_type == ...` outside the tables. The default of LossConfig
    names one, as it must."""
    found = []
    for path in sorted((ROOT / "grpo_fast").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name in NAMES_THEM or room_of_file(name) not in BELOW_THE_TRAINER:
            continue
        found += [f"{name}:{line} {text}" for line, text in strings_of(path) if text in VARIANTS]
    (default,) = found
    assert default.startswith("grpo_fast/config.py:") and default.endswith(LossConfig.loss_type)
