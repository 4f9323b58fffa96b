"""A real vLLM server on the CPU samples for the trainer: `make test-vllm` builds its Python."""

import logging
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tiny_trainer import count_w3, dataset, model, tokenizer, trainer

PYTHON = os.environ.get("GRPO_FAST_VLLM")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs vLLM (make test-vllm)")
GAP = "sampling/sampling_logp_difference/"
ENVIRONMENT = {
    # routes that load weights from a folder
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = "--dtype float32 --enforce-eager --logprobs-mode processed_logprobs --max-model-len 64"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server of the tiny model's shape, with other weights than any trainer here has."""
    folder = tmp_path_factory.mktemp("model")
    # whole heads of 32, which vLLM's attention on the CPU wants
    model(seed=9, head_dim=32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = Path(PYTHON).absolute()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **ENVIRONMENT, "PATH": path, "PYTHONPATH": ""}
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--port", str(port), *OPTIONS.split()], env=env, stdout=out, stderr=out
        )
        try:
            until = time.monotonic() + 300
            while "Application startup complete" not in log.read_text():
                assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def train(folder, url=None, steps=6, **more):
    server = {} if url is None else {"sampler": "vllm", "sampler_url": url}
    settings = {"train_dataset": dataset(8), "max_steps": steps, "learning_rate": 3e-3}
    settings |= {"steps_per_generation": 4, "gradient_accumulation_steps": 4}
    run = trainer(folder, model(head_dim=32), count_w3, **{**settings, **server, **more})
    run.train()
    return run


def logged(run, name):
    return [row[name] for row in run.state.log_history if name in row]


def test_log_probs_agree_after_every_push(url, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path, url)
    found = logged(run, GAP + "max")
    print("largest difference of each window, nats:", found)
    assert len(found) == 6 and max(found) < 1e-5
    assert "nats per token" not in caplog.text


def test_an_alarm_where_a_push_is_left_out(url, tmp_path, caplog, monkeypatch):
    from grpo_fast.rollout import VLLMSampler

    monkeypatch.setattr(VLLMSampler, "load", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path, url, steps=2)
    assert min(logged(run, GAP + "mean")) > 0.05 and "stale weights" in caplog.text


def test_the_curve_is_among_those_of_generate(url, tmp_path):
    """Rewards of 12 steps of three seeds in this process, and of one that vLLM samples."""
    curves = []
    for seed in (1, 2, 3):
        run = train(tmp_path / str(seed), steps=12, seed=seed, learning_rate=2e-2)
        curves.append(logged(run, "reward"))
    here = torch.tensor(curves)
    there = torch.tensor(logged(train(tmp_path / "v", url, 12, learning_rate=2e-2), "reward"))
    late, band = there[-4:].mean(), here[:, -4:].mean(1)
    print("mean reward of the last four steps:", band.tolist(), late.item())
    assert late > there[:2].mean() + 0.05
    spread = (band.max() - band.min()).clamp(min=0.1)
    assert band.min() - spread <= late <= band.max() + spread
