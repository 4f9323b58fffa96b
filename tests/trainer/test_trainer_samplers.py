"""The trainer and its samplers: weights of every step, how near the log-probs are, a user's
function, parts of a window, and a server that dies."""

import logging

import pytest
import torch
from engine_double import Engine, Served
from tiny_trainer import config, dataset, model, spread_reward, tokenizer, trainer

from grpo_fast import GRPOTrainer
from grpo_fast.rollout import SamplerFailed
from grpo_fast.trainer.samplers import together

SETTINGS = {"reward": spread_reward, "train_dataset": dataset(8), "max_completion_length": 6}
QUICK = {"patience": 1.5, "timeout": 20.0}
GAP = "sampling/sampling_logp_difference/"


def gaps(run, which="max"):
    return [row[GAP + which] for row in run.state.log_history if GAP + which in row]


@pytest.mark.parametrize("engine_name", ["vllm", "sglang"])
def test_a_server_samples_with_the_weights_of_each_step(engine_name, tmp_path):
    engine = Engine(model(seed=9))
    with Served(engine) as url:
        server = {"sampler": engine_name, "sampler_url": url, "sampler_kwargs": QUICK}
        run = trainer(tmp_path, **SETTINGS, **server, max_steps=3)
        run.train()
    assert len(gaps(run)) == 3 and max(gaps(run)) < 1e-5
    loads = [r for r in engine.calls if r in ("/collective_rpc", "/update_weights_from_disk")]
    assert len(loads) == 3


def test_an_alarm_for_weights_that_never_arrived(tmp_path, caplog):
    engine = Engine(model(seed=9))
    engine.deaf = True
    with Served(engine) as url, caplog.at_level(logging.WARNING):
        server = {"sampler": "vllm", "sampler_url": url, "sampler_kwargs": QUICK}
        run = trainer(tmp_path, **SETTINGS, **server)
        run.train()
    assert min(gaps(run, "mean")) > 0.05
    assert "nats per token from the trainer's" in caplog.text and "stale weights" in caplog.text


def test_continuous_batching_trains_like_generate(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, **SETTINGS, sampler="continuous", max_steps=3)
        run.train()
    assert len(gaps(run)) == 3 and max(gaps(run)) < 1e-5
    assert "nats per token" not in caplog.text


