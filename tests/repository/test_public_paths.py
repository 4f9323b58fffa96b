"""Import paths that users have: those of 0.1.0 before its modules became packages, and those that
the documentation names. A path may move inside; it may not stop working."""

import importlib
import re
import types

import pytest
from imports import ROOT

import grpo_fast

# module of 0.1.0 -> what stood in it for others: its __all__, or else its public definitions
PATHS = {
    "advantages": (
        "SCALES SCHEMES group_advantages centered_advantages leave_one_out_advantages "
        "check_weighting reward_weights ADVANTAGES check_estimator advantages_of"
    ),
    "cli": "main train load_datasets load_rewards",
    "config": "LossConfig",
    "integrations.liger": "LigerFusedLinearGRPOLoss triton_grpo_loss",
    "integrations.openrlhf": "TESTED install uninstall",
    "integrations.openrlhf_ray": "setup runtime_env",
    "integrations.prime_rl": "policy_loss",
    "integrations.swift": "patch_swift unpatch_swift",
    "integrations.trl": "FastGRPOTrainer patch_trl unpatch_trl",
    "integrations.verl": "patch_verl register registered unpatch_verl",
    "loss": "linear_policy_loss",
    "models": (
        "Head ReferencePolicy attach check_head detach evaluating find_head innermost is_attached "
        "load_policy load_processing"
    ),
    "plan": "ROUTES Facts Plan choose",
    "reference": "head_logits kl_divergence logprob policy_loss",
    "rewards": "RewardSet load_function reasoning_gym_dataset reasoning_gym_reward weighted",
    "rollout": "Rollouts generate",
    "trainer": "GRPOTrainer",
}
# they have functions of the same names as the front page's, for another purpose
NAMESAKES = ("reference", "integrations.prime_rl")
# (module, name) that is missing today, and why; empty is the aim
KNOWN: dict[tuple[str, str], str] = {
    ("cli", "train"): "a module has the name now; nothing documents the function",
}
NAMES = [(module, name) for module, names in PATHS.items() for name in names.split()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IMPORT = re.compile(r"^ *from (grpo_fast[\w.]*) import (\([^)]*\)|[^\n#]*)", re.MULTILINE)
DOTTED = re.compile(r"\bgrpo_fast(?:\.\w+)+")


def module_of(name: str) -> types.ModuleType:
    """The module; where a package of others that it needs is not installed, the test is skipped."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        cause: BaseException | None = error
        while cause is not None:
            missing = getattr(cause, "name", None)
            if missing and missing.split(".")[0] != "grpo_fast":
                pytest.skip(f"{name} needs {missing}, which is not installed here")
            cause = cause.__cause__ or cause.__context__
        raise


def documented() -> set[str]:
    """Names in import lines of the pages, and dotted names anywhere in them."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for module, names in IMPORT.findall(text):
            plain = [name.split(" as ")[0].strip() for name in names.strip("()").split(",")]
            found |= {f"{module}.{name}" for name in plain if name}
        found |= set(DOTTED.findall(text))
    return {name.rstrip(".") for name in found}


def resolve(path: str) -> object:
    """What a dotted name stands for: the longest module in it, then attributes."""
    parts, value = path.split("."), module_of("grpo_fast")
    for length, name in enumerate(parts[1:], 2):
        if not hasattr(value, name) and isinstance(value, types.ModuleType):
            module_of(".".join(parts[:length]))
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("module, name", NAMES, ids=[f"{m}.{n}" for m, n in NAMES])
def test_a_path_of_0_1_0_gives_the_same_object(module, name):
    owner = module_of(f"grpo_fast.{module}")
    value = getattr(owner, name, None)
    if (module, name) in KNOWN:
        # works again: take the row out
        assert value is None or isinstance(value, types.ModuleType)
        return
    assert value is not None and not isinstance(value, types.ModuleType)
    if name in grpo_fast.__all__ and module not in NAMESAKES:
        assert value is getattr(grpo_fast, name)
    home = getattr(value, "__module__", "")
    # a class or function is one object at both ends, and stands in the room of its path
    if isinstance(home, str) and home.startswith("grpo_fast."):
        assert getattr(importlib.import_module(home), name) is value


@pytest.mark.parametrize("path", sorted(documented()))
def test_a_documented_path_works(path):
    resolve(path)


def test_the_pages_are_read():
    assert len(documented()) >= 10
    line = "    from grpo_fast.x import (\n  a,\n  b as c,\n)\n"
    assert [n.split() for _, n in IMPORT.findall(line)] == [["(", "a,", "b", "as", "c,", ")"]]


def test_a_function_keeps_its_name_beside_the_module():
    """`grpo_fast.logprob` is the function, whatever has been imported."""
    importlib.import_module("grpo_fast.engine.logprob")
    importlib.import_module("grpo_fast.loss.linear")
    assert callable(grpo_fast.logprob) and grpo_fast.loss.linear_policy_loss.__name__
