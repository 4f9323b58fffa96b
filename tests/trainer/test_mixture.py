"""Mixture shares of the worked examples, to the integer; replay of groups."""

import pytest
import tiny_trainer
import torch
from transformers import TrainerCallback

from grpo_fast import GRPOConfig, GRPOTrainer, PPOConfig
from grpo_fast.trainer.mixture import mixture, mixture_counts, mixture_shares


def test_example_of_two_iterations():
    """beta 0.1: all of D1 first, then 9 of D2 and 1 of D1."""
    assert mixture_counts([10], 10, 0.1, 0.9) == [10]
    assert mixture_counts([10, 10], 10, 0.1, 0.9) == [1, 9]


def test_example_of_four_iterations():
    """The printed sum has a mass of 1.2 (gamma 1) and 1.1439 (gamma 0.9); normalised it has 1."""
    assert mixture_shares(4, 0.1, 1.0) == pytest.approx([1 / 30, 1 / 30, 1 / 30, 0.9])
    shares = mixture_shares(4, 0.1, 0.9)
    assert [round(s, 4) for s in shares] == [0.0299, 0.0332, 0.0369, 0.9]
    assert sum(shares) == pytest.approx(1)
    assert mixture_counts([300] * 4, 300, 0.1, 1.0) == [10, 10, 10, 270]
    assert mixture_counts([1000] * 4, 1000, 0.1, 0.9) == [30, 33, 37, 900]


def test_what_an_iteration_lacks_is_taken_from_the_newest():
    assert mixture_counts([2, 50], 40, 0.5, 1.0) == [2, 38]
    assert mixture_counts([50, 3], 10, 0.1, 1.0) == [7, 3]
    assert mixture_counts([1, 1], 10, 0.1, 1.0) == [1, 1]
    drawn = mixture([list("abcdefghij"), list("0123456789")], 0.1, 0.9, "seed")
    assert len(drawn) == 10 and sum(d.isdigit() for d in drawn) == 9 == len(set(drawn)) - 1
    assert drawn == mixture([list("abcdefghij"), list("0123456789")], 0.1, 0.9, "seed")
    assert drawn != mixture([list("abcdefghij"), list("0123456789")], 0.1, 0.9, "other")


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.9), (-0.1, 0.9), (0.1, 0.0), (0.1, 1.1)])
def test_shares_out_of_range(beta, gamma):
    with pytest.raises(ValueError, match="history_(share|discount): expected a number in"):
        mixture_shares(2, beta, gamma)


class Seen(TrainerCallback):
    def __init__(self, stop=None):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.stop


def replayed(folder, callbacks=(), **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 6,
        "max_steps": 8,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "beta": 0.1,
        "replay_share": 0.5,
        "seed": 3,
    }
    return GRPOTrainer(
        tiny_trainer.model(),
        tiny_trainer.spread_reward,
        GRPOConfig(**{**settings, **changes}),
        tiny_trainer.dataset(8),
        processing_class=tiny_trainer.tokenizer(),
        callbacks=list(callbacks),
    )


def test_replayed_groups_train_with_their_own_log_probs(tmp_path):
    """The log-probs of a replayed group are those of the policy that sampled it, not of today's."""
    trainer = replayed(tmp_path)
    seen = []

    def spy(rollouts, advantages, evaluate=False):
        # window 2 on: what is kept here is what the policy said when it sampled
        seen.append([group.logp.clone() for group in trainer.replay.groups])
        return type(trainer).batch(trainer, rollouts, advantages, evaluate)

    trainer.batch = spy
    windows = []
    fill = trainer.window.fill
    trainer.window.fill = lambda micros: (windows.append(micros), fill(micros))
    trainer.train()
    assert len(windows) == 4 and trainer.args.off_policy_mask_threshold == 0.5
    assert [sum(len(m.packed.cu_seqlens) - 1 for m in w) for w in windows] == [16, 32, 32, 32]
    first = torch.cat([m.old_logp for m in windows[0]])
    for micro in windows[1]:
        older = micro.packed.cu_seqlens[8]
        theirs = micro.old_logp[older:]
        whole = [first[i : i + len(theirs)] for i in range(len(first) - len(theirs) + 1)]
        pieces = micro.packed.cu_seqlens[8::4].tolist()
        for a, b in zip(pieces[:-1], pieces[1:], strict=True):
            piece = micro.old_logp[a:b]
            whole = (first[i : i + len(piece)] for i in range(len(first) - len(piece) + 1))
            assert any(torch.equal(piece, candidate) for candidate in whole)
        now = trainer._logprobs(trainer.model, micro.packed)
        assert (now[older:] - theirs).abs().max() > 1e-3
        assert len(micro.ref_logp) == len(micro.packed.ids) == len(micro.old_logp)
    assert any("replay/share" in row for row in trainer.state.log_history)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_replay_survives_a_kill(tmp_path, step):
    whole = replayed(tmp_path / "whole")
    whole.train()
    replayed(tmp_path / "cut", [Seen(step)]).train()
    second = replayed(tmp_path / "cut")
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 8
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay_share": 1.0}, "replay_share: expected a number in"),
        ({"replay_share": 0.5, "replay_discount": 0.0}, "replay_discount: expected"),
        ({"replay_share": 0.5, "replay_size": 0}, "replay_size: expected an integer >= 1"),
    ],
)
def test_bad_options(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **changes)


def test_ppo_refuses_replay(tmp_path):
    with pytest.raises(ValueError, match="replay_share"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, replay_share=0.5)
