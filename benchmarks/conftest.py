"""`pytest benchmarks`: the options, the session that measures each case once, the result file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

# torch's profiler announces every start and stop on the terminal otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# and TRL reports its use to a hub
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import CASES, Case
from benchmarks.measure import timing
from benchmarks.measure.clock import replay
from benchmarks.measure.contest import measure, passes
from benchmarks.peers import PEERS

ROOT = Path(__file__).resolve().parent.parent
PARTIAL = ROOT / ".benchmarks" / "partial.jsonl"
PACKAGES = ("torch", "triton", "transformers", "numpy")


def pytest_addoption(parser):
    group = parser.getgroup("grpo_fast")
    group.addoption("--cases", choices=sorted(CASES), help="set of cases (default: gpu or cpu)")
    group.addoption(
        "--seconds-per-case",
        type=float,
        default=None,
        help="time for the timed rounds of a pass, of which there are 3 to 30 (default 10; gpu 3)",
    )
    group.addoption(
        "--time-limit",
        type=float,
        default=None,
        help="seconds after which no further case is started (default: cpu 800, gpu 480)",
    )
    group.addoption(
        "--fresh", action="store_true", help="measure again what an earlier run has measured"
    )
    group.addoption(
        "--partial",
        type=Path,
        default=PARTIAL,
        help="file to which each case goes as it is measured, and from which a stopped run goes on "
        f"(default: {PARTIAL.relative_to(ROOT)})",
    )


def pytest_configure(config):
    config.grpo_fast = Session(config)
    target = config.getoption("benchmark_json", None)
    if target:
        # pytest-benchmark opens it when everything is measured, and does not make its folder
        Path(target).absolute().parent.mkdir(parents=True, exist_ok=True)


def pytest_generate_tests(metafunc):
    """A test for each case of its level, contestant and pass."""
    level = getattr(metafunc.module, "LEVEL", None)
    if level is None or "entry" not in metafunc.fixturenames:
        return
    entries = [
        pytest.param((level, case, peer.name, name), id=f"{case.name}-{peer.name}-{name}")
        for case in CASES[metafunc.config.grpo_fast.set][level]
        for name in passes(level, case)
        for peer in PEERS
    ]
    metafunc.parametrize("entry", entries)


@pytest.fixture
def measured(request, benchmark):
    """Measure the case of an entry, once for all of its tests, and store this entry's times."""

    def store(level: str, case: Case, peer: str, name: str) -> dict:
        session = request.config.grpo_fast
        records, skipped = session.case(level, case)
        for record in records:
            if (record["peer"], record["pass"]) == (peer, name):
                break
        else:
            pytest.skip(next(s["reason"] for s in skipped if s["peer"] == peer))
        durations = record["durations"]
        benchmark.group = f"{level} {case.name} {name}"
        benchmark.extra_info.update({k: v for k, v in record.items() if k != "durations"})
        replay(benchmark, durations)
        return record

    return store


def pytest_benchmark_update_machine_info(config, machine_info):
    # the host's name is nobody's business
    machine_info.pop("node", None)
    machine_info.update(config.grpo_fast.machine())


def pytest_benchmark_update_commit_info(config, commit_info):
    # a run that goes on has the results of its first part in the work tree: no change of the code
    command = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0:
        commit_info["dirty"] = bool(found.stdout.strip())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["skipped"] = config.grpo_fast.skipped
    output_json["sources"] = config.grpo_fast.sources


