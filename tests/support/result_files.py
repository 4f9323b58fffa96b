"""Small result files of benchmarks/, as pytest-benchmark writes them."""

from __future__ import annotations

import json
from pathlib import Path

CASE = {"name": "small", "B": 2, "T": 8, "H": 4, "V": 100, "dtype": "float32", "active": 0.5}
MACHINE = {
    "device": "cpu",
    "device_name": "Abacus 2",
    "driver": None,
    "threads": 2,
    "versions": {"torch": "2.13.0", "triton": None},
    "gemm_flops": {"float32": 1e11},
    "copy_bytes_per_s": 1e10,
}


def entry(peer: str, median: float, **changes) -> dict:
    """A benchmark as pytest-benchmark writes it; `changes` are of extra_info."""
    info = {
        "level": "linear",
        "pass": "forward+backward",
        "case": CASE,
        "tokens": 16,
        "active_tokens": 8,
        "peer": peer,
        "version": "1.0",
        "what": f"{peer}.loss | compiled",
        "error": {"loss": 1e-7, "dhidden": 2.5e-7, "dweight": 3e-7},
        "exact": True,
        "peak_bytes": 4 << 20,
        "floor_flops": 5e9,
        "floor_bytes": 0.0,
    }
    stats = {"median": median, "iqr": median / 100, "min": median, "max": median, "rounds": 7}
    return {"name": f"test_linear[{peer}]", "extra_info": {**info, **changes}, "stats": stats}


def save(folder: Path, *entries: dict, skipped=(), name="cpu", **machine) -> Path:
    """Writes folder/name.json; `machine` changes machine_info."""
    data = {
        "benchmarks": entries,
        "machine_info": MACHINE | machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-11-21T06:54:39.1+00:00",
        "sources": "feedbeef",
        "skipped": list(skipped),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
