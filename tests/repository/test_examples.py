"""The configurations and scripts of docs/examples: parsed by what reads them, and run against
stand-ins for the programs of a cluster."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
CONFIGS = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
SCRIPTS = sorted((EXAMPLES / "slurm").glob("*.sbatch"))
# options of sbatch that the scripts use
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "output", "signal"}


def launched(path: Path) -> dict[str, str]:
    """The environment that `accelerate launch` would give to the processes."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    parser = launch.launch_command_parser()
    given = ["--config_file", str(path), "--module", "grpo_fast.cli", "train", "--max-steps", "3"]
    args, defaults, _ = launch._validate_launch_command(parser.parse_args(given))
    assert args.training_script == "grpo_fast.cli"
    assert args.training_script_args == ["train", "--max-steps", "3"]
    if args.use_deepspeed:
        # as `launch_command` fills it in
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def test_all_of_them_are_looked_at():
    assert [p.stem for p in CONFIGS] == ["ddp", "fsdp2", "hsdp", "zero3"]
    assert [p.stem for p in SCRIPTS] == ["train", "train_with_vllm"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_accelerate_takes_the_configuration(path, monkeypatch):
    environment = launched(path)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    sharded = environment.get("ACCELERATE_USE_FSDP") == "true"
    assert sharded == (path.stem in ("fsdp2", "hsdp"))
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == (path.stem == "zero3")
    if sharded:
        from accelerate import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        # what the trainer refuses
        assert plugin.cpu_ram_efficient_loading is False
        assert plugin.activation_checkpointing is True
        kind = "FULL" if path.stem == "fsdp2" else "SHARDED"
        assert str(plugin.state_dict_type).endswith(f"{kind}_STATE_DICT")
    if path.stem == "hsdp":
        from accelerate.parallelism_config import ParallelismConfig

        found = ParallelismConfig()
        assert (found.dp_replicate_size, found.dp_shard_size) == (2, 8)
        assert found.tp_size == found.cp_size == 1
    if path.stem == "zero3":
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_bash_and_sbatch_take_the_script(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    options = [re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line) for line in lines]
    assert all(options) and {o[1] for o in options} <= SBATCH


# each prints what it was called with into one file
STANDINS = {
    "scontrol": 'printf "node1\\nnode2\\nnode3\\n"',
    "accelerate": 'echo "accelerate rank=$SLURM_NODEID $*" >> "$CALLS"',
    "vllm": 'echo "vllm dev=$VLLM_SERVER_DEV_MODE $*" >> "$CALLS"; sleep "${SERVES:-30}"',
    "curl": 'echo "curl $*" >> "$CALLS"; exit "${ANSWERS:-0}"',
    # the command, once for each of the nodes it was given
    "srun": """
nodes="$SLURM_JOB_NUM_NODES"; list=
while [[ "$1" == --* ]]; do
    case "$1" in
        --nodes) nodes="$2"; shift 2 ;;
        --nodelist) list="$2"; shift 2 ;;
        *) shift ;;
    esac
done
echo "srun nodes=$nodes list=$list" >> "$CALLS"
for (( rank = 0; rank < nodes; rank++ )); do
    SLURM_NNODES="$nodes" SLURM_NODEID="$rank" "$@"
done
""",
}


def run(script: str, folder: Path, *options: str, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code, errors, and what the stand-ins were called with."""
    for name, body in STANDINS.items():
        file = folder / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    given = {"SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_NUM_NODES": "3", "CALLS": str(calls)}
    given |= {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_GPUS_PER_NODE": "4", **environment}
    command = ["bash", str(EXAMPLES / "slurm" / script), *options]
    done = subprocess.run(
        command, env={**os.environ, **given}, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    return done.returncode, done.stderr, calls.read_text().splitlines()


def test_every_node_trains(tmp_path):
    code, errors, calls = run("train.sbatch", tmp_path, "--model", "a b", "--max-steps", "3")
    assert code == 0, errors
    assert calls[0].startswith("srun nodes=3")
    for rank, call in enumerate(calls[1:]):
        assert call.startswith(f"accelerate rank={rank} launch --config_file docs/examples/")
        assert "--num_machines 3 --num_processes 12" in call
        assert f"--machine_rank {rank} --main_process_ip node1" in call
        assert call.endswith("--module grpo_fast.cli train --model a b --max-steps 3")
        (config,) = re.findall(r"--config_file (\S+)", call)
        assert (ROOT / config).is_file()
    assert len(calls) == 4


def test_the_last_node_serves_and_the_others_train(tmp_path):
    given = {"MODEL": "some/model", "VLLM_OPTIONS": "--server {url}", "SERVES": "5"}
    code, errors, calls = run("train_with_vllm.sbatch", tmp_path, "--model", "some/model", **given)
    assert code == 0, errors
    assert "srun nodes=1 list=node3" in calls and "srun nodes=2 list=node1,node2" in calls
    (serving,) = (c for c in calls if c.startswith("vllm"))
    assert serving.startswith("vllm dev=1 serve some/model --port 8000")
    training = [c for c in calls if c.startswith("accelerate")]
    assert len(training) == 2
    for call in training:
        assert "--num_machines 2 --num_processes 8" in call
        assert call.endswith("train --server http://node3:8000 --model some/model")


def test_a_server_that_dies_is_not_waited_for(tmp_path):
    given = {"MODEL": "m", "SERVES": "0", "ANSWERS": "7"}
    code, errors, calls = run("train_with_vllm.sbatch", tmp_path, **given)
    assert code == 1 and "vLLM ended before it served" in errors
    assert not [c for c in calls if c.startswith("accelerate")]


def test_one_node_cannot_serve_and_train(tmp_path):
    code, errors, _ = run("train_with_vllm.sbatch", tmp_path)
    assert code == 1 and "the model that vLLM serves" in errors
