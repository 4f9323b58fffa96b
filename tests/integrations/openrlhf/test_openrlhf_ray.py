"""`install` in the workers of a Ray that the tests start, by both ways of docs/openrlhf.md.

Where openrlhf or ray is missing the file is skipped; `make test-openrlhf` has both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openrlhf", reason="needs openrlhf, which `make test-openrlhf` lays over")
pytest.importorskip("ray", reason="needs ray, which `make test-openrlhf` lays over")
from openrlhf.models import Actor

from grpo_fast.integrations import openrlhf_ray
from grpo_fast.integrations.openrlhf import actor as adapter

ROOT = Path(__file__).resolve().parents[3]
SUPPORT = ROOT / "tests" / "support"
MODULE = "grpo_fast.integrations.openrlhf_ray"
OURS = "grpo_fast.integrations.openrlhf.actor"


@pytest.fixture(autouse=True)
def stock_again():
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    adapter.uninstall()


def ask(**variables: str) -> dict:
    """What the driver prints."""
    paths = [str(ROOT), str(SUPPORT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # the workers start in a folder of Ray's
    path = os.pathsep.join(str(Path(p).resolve()) for p in paths if p)
    told = subprocess.run(
        [sys.executable, "-W", "ignore", str(SUPPORT / "openrlhf_driver.py")],
        env={**os.environ, "PYTHONPATH": path, "RAY_DEDUP_LOGS": "0", **variables},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-4000:]
    return json.loads(told.stdout.strip().splitlines()[-1])


def test_by_the_hook_of_the_driver():
    """RAY_RUNTIME_ENV_HOOK=... python3 -m openrlhf.cli.train_ppo_ray"""
    variables = {"RAY_RUNTIME_ENV_HOOK": f"{MODULE}.runtime_env"}
    told = ask(**variables, GRPO_FAST_OPENRLHF='{"loss_type": "gspo", "epsilon": 0.01}')
    assert told == {
        "forward": OURS,
        "forward of the actor": OURS,
        "loss": "grpo_fast.integrations.openrlhf.loss",
        "loss_type": "gspo",
        "imported": [],
    }


def test_by_the_environment_of_a_job():
    """ray job submit --runtime-env-json ...: its server hands that over in this variable."""
    env = {"worker_process_setup_hook": f"{MODULE}.setup"}
    env["env_vars"] = {"GRPO_FAST_OPENRLHF": "{}"}
    job = json.dumps({"runtime_env": env, "metadata": {}})
    told = ask(RAY_JOB_CONFIG_JSON_ENV_VAR=job)
    assert told == {
        "forward": OURS,
        "forward of the actor": OURS,
        "loss": "openrlhf.models.loss",
        "loss_type": None,
        "imported": [],
    }


def test_setup_waits_for_the_import(monkeypatch):
    """In a process without OpenRLHF, and at once where it is there already."""
    code = f"""
import sys
from {MODULE} import setup
setup()
assert not any(n.split(".")[0] in ("openrlhf", "deepspeed", "transformers") for n in sys.modules)
import openrlhf.models
print(openrlhf.models.Actor.forward.__module__, openrlhf.models.PolicyLoss.options)
import openrlhf.models.model
assert not any(type(f).__module__ == {MODULE!r} for f in sys.meta_path)
"""
    given = {**os.environ, "GRPO_FAST_OPENRLHF": '{"loss_type": "sapo"}'}
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=given,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == f"{OURS} {{'loss_type': 'sapo'}}", told.stderr[-2000:]
    monkeypatch.setenv("GRPO_FAST_OPENRLHF", "")
    openrlhf_ray.setup()
    assert Actor.forward is adapter._forward


@pytest.mark.parametrize("text", ["{", "[1]", "dapo"])
def test_options_that_are_no_object(text, monkeypatch):
    monkeypatch.setenv("GRPO_FAST_OPENRLHF", text)
    for call in (openrlhf_ray.setup, lambda: openrlhf_ray.runtime_env(None)):
        with pytest.raises(ValueError, match="GRPO_FAST_OPENRLHF: expected a JSON object"):
            call()
    assert Actor.forward is adapter._STOCK


def test_the_driver_refuses_first(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_OPENRLHF", '{"loss_type": "dapo", "beta": 0.1}')
    with pytest.raises(ValueError, match="beta: expected OpenRLHF's own option"):
        openrlhf_ray.runtime_env({})


def test_what_else_is_in_the_environment_stays(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_OPENRLHF", "{}")
    given = {"working_dir": "/somewhere", "env_vars": {"NCCL_DEBUG": "INFO"}}
    env = openrlhf_ray.runtime_env(given)
    assert env == {
        "working_dir": "/somewhere",
        "env_vars": {"NCCL_DEBUG": "INFO", "GRPO_FAST_OPENRLHF": "{}"},
        "worker_process_setup_hook": f"{MODULE}.setup",
    }
    assert given["env_vars"] == {"NCCL_DEBUG": "INFO"}
    assert openrlhf_ray.runtime_env(env) == env
    with pytest.raises(ValueError, match="worker_process_setup_hook: expected none"):
        openrlhf_ray.runtime_env({"worker_process_setup_hook": "mine.setup"})
