"""Peak memory of a packed forward and backward over its tokens, on a CPU: masks against segments.

`python -m benchmarks.measure.packed_memory` runs each point in a process of its own, on a tiny
random Llama, and writes `benchmarks/results/packing/packed-memory.json` and the plot in
`docs/images/`.

A group is a prompt of T / 2 tokens with four completions of T / 8: T tokens where the prompt is
shared. What is measured is the peak resident memory above that of the same process before.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
# largest T: a repeated prompt makes 2.5 T tokens, and their masks more than a machine has
LARGEST = {"segments": 32768, "whole": 4096, "mask": 1024}
LAYOUTS = {
    "segments": "segments, prompt shared",
    "whole": "segments, prompt repeated",
    "mask": "one row of transformers, with its mask",
}
_ROOT = Path(__file__).resolve().parents[2]
RESULT = _ROOT / "benchmarks" / "results" / "packing" / "packed-memory.json"
PICTURE = _ROOT / "docs" / "images" / "packed-memory.png"


def measure(layout: str, tokens: int) -> dict[str, float]:
    """MiB above the start, and the tokens of the row."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from grpo_fast.models.packing import pack
    from grpo_fast.models.policy import attach
    from grpo_fast.models.shared_prompts import pack_segments

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=65536,
    )
    policy = LlamaForCausalLM(config)
    attach(policy)
    prompt = [i % 128 for i in range(tokens // 2)]
    completions = [[(i * g) % 128 for i in range(tokens // 8 + 1)] for g in range(4)]
    given = {"pad_id": 0, "device": "cpu"}
    if layout == "mask":
        batch = pack([prompt] * 4, completions, row_length=None, **given)
    else:
        batch = pack_segments([prompt] * 4, completions, share=layout == "segments", **given)
    # kernels and their workspaces are not what grows
    small = pack_segments([[1, 2]], [[3, 4]], share=False, **given)
    for one in (small, batch):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        states = policy(**one.inputs(), head_fn=lambda h, head, one=one: one.select(h))
        states.square().mean().backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"tokens": batch.input_ids.numel(), "mib": (after - before) / 1024}


def points() -> list[dict]:
    """Every layout and size, each in a process of its own; those of the result's file are kept."""
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    done = {(point["layout"], point["asked"]) for point in found}
    for layout in LAYOUTS:
        for tokens in TOKENS:
            if tokens > LARGEST[layout] or (layout, tokens) in done:
                continue
            module = "benchmarks.measure.packed_memory"
            command = [sys.executable, "-m", module, layout, str(tokens)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=_ROOT)
            point = json.loads(printed.stdout.splitlines()[-1])
            found.append({"layout": layout, "asked": tokens, **point})
            print(found[-1], file=sys.stderr)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
    return found


def draw(found: list[dict]) -> None:
    """The plot, on logarithmic axes: a slope of 1 is linear."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for layout, label in LAYOUTS.items():
        rows = [p for p in found if p["layout"] == layout]
        axes.plot([p["tokens"] for p in rows], [p["mib"] for p in rows], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the row", ylabel="MiB at the peak")
    axes.set_title("forward + backward, tiny Llama of 4 layers, CPU")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(PICTURE, dpi=120)


def main(arguments: list[str]) -> None:
    """One point where a layout and a size are given, else all of them and the plot."""
    if arguments:
        print(json.dumps(measure(arguments[0], int(arguments[1]))))
        return
    draw(points())


if __name__ == "__main__":
    main(sys.argv[1:])
