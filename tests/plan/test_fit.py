"""`grpo-fast plan MODEL`: what fits, the configuration it recommends, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import transformers
import yaml
from plan_cases import QWEN3_8B, written

from grpo_fast.cli.main import main
from grpo_fast.cli.options import parse
from grpo_fast.plan.architecture import of_config
from grpo_fast.plan.devices import DEVICES, GIB, devices
from grpo_fast.plan.fit import candidates, changes, largest_context, recommended
from grpo_fast.plan.setup import Setup
from grpo_fast.plan.step import estimate
from grpo_fast.plan.yaml import as_yaml, options_of

LONG = "--prompt-tokens 1024 --completion-tokens 15360"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("qwen3") / "Qwen3-8B", QWEN3_8B)


@pytest.fixture(scope="module")
def said(folder, tmp_path_factory):
    """What the command prints and writes of Qwen3-8B at 16k tokens on one GPU of 80 GB."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("out")
    files = ["--yaml", str(out / "run.yaml"), "--chart", str(out / "plan.png")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["plan", folder, "--gpus", "1xH100-80", *LONG.split(), *files])
    return code, printed.getvalue(), out


def test_8b_at_16k_tokens_on_one_gpu(said):
    code, text, _ = said
    assert code == 0
    rows = {tuple(line.split()[:3]): line for line in text.splitlines() if line.strip()}
    for method in ("lora", "qlora"):
        assert "none fits" not in rows[method, "yes", "-"]
    assert "none fits" in rows["full", "yes", "2048"]
    assert "none of these terms was measured on a GPU" in text
    assert "allowances, not measured" in text and "qwen3, 8.19 B parameters" in text


def test_the_configuration_is_one_that_train_takes(said):
    _, text, out = said
    path = str(out / "run.yaml")
    script, values = parse(["--config", path])
    assert script.lora_r == 16 and script.dataset == "prompts.jsonl"
    assert values["gradient_checkpointing"] is True and values["max_completion_length"] == 15360
    assert values["model_init_kwargs"] == {"dtype": "bfloat16"}
    batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    assert batch == 8
    assert yaml.safe_load((out / "run.yaml").read_text())["lora_r"] == 16
    assert (out / "run.yaml").read_text() in text


def test_the_chart_is_a_picture(said):
    from matplotlib.image import imread

    picture = imread(said[2] / "plan.png")
    assert picture.shape[0] > 200 and picture[..., :3].std() > 0.05


def test_json_says_everything(folder, capsys):
    arguments = ["plan", folder, "--gpus", "A100-40", "--methods", "lora", "qlora", "--json"]
    assert main([*arguments, *LONG.split()]) == 0
    said = json.loads(capsys.readouterr().out)
    best = said["candidates"][said["recommended"]]
    assert best["fits"] and best["total_bytes"] <= said["usable_bytes"] < said["memory_bytes"]
    assert best["total_bytes"] == sum(best["phases_bytes"][best["peak_phase"]].values())
    assert said["formulas_verified"] is True and said["parameters"] == 8190735360
    assert "measured" in said["terms"]["weights"]


def test_nothing_fits_and_what_would_have_to_change(folder, capsys):
    arguments = ["plan", folder, "--gpus", "1x4090-24", "--methods", "full"]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "nothing fits. What would have to change:" in out
    assert "lora_r: 16 and quantization: nf4: " in out and ", fits" in out
    assert "8 devices with FSDP2" in out


def test_every_way_can_be_written_and_read(tmp_path):
    of = of_config(transformers.Qwen3Config(**QWEN3_8B), "Qwen/Qwen3-8B")
    base = Setup(prompt=64, completion=64)
    for change in (
        {"ranks": 8, "sharding": "fsdp2", "autocast": True},
        {"method": "qlora", "weights": "bf16", "optimizer": "paged_adamw_8bit"},
        {"method": "lora", "weights": "bf16", "checkpointing": True, "offload": True, "tile": 512},
        {"beta": 0.1, "sampled": 16, "workspace_bytes": 1 << 30, "optimizer": "sgd"},
    ):
        plan = estimate(of, replace(base, **change))
        path = tmp_path / "run.yaml"
        path.write_text(as_yaml(plan, "data.jsonl", "rule:math"))
        script, values = parse(["--config", str(path)])
        asked = options_of(plan)
        got = {**values, "model": script.model, "lora_r": script.lora_r}
        for name, value in asked.items():
            assert got[name] == value, name


