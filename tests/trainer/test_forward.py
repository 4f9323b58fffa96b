"""Which tokens a forward of the trainer computes: shared prompts, and completions left out."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import Recording, dataset, model, relative, spread_reward, trainer
from tiny_trainer import config as configured

from grpo_fast import GRPOTrainer
from grpo_fast.models.packing import pack
from grpo_fast.rollout import Rollouts
from grpo_fast.trainer.active import active_part, count_of
from grpo_fast.trainer.window import MicroBatch


class Counting(Recording):
    """Counts the tokens of every forward that has no cache."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens = []
        self.model.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        if not kwargs.get("use_cache"):
            self.tokens.append(kwargs["input_ids"].numel())


def half_flat(completions, prompts, **_):
    """The same for all completions of every prompt that begins with an even word."""
    spread = spread_reward(completions)
    even = [int(p.split()[0][1:]) % 2 == 0 for p in prompts]
    return [1.0 if flat else s for flat, s in zip(even, spread, strict=True)]


def run(folder, **options):
    settings = {
        "cls": Counting,
        "reward": spread_reward,
        "per_device_train_batch_size": 16,
        "generation_batch_size": 16,
        "max_steps": 1,
        "shuffle_dataset": False,
        "max_grad_norm": 0.0,
    }
    made = trainer(folder, **{**settings, **options})
    made.train()
    return made


def whole(rollouts, rows=None):
    rows = range(len(rollouts.prompt_ids)) if rows is None else rows
    return sum(len(rollouts.prompt_ids[i]) + len(rollouts.completion_ids[i]) - 1 for i in rows)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "beta": 0.1, "max_steps": 2}])
def test_a_step_with_shared_prompts_is_the_step_without(tmp_path, options):
    """The old, the reference and the training pass all use the shared rows."""
    shared, apart = (
        run(tmp_path / str(share), share_prompts=share, **options) for share in (True, False)
    )
    (rollouts, _, _), *_ = shared.windows
    once = sum(len(p) for p in {tuple(p) for p in rollouts.prompt_ids})
    fed = once + sum(len(c) - 1 for c in rollouts.completion_ids)
    # the reference is a model of its own
    passes = 3 if options else 1
    assert shared.tokens[-passes:] == [fed] * passes
    assert apart.tokens[-passes:] == [whole(rollouts)] * passes
    for step, (one, other) in enumerate(zip(shared.steps, apart.steps, strict=True)):
        # from the second step on with other weights
        assert relative(one["gradients"], other["gradients"]) < (1e-5 if step else 1e-6)
        assert one["losses"] == pytest.approx(other["losses"], abs=1e-6)
    log = shared.state.log_history[0]
    assert log["forward_share"] == pytest.approx(fed / whole(rollouts))
    assert apart.state.log_history[0]["forward_share"] == 1


def test_flat_groups_leave_the_backbone(tmp_path):
    """Half of the groups flat: the tokens halve, loss and gradients stay what they were."""
    options = {"reward": half_flat, "share_prompts": False}
    less = run(tmp_path / "less", **options)
    all_of_it = run(tmp_path / "all", skip_inactive_completions=False, **options)
    rollouts, advantages, _ = less.windows[0]
    assert (advantages == 0).sum() == 8
    active = [i for i in range(16) if advantages[i] != 0]
    assert less.tokens[-1] == whole(rollouts, active) < whole(rollouts) == all_of_it.tokens[-1]
    (one,), (other,) = less.steps, all_of_it.steps
    assert one["losses"] == other["losses"]
    assert relative(one["gradients"], other["gradients"]) < 1e-6
    # means of the others, and the same share of a gradient counted over those
    (few, *_), (many, *_) = less.state.log_history, all_of_it.state.log_history
    assert few["active_rows"] == 1 > many["active_rows"]
    assert few["entropy"] != many["entropy"]
    assert few["forward_share"] < many["forward_share"] == 1


LOSSES = ["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo", "sapo", "vespo", "luspo"]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_denominator_still_counts_what_was_left_out(tmp_path, loss_type):
    options = {
        "reward": half_flat,
        "loss_type": loss_type,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "epsilon_high": 0.28,
    }
    less = run(tmp_path / "less", **options)
    all_of_it = run(tmp_path / "all", skip_inactive_completions=False, **options)
    assert sum(less.tokens[-2:]) < sum(all_of_it.tokens[-2:])
    assert relative(less.steps[0]["gradients"], all_of_it.steps[0]["gradients"]) < 1e-6
    assert less.steps[0]["losses"] == pytest.approx(all_of_it.steps[0]["losses"], abs=1e-6)