def test_a_resumed_run_samples_the_same_from_continuous_batching(tmp_path):
    more = {**SETTINGS, "sampler": "continuous", "save_strategy": "steps", "save_steps": 1}
    whole = trainer(tmp_path / "a", **more, max_steps=3)
    whole.train()
    again = trainer(tmp_path / "a", **more, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("on_policy", [True, False])
def test_log_probs_that_agree_can_be_the_old_ones(on_policy, tmp_path, monkeypatch):
    """No forward for old log-probs then, but for the one micro-batch that is compared."""
    more = {**SETTINGS, "sampler": "continuous", "max_steps": 2, "steps_per_generation": 2}
    more |= {"num_iterations": 1 if on_policy else 2, "gradient_accumulation_steps": 2}
    seen = []
    plain = GRPOTrainer._logprobs

    def counted(self, *args):
        seen.append(1)
        return plain(self, *args)

    monkeypatch.setattr(GRPOTrainer, "_logprobs", counted)
    run = trainer(tmp_path, **more, old_logp_source="sampler")
    run.train()
    windows = 2 if on_policy else 1
    assert len(seen) == windows
    for micro in run.window.micro_batches:
        assert micro.rollout_logp is None and micro.old_logp.isfinite().all()


def test_log_probs_that_do_not_agree_are_corrected_instead(tmp_path):
    engine = Engine(model(seed=9))
    engine.deaf = True
    more = {**SETTINGS, "num_iterations": 2, "old_logp_source": "sampler", "max_steps": 1}
    with Served(engine) as url:
        server = {"sampler": "vllm", "sampler_url": url, "sampler_kwargs": QUICK}
        run = trainer(tmp_path, **more, **server)
        run.train()
    for micro in run.window.micro_batches:
        assert micro.rollout_logp is not None and micro.old_logp is not None
        assert (micro.rollout_logp - micro.old_logp).abs().mean() > 0.05


def test_a_window_is_sampled_in_parts(tmp_path, monkeypatch):
    asked = []
    run = trainer(tmp_path, **SETTINGS, steps_per_generation=3, sampling_batch_size=4, max_steps=1)
    plain = run.sampler.sample
    monkeypatch.setattr(
        run.sampler, "sample", lambda p, g: asked.append((len(p), g)) or plain(p, g)
    )
    run.train()
    assert asked == [(1, 4)] * 3 and len(run.window.micro_batches) == 3


def calculator(prompts, run):
    """Two turns: the policy writes, an environment answers w5, the policy goes on."""
    ids = [run.encode(prompt) for prompt in prompts]
    first = run.sampler.sample(ids, 1)
    answered = [p + c + [8] for p, c in zip(ids, first.completion_ids, strict=True)]
    second = run.sampler.sample(answered, 1)
    turns = list(zip(first.completion_ids, second.completion_ids, strict=True))
    return {
        "prompt_ids": ids,
        "completion_ids": [a + [8] + b for a, b in turns],
        "logprobs": None,
        "env_mask": [[1] * len(a) + [0] + [1] * len(b) for a, b in turns],
        "turns": [2] * len(prompts),
    }


def test_a_function_samples_several_turns(tmp_path):
    seen = []

    def reward(completions, turns, **_):
        seen.extend(turns)
        return spread_reward(completions=completions)

    run = GRPOTrainer(
        model=model(),
        reward_funcs=reward,
        args=config(tmp_path, max_completion_length=4, max_steps=2),
        train_dataset=dataset(8),
        processing_class=tokenizer(),
        rollout_func=calculator,
    )
    run.train()
    assert seen and set(seen) == {2}
    micro = run.window.micro_batches[0]
    assert (micro.packed.ids[~micro.mask] == 8).all() and (~micro.mask).sum() == 4
    # lengths are of what the policy wrote
    lengths = [
        int(part.sum()) for part in micro.mask.split(micro.packed.cu_seqlens.diff().tolist())
    ]
    assert run.state.log_history[1]["completions/mean_length"] == pytest.approx(
        sum(lengths) / len(lengths)
    )


@pytest.mark.parametrize(
    "function, sentence",
    [
        (lambda p, t: [], "rollout_func: expected a dict"),
        (lambda p, t: {"prompt_ids": []}, "none of \\['completion_ids', 'logprobs'\\]"),
        (
            lambda p, t: {"prompt_ids": [[3]], "completion_ids": [[4]], "logprobs": None},
            "rollout_func: expected 4 completions",
        ),
    ],
)
def test_a_function_that_answers_something_else(function, sentence, tmp_path):
    run = trainer(tmp_path, **SETTINGS)
    run.rollout_func = function
    with pytest.raises(ValueError, match=sentence):
        run.train()


def test_a_server_that_dies_ends_the_run_with_a_checkpoint(tmp_path):
    engine = Engine(model())
    server = {"sampler": "vllm", "sampler_kwargs": QUICK, "save_strategy": "no"}
    with Served(engine) as url:
        whole = trainer(tmp_path / "whole", **SETTINGS, **server, sampler_url=url, max_steps=4)
        whole.train()
        run = trainer(tmp_path / "cut", **SETTINGS, **server, sampler_url=url, max_steps=4)
        sync = run.sampler.sync

        def dies(policy):
            sync(policy)
            if run.state.global_step == 2:
                engine.broken = [500] * 50

        run.sampler.sync = dies
        with pytest.raises(SamplerFailed, match="Step 2 is saved: resume from .*checkpoint-2"):
            run.train()
        engine.broken = []
        again = trainer(tmp_path / "cut", **SETTINGS, **server, sampler_url=url, max_steps=4)
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    # this double samples by the seeds it is given, which a checkpoint brings back
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_where_one_rank_fails_all_do(monkeypatch):
    class Ranks:
        num_processes, process_index = 2, 0

    other = [(1, "OSError: no server")]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: mine + other)
    with pytest.raises(SamplerFailed, match="rank 1 could not sample: OSError: no server"):
        together(Ranks(), lambda: 1)
    with pytest.raises(KeyError):
        together(Ranks(), lambda: {}["x"])


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"sampler": "vlm"}, "sampler: expected one of hf, continuous, vllm, sglang"),
        ({"sampler": "vllm"}, "sampler_url: expected the address of the vllm server"),
        ({"sampler_url": "http://x"}, "sampler_url: expected None with sampler='hf'"),
        ({"sampler_kwargs": {"timeout": 3}}, "sampler_kwargs: expected None with sampler='hf'"),
        ({"sampler_weights_dir": "x"}, "sampler_weights_dir: expected None"),
        ({"old_logp_source": "both"}, "old_logp_source: expected 'trainer' or 'sampler'"),
        ({"sampling_batch_size": 0}, "sampling_batch_size: expected an integer >= 1"),
        ({"sampler_tolerance": 0}, "sampler_tolerance: expected nats per token > 0"),
        (
            {"sampler": "continuous", "sampling_batch_size": 4},
            "sampling_batch_size: expected None with sampler='continuous'",
        ),
        (
            {"sampler": "vllm", "sampler_url": "http://x", "sampler_kwargs": {"retries": 3}},
            "sampler_kwargs: expected none but timeout, patience, concurrency",
        ),
    ],
)
def test_wrong_options_are_named(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, **SETTINGS, **options)
