"""What a new method plugs into: tensors per token, parts of the state, stages, without touching the
loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny_trainer import dataset, model, spread_reward, trainer
from torch import Tensor

from grpo_fast import GRPOTrainer
from grpo_fast.trainer import MicroBatch

STEPS = 4
# a window serves two steps, so the checkpoints of steps 1 and 3 lie within one
SETTINGS = {
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "steps_per_generation": 2,
    "beta": 0.04,
    "max_steps": STEPS,
    "reward": spread_reward,
    "train_dataset": dataset(6),
}


@dataclass
class Judged(MicroBatch):
    surprise: Tensor | None = None  # (N,)


class Controller:
    """A coefficient that moves with every window, as one of the KL does."""

    def __init__(self) -> None:
        self.coefficient = 1.0

    def state_dict(self) -> dict:
        return {"coefficient": self.coefficient, "trace": torch.tensor([self.coefficient])}

    def load_state_dict(self, state: dict) -> None:
        self.coefficient = state["coefficient"]
        assert torch.equal(state["trace"], torch.tensor([self.coefficient]))


class Critical(GRPOTrainer):
    micro_batch = Judged

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.controller = self.stateful["controller"] = Controller()

    def batch(self, rollouts, advantages, evaluate=False):
        batches = super().batch(rollouts, advantages, evaluate)
        return [replace(m, surprise=-self._logprobs(self.model, m.packed)) for m in batches]

    def prepare(self, micro_batches, evaluate=False):
        together = torch.cat([micro.surprise for micro in micro_batches])
        mean, std = together.mean(), together.std()
        self.controller.coefficient *= 1.5
        return [replace(m, values=(m.surprise - mean) / std) for m in micro_batches]

    def loss(self, model, micro):
        tokens = micro.advantages.repeat_interleave(micro.packed.cu_seqlens.diff())
        critic = self.controller.coefficient * micro.values
        return super().loss(model, replace(micro, advantages=tokens - critic))


def weights(run):
    return [p.detach().clone() for p in run.model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, cls=Critical, save_strategy="steps", save_steps=1, **SETTINGS)
    run.train()
    return run


def resumed(finished, step, folder, **overrides):
    run = trainer(folder, **{"policy": model(seed=9), "cls": Critical, **SETTINGS, **overrides})
    torch.manual_seed(77)
    run.train(str(Path(finished.args.output_dir) / f"checkpoint-{step}"))
    return run


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_subclass_brings_tensors_and_state_and_resumes_bit_identically(finished, step, tmp_path):
    run = resumed(finished, step, tmp_path)
    assert run.state.global_step == STEPS and same(run, finished)
    assert run.controller.coefficient == finished.controller.coefficient == 1.5**2
    micro = run.window.micro_batches[0]
    assert isinstance(micro, Judged) and micro.values.shape == micro.packed.ids.shape


def test_the_runs_differ_without_the_state_of_the_part(finished, tmp_path, monkeypatch):
    """The test above would be empty if neither the tensors nor the coefficient mattered."""
    plain = trainer(tmp_path / "plain", **SETTINGS)
    plain.train()
    assert not same(plain, finished)
    monkeypatch.setattr(Controller, "load_state_dict", lambda self, state: None)
    assert not same(resumed(finished, 1, tmp_path / "forgetful"), finished)


def test_a_checkpoint_of_more_than_the_trainer_has_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*got \['controller'\]"):
        resumed(finished, 1, tmp_path, cls=GRPOTrainer)

    class Other(Critical):
        micro_batch = MicroBatch

    with pytest.raises(ValueError, match=r"micro-batches of MicroBatch, got \['surprise'\]"):
        resumed(finished, 1, tmp_path, cls=Other)


def test_a_part_that_a_checkpoint_lacks_starts_anew_and_is_named(tmp_path, caplog):
    class Late(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.controller = self.stateful["controller"] = Controller()

    run = trainer(tmp_path / "whole", save_strategy="steps", save_steps=1, **SETTINGS)
    run.train()
    with caplog.at_level("WARNING", logger="grpo_fast.trainer.checkpoint"):
        later = resumed(run, 1, tmp_path / "later", cls=Late)
    assert "has no controller, which starts anew" in caplog.text and same(later, run)


def test_a_shared_part_is_written_once_and_read_by_all(tmp_path):
    class Head(torch.nn.Linear):
        shared = True

    class Headed(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.head = self.stateful["critic"] = Head(3, 1)

    settings = {**SETTINGS, "cls": Headed, "max_steps": 1}
    run = trainer(tmp_path / "whole", save_strategy="steps", save_steps=1, **settings)
    run.train()
    folder = Path(run.args.output_dir) / "checkpoint-1"
    assert (folder / "grpo_fast_critic.safetensors").is_file()
    torch.manual_seed(5)
    again = resumed(run, 1, tmp_path / "again", **settings)
    assert torch.equal(again.head.weight, run.head.weight)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*got \['critic'\]"):
        resumed(run, 1, tmp_path / "headless", **{**settings, "cls": GRPOTrainer})


def test_a_micro_batch_moves_and_keeps_its_values(finished):
    micro = finished.window.micro_batches[0]
    again = Judged.from_state_dict(micro.state_dict()).to("meta")
    assert type(again) is Judged and again.surprise.is_meta and again.packed.ids.is_meta
    assert again.packed.ids.shape == micro.packed.ids.shape and again.mask is None
    assert "denominator" not in micro.state_dict()


def test_trainer_counts_the_tokens_of_a_micro_batch(tmp_path):
    run = trainer(tmp_path, max_steps=1, include_num_input_tokens_seen="all")
    run.train()
    packed = run.window.micro_batches[0].packed
    assert run.state.num_input_tokens_seen == packed.input_ids.numel()
    size = run.model.num_parameters(exclude_embeddings=True)
    assert run.state.total_flos == 6 * packed.input_ids.numel() * size