def test_the_longest_context_fits_and_a_longer_one_does_not():
    of = of_config(transformers.Qwen3Config(**QWEN3_8B))
    room = devices("1x48GiB")
    setup = Setup(method="lora", weights="bf16", autocast=True, checkpointing=True, prompt=512)
    longest = largest_context(of, setup, room)
    for factor, fits in ((1.0, True), (1.05, False)):
        completion = int(longest * factor) - 512
        assert estimate(of, replace(setup, completion=completion)).fits(room) is fits


def test_the_largest_batch_divides_the_step():
    of = of_config(transformers.Qwen3Config(**QWEN3_8B))
    asked = Setup(prompt=1024, completion=15360, batch=12, accumulation=1, generations=4)
    found = candidates(of, asked, devices("H100-80"), ("full", "lora"))
    best = recommended(found)
    assert best.setup.method == "lora" and best.fits
    assert best.setup.batch * best.setup.accumulation == 12
    room = devices("H100-80")
    larger = next(b for b in (2, 3, 4, 6, 12) if b > best.setup.batch)
    more = replace(best.setup, batch=larger, accumulation=12 // larger)
    assert not estimate(of, more).fits(room)
    assert changes(of, found[0].setup, room)


def test_devices():
    assert devices("8xA100-80").count == 8 and devices("h100").name == "H100-80"
    own = devices("2x48GiB")
    assert own.memory_bytes == 48 * GIB and own.count == 2
    assert devices("1xh200-141").usable_bytes < devices("H200").memory_bytes
    assert {"H100-80", "A100-40", "A100-80", "4090-24", "L40S-48", "MI300X-192"} <= set(DEVICES)
    for name, (size, _) in DEVICES.items():
        # a card has a little less than its name says
        named = float(name.rsplit("-", 1)[1])
        assert 0.9 * named < size <= named


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--gpus 1xH100-8", "--gpus: expected COUNTxNAME"),
        ("--gpus 0xH100-80", "--gpus: expected at least one, got '0xH100-80'"),
        ("--prompt-tokens 0", "prompt: expected an integer >= 1, got 0"),
        ("--sequences 3", "--sequences: expected whole groups: a multiple of 8 over 1 GPUs"),
        ("--batch 3", "--batch: expected a divisor of --sequences 8, got 3"),
        ("--offload", "offload: expected False without checkpointing"),
        ("--measure", "--measure: expected a GPU, or --device cpu"),
    ],
)
def test_command_refuses(arguments, sentence, folder, capsys):
    if "measure" in arguments and __import__("torch").cuda.is_available():
        pytest.skip("there is one")
    assert main(["plan", folder, *arguments.split()]) == 2
    assert sentence in capsys.readouterr().err


def test_an_unknown_gpu_suggests_the_nearest(folder, capsys):
    assert main(["plan", folder, "--gpus", "2xA100-88"]) == 2
    assert "did you mean 'A100-80'?" in capsys.readouterr().err


def test_measure_prints_planned_beside_measured(folder, capsys, monkeypatch):
    from grpo_fast.cli import measure

    seen = []

    def fake(architecture, setup):
        seen.append(setup)
        return {"sampling": 1 << 30, "training": 3 << 30, "step": 3 << 30}

    monkeypatch.setattr(measure, "measure", fake)
    options = "--device cpu --methods lora --measure --batch 2 --checkpointing"
    assert main(["plan", folder, *options.split()]) == 0
    out = capsys.readouterr().out
    assert seen[0].method == "lora" and (seen[0].batch, seen[0].accumulation) == (2, 4)
    assert "planned / measured" in out and "3072" in out
