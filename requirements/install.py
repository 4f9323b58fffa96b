"""Builds the virtual environment that the Makefile's targets run in: `install.py DIR`.

Needs Python >= 3.10 and nothing else. GRPO_FAST_DEVICE is `cpu` or `cuda`; when it is not set,
`cuda` is taken where `nvidia-smi` answers. The device's name is written to `DIR/.installed` last,
so that file exists only where everything was installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEVICES = ("cpu", "cuda")
COMPILER_HINT = (
    "If that is pycosat: this requirement of reasoning-gym is compiled while it is installed and"
    " needs a C compiler and Python's headers (on Debian: apt-get install build-essential"
    " python3-dev)."
)


def choose_device() -> str:
    """GRPO_FAST_DEVICE, else `cuda` where an NVIDIA driver answers, else `cpu`."""
    device = os.environ.get("GRPO_FAST_DEVICE", "")
    if device:
        if device not in DEVICES:
            sys.exit(f"GRPO_FAST_DEVICE must be cpu or cuda, got {device!r}")
        return device
    # The file alone proves nothing: containers ship nvidia-smi without a driver.
    if shutil.which("nvidia-smi"):
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if answer.returncode == 0 and "GPU" in answer.stdout:
            return "cuda"
    return "cpu"


def create(directory: Path) -> Path:
    """Makes an empty environment, over an older one if need be, and returns its Python."""
    try:
        venv.create(directory, clear=True, with_pip=True)
    except subprocess.CalledProcessError:
        sys.exit("this Python has no venv module with pip; Debian: apt-get install python3-venv")
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # Older pips download whole wheels for --dry-run, which pulls_cuda() relies on not happening.
    pip(python, "--upgrade", "pip>=24")
    return python


def pip(python: Path, *arguments: str, hint: str = "") -> None:
    """Runs `pip install` and ends the program, with `hint`, when it fails."""
    # --no-compile: byte code is written on first import, only for what is imported.
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *arguments]
    print("+", "pip install", *arguments, flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"pip failed, see above. {hint}")


def pulls_cuda(python: Path, torch: str) -> bool:
    """Whether the `torch` that pip would choose here requires NVIDIA's packages.

    PyPI's wheel for Linux does, which is gigabytes, and another configured index may not. Asking
    pip covers both and downloads the metadata alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [str(python), "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
        options = ["--ignore-installed", "--report", str(report)]
        if subprocess.run([*command, *options, torch]).returncode:
            return True
        (chosen,) = json.loads(report.read_text())["install"]
    needed = chosen["metadata"].get("requires_dist", [])
    return any(name.startswith(("nvidia-", "cuda-")) for name in needed)


def check_torch(python: Path, device: str) -> None:
    """Ends the program when torch does not import, or is not the build for `device`."""
    script = "import torch; print(torch.__version__, 'cuda' if torch.version.cuda else 'cpu')"
    answer = subprocess.run([str(python), "-c", script], capture_output=True, text=True)
    if answer.returncode:
        sys.exit(f"the installed torch does not import:\n{answer.stderr}")
    version, build = answer.stdout.split()
    if build != device:
        sys.exit(f"GRPO_FAST_DEVICE={device}, but pip installed torch {version}, a {build} build")
    print(f"torch {version} for {device}")


def main() -> None:
    # Run by whatever `python3` is, before any installer has checked python_requires.
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit(f"grpo_fast needs Python >= 3.10, this is {sys.version.split()[0]} (set PYTHON=)")
    if len(sys.argv) != 2:
        sys.exit("usage: install.py DIRECTORY")
    directory, device, start = Path(sys.argv[1]), choose_device(), time.monotonic()
    print(f"building {directory} for {device} (GRPO_FAST_DEVICE=cpu|cuda chooses)", flush=True)
    requirements = HERE / f"{device}.txt"
    lines = requirements.read_text().splitlines()
    (torch,) = (line for line in lines if line.startswith("torch=="))
    python = create(directory)
    if device == "cpu" and pulls_cuda(python, torch):
        pip(python, "--no-deps", "--index-url", PYTORCH_CPU_INDEX, torch)
    pip(python, "-r", str(requirements), hint=COMPILER_HINT)
    pip(python, "--no-deps", "-r", str(HERE / "weights.txt"))
    check_torch(python, device)
    (directory / ".installed").write_text(device + "\n")
    print(f"{directory} is ready after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