class Session:
    """What a run has measured so far; kept on disk case by case, so that a stopped run goes on."""

    def __init__(self, config: pytest.Config):
        self.config = config
        cuda = torch.cuda.is_available()
        self.set = config.getoption("--cases") or ("gpu" if cuda else "cpu")
        gpu = self.set == "gpu"
        if gpu and not cuda:
            raise pytest.UsageError("--cases gpu needs an NVIDIA GPU, and torch sees none")
        self.device = torch.device("cuda" if cuda and self.set in ("gpu", "tiny") else "cpu")
        self.seconds = config.getoption("--seconds-per-case") or (3.0 if gpu else 10.0)
        limit = {"gpu": 480.0, "cpu": 800.0}.get(self.set, float("inf"))
        self.limit = config.getoption("--time-limit") or limit
        self.partial = config.getoption("--partial")
        self.start = time.monotonic()
        self.sources = _sources()
        self.done: dict[tuple[str, str], tuple[list, list]] = {}
        self.failed: dict[tuple[str, str], Exception] = {}
        self._machine: dict | None = None

    @property
    def key(self) -> str:
        """Only results of the same sources, versions and device are taken up again."""
        return json.dumps([self.sources, self.set, _versions(), _device_name(self.device)])

    @property
    def skipped(self) -> list[dict]:
        return [s for _, skipped in self.done.values() for s in skipped]

    def case(self, level: str, case: Case) -> tuple[list[dict], list[dict]]:
        """Records of a case of the loss levels, and what did not run."""
        names = [peer.name for peer in PEERS]
        return self.once(level, case.name, names, lambda: self._measure(level, case))

    def once(
        self, level: str, name: str, peers: list[str], run: Callable[[], tuple[list, list]]
    ) -> tuple[list[dict], list[dict]]:
        """What `run` returns for this case, measured once; kept on disk for a run that goes on.

        After the time limit nothing is run, and every contestant is listed with that reason.
        """
        if not self.done:
            self._take_up()
        at = (level, name)
        if at in self.done:
            return self.done[at]
        passed = time.monotonic() - self.start
        if passed > self.limit:
            why = f"the time limit of {self.limit:.0f} s was reached after {passed:.0f} s"
            case = {"name": name}
            self.done[at] = (
                [],
                [{"level": level, "case": case, "peer": peer, "reason": why} for peer in peers],
            )
            return self.done[at]
        if at in self.failed:
            raise self.failed[at]
        self.machine()
        try:
            self.done[at] = run()
        except Exception as error:
            # every test of the case says so, and none measures it again
            self.failed[at] = error
            raise
        self._keep(at, *self.done[at])
        return self.done[at]

    def _keep(self, at: tuple[str, str] | str, records: object, skipped: list) -> None:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with self.partial.open("a", encoding="utf-8") as file:
            # a line that was cut off ends here
            file.write("\n" + json.dumps([self.key, at, records, skipped]))

    def _take_up(self) -> None:
        if self.config.getoption("--fresh"):
            self.partial.unlink(missing_ok=True)
        if not self.partial.exists():
            return
        for line in self.partial.read_text(encoding="utf-8").splitlines():
            # the line that was being written when a run was killed is not whole
            try:
                key, at, records, skipped = json.loads(line)
            except ValueError:
                continue
            if key == self.key and at == "machine":
                self._machine = records
            elif key == self.key:
                self.done[tuple(at)] = (records, skipped)

    def _measure(self, level: str, case: Case) -> tuple[list[dict], list[dict]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        capture = self.config.pluginmanager.getplugin("capturemanager")
        everything = [(lv, c.name) for lv, cases in CASES[self.set].items() for c in cases]
        with capture.global_and_fixture_disabled(), Progress(*columns, transient=True) as bar:
            task = bar.add_task("", total=len(everything), completed=len(self.done))
            return measure(
                level,
                case,
                self.device,
                self.seconds,
                lambda what: bar.update(task, description=f"{level} {case.name}: {what}"),
            )

    def machine(self) -> dict:
        if self._machine is None:
            self._machine = {
                "device": self.device.type,
                "device_name": _device_name(self.device),
                "driver": _driver(self.device),
                "threads": torch.get_num_threads(),
                "versions": _versions(),
                "case_set": self.set,
                **timing.ceilings(self.device),
            }
            # measured when the cases are, not when a stopped run goes on beside something else
            self._keep("machine", self._machine, [])
        return self._machine


def _versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip()


def _sources() -> str:
    """Digest of the code that is measured and that measures; it names the state without git."""
    digest = hashlib.sha256()
    for folder in ("grpo_fast", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