def test_a_window_without_any_gradient_runs_one_token(tmp_path):
    flat = run(tmp_path, reward=lambda completions, **_: [1.0] * len(completions))
    assert flat.tokens[-1] == 1
    assert all((g == 0).all() for g in flat.steps[0]["gradients"].values())
    assert flat.state.log_history[0]["loss"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"entropy_coef": 0.01},
        {"top_entropy_quantile": 0.5},
        {"target_kl": 0.1, "num_iterations": 2},
        {"skip_inactive_completions": False},
    ],
)
def test_nothing_is_left_out_where_it_is_needed(tmp_path, options):
    assert not trainer(tmp_path, **options).skips_inactive


def test_nothing_is_left_out_of_a_loss_that_a_subclass_wrote(tmp_path):
    class Own(GRPOTrainer):
        def policy_loss(self, hidden, head, micro):
            return super().policy_loss(hidden, head, micro)

    assert trainer(tmp_path / "ours").skips_inactive
    assert not trainer(tmp_path / "own", cls=Own).skips_inactive


def rollouts(**changes):
    given = {
        "prompt_ids": [[1], [1], [2], [2]],
        "completion_ids": [[3, 4], [5], [6, 7, 8], []],
        "truncated": [False, True, False, False],
        "logp": [[-1.0, -2.0], [-3.0], [-4.0, -5.0, -6.0], []],
    }
    return Rollouts(**{**given, **changes})


def test_what_stays_is_what_has_a_gradient():
    kept, advantages = active_part(rollouts(), torch.tensor([0.0, 1.0, -1.0, 2.0]), False)
    assert kept.completion_ids == [[5], [6, 7, 8]] and kept.logp == [[-3.0], [-4.0, -5.0, -6.0]]
    assert advantages.tolist() == [1, -1]
    # cut off, and masked by hand
    kept, _ = active_part(rollouts(), torch.ones(4), True)
    assert kept.completion_ids == [[3, 4], [6, 7, 8]]
    mask = [[False, False], [True], [False, True, False], []]
    kept, _ = active_part(rollouts(mask=mask), torch.ones(4), False)
    assert kept.completion_ids == [[5], [6, 7, 8]] and kept.mask == mask[1:3]
    # what could not be judged shows
    kept, advantages = active_part(rollouts(), torch.tensor([float("nan"), 0, 0, 0]), False)
    assert kept.completion_ids == [[3, 4]] and advantages.isnan().all()
    kept, advantages = active_part(rollouts(), torch.zeros(4), False)
    assert kept.completion_ids == [[]] and kept.logp == [[]] and advantages.tolist() == [0]


def test_counts_are_those_of_all_completions(tmp_path):
    config = trainer(tmp_path).loss_config
    assert count_of(rollouts(), config, False) == 6
    assert count_of(rollouts(), config, True) == 5


def resumed_options(folder):
    return {
        "reward": half_flat,
        "train_dataset": dataset(8),
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "share_prompts": True,
        "max_steps": 6,
        "cls": Counting,
    }


def test_resume_in_the_middle_of_a_window_is_bit_identical(tmp_path):
    whole_run = trainer(
        tmp_path / "a", save_strategy="steps", save_steps=1, **resumed_options(tmp_path)
    )
    whole_run.train()
    assert any(micro.packed.layout.links for micro in whole_run.window.micro_batches)
    for step in (1, 2, 3, 5):
        again = trainer(tmp_path / str(step), policy=model(seed=9), **resumed_options(tmp_path))
        again.train(str(tmp_path / "a" / f"checkpoint-{step}"))
        pairs = zip(again.model.parameters(), whole_run.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), step
        assert again.tokens[-1] == whole_run.tokens[-1]


def test_a_window_saved_before_there_were_segments_is_read():
    packed = pack([[3, 4]], [[5, 6]], pad_id=0, row_length=16, device="cpu")
    state = MicroBatch(packed, torch.ones(1)).state_dict()
    for name in ("segments", "count"):
        del state[name]
    assert MicroBatch.from_state_dict(state).packed.layout is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_prompts": "yes"}, "share_prompts: expected 'auto', True or False, got 'yes'"),
        ({"skip_inactive_completions": 1}, "skip_inactive_completions: expected True or False"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        configured(tmp_path, **options)


def test_the_words_of_a_command_line(tmp_path):
    given = {"auto": "auto", "true": True, "False": False, True: True, False: False}
    for word, value in given.items():
        assert configured(tmp_path, share_prompts=word).share_prompts is value


def test_a_model_that_cannot_share_is_refused_before_training(tmp_path, monkeypatch):
    said = []
    told = "grpo_fast.trainer.grpo.logger.warning"
    monkeypatch.setattr(told, lambda text, *given: said.append(text % given))
    with pytest.raises(ValueError, match="share_prompts: expected False .*dropout in attention"):
        trainer(tmp_path, policy=model(attention_dropout=0.1), share_prompts=True)
    assert not trainer(tmp_path, policy=model(attention_dropout=0.1)).packer.segments
    (text,) = said
    assert text.startswith("Prompts are computed once per completion: dropout in attention")
