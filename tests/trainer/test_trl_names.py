"""Names of TRL's trainer: honoured, or refused in one sentence that says what to use instead."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from tiny_trainer import count_w3, dataset, model, spread_reward, tokenizer, trainer

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.trainer.trl_names import HOOKS
from grpo_fast.trainer.trl_options import REFUSED, REFUSED_ARGUMENTS

# a value that asks for something, where another kind than a string is needed
ASKING = {
    "ds3_gather_for_generation": False,
    "vllm_importance_sampling_correction": False,
    "vllm_server_port": 9000,
    "vllm_server_timeout": 3.0,
    "vllm_group_port": 1,
    "vllm_gpu_memory_utilization": 0.9,
    "vllm_tensor_parallel_size": 2,
}


def config(tmp_path, **options):
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options)


@pytest.mark.parametrize("name", [n for n in REFUSED if n != "log_multimodal"])
def test_a_field_that_cannot_be_honoured_is_refused_and_its_default_is_not(tmp_path, name):
    (default, *_), instead = REFUSED[name]
    for silent in (default, None):
        config(tmp_path, **{name: silent})
    asking = ASKING.get(name, not default if isinstance(default, bool) else "something")
    with pytest.raises(ValueError, match=f"^{name}: expected ") as caught:
        config(tmp_path, **{name: asking})
    assert instead in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_an_argument_that_cannot_be_honoured(tmp_path, name):
    args = config(tmp_path, max_completion_length=8)
    parts = (model(), count_w3, args, dataset(), None, tokenizer())
    GRPOTrainer(*parts, **{name: None})
    with pytest.raises(ValueError, match=f"^{name}: expected None, got list; "):
        GRPOTrainer(*parts, **{name: [count_w3]})


def test_arguments_in_the_order_of_trl(tmp_path):
    args = config(tmp_path, max_completion_length=8)
    given = (model(), count_w3, args, dataset(), None, tokenizer(), None, None, (None, None))
    run = GRPOTrainer(*given, None, None, None, None, None)
    assert run.rollout_func is None


@pytest.mark.parametrize("name", HOOKS)
def test_a_subclass_hears_what_to_replace(name):
    with pytest.raises(ValueError, match=f"^{name}: expected no such method in Mine") as caught:
        type("Mine", (GRPOTrainer,), {name: lambda self: None})
    assert f"replace {HOOKS[name]}" in str(caught.value)


def test_a_mixin_hears_it_too():
    class Mixin:
        def _compute_loss(self, model, inputs):
            raise AssertionError

    with pytest.raises(ValueError, match="_compute_loss"):
        type("Mine", (Mixin, GRPOTrainer), {})


def test_attributes_of_trl(tmp_path):
    run = trainer(tmp_path, reward=spread_reward, beta=0.1, epsilon=0.3, entropy_coef=0.01)
    assert run.ref_model is run.reference.model
    assert (run.beta, run.epsilon_low, run.epsilon_high) == (0.1, 0.3, 0.3)
    assert run.num_generations == run.args.num_generations
    assert run.reward_func_names == ["spread_reward"]
    assert run.reward_funcs == [spread_reward]
    assert run.entropy_coef == 0.01
    assert run.tools == []
    for name in ("beta", "temperature", "ref_model", "entropy_coef", "_logs"):
        with pytest.raises(ValueError, match=f"^{name}: expected to be set through "):
            setattr(run, name, 1)


def test_logs_hold_what_was_sampled(tmp_path):
    run = trainer(
        tmp_path, reward=spread_reward, max_steps=1, log_completions=True, logging_steps=5
    )
    seen = {}
    run.completions.flush = lambda *args: seen.update(run._logs)
    run.train()
    assert len(seen["prompt"]) == len(seen["completion"]) == len(seen["advantages"]) == 4
    assert list(seen["rewards"]) == ["spread_reward"]


@pytest.mark.parametrize("name, value", [("temperature", 0.5), ("beta", 0.1), ("top_k", 3)])
def test_an_option_changed_after_construction_is_no_silent_half(tmp_path, name, value):
    run = trainer(tmp_path, reward=count_w3, max_steps=1)
    setattr(run.args, name, value)
    with pytest.raises(ValueError, match=f"^{name}: expected .* with which the trainer was built"):
        run.train()


def test_trainers_own_arguments_may_change(tmp_path):
    run = trainer(tmp_path, reward=count_w3, max_steps=5)
    run.args.max_steps = 1
    run.train()
    assert run.state.global_step == 1


@pytest.mark.parametrize("value", (0, -1, 1.5, "eight", True))
def test_pad_to_multiple_of_is_a_count(tmp_path, value):
    with pytest.raises(ValueError, match="^pad_to_multiple_of: expected"):
        config(tmp_path, pad_to_multiple_of=value)


def test_padding_changes_no_number(tmp_path):
    runs = []
    for multiple in ("auto", 32):
        run = trainer(
            tmp_path / str(multiple),
            reward=spread_reward,
            pad_to_multiple_of=multiple,
            # rows of segments hold no padding
        )
        run.packer = replace(run.packer, segments=False)
        widths = []
        loss = run.loss

        def seen(policy, micro, loss=loss, widths=widths):
            widths.append(micro.packed.input_ids.shape[1])
            return loss(policy, micro)

        run.loss = seen
        run.train()
        runs.append((run.state.log_history[0]["loss"], widths))
    assert all(width % 32 == 0 for width in runs[1][1])
    assert any(width % 32 for width in runs[0][1])
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-6)


def test_vespo_takes_the_default_level_of_trl(tmp_path):
    args = config(tmp_path, loss_type="vespo", importance_sampling_level="token")
    assert args.loss_config().level == config(tmp_path, loss_type="vespo").loss_config().level


def test_a_copy_of_finished_arguments_is_the_same(tmp_path):
    args = config(tmp_path, pad_to_multiple_of="8", use_adaptive_entropy=True)
    assert dataclasses.replace(args).pad_to_multiple_of == 8


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows, self.read = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row


def test_a_stream_trains_as_its_rows_do(tmp_path):
    histories = []
    for name, data in (("stream", Stream(dataset(40))), ("rows", dataset(40)[:6])):
        options = {"max_steps": 3, "shuffle_dataset": False}
        run = trainer(tmp_path / name, reward=spread_reward, train_dataset=data, **options)
        run.train()
        histories.append([log["loss"] for log in run.state.log_history if "loss" in log])
        if name == "stream":
            per_step = run.args.generation_batch_size // run.args.num_generations
            assert data.read == 3 * per_step
            assert len(run.train_dataset) == data.read
            assert run.args.shuffle_dataset is False
    assert histories[0] == histories[1]


def test_a_stream_needs_a_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="^max_steps: expected a number of steps with a dataset"):
        trainer(tmp_path, reward=count_w3, train_dataset=Stream(dataset()), max_steps=-1)
    with pytest.raises(ValueError, match="^train_dataset: expected at least one prompt"):
        trainer(tmp_path, reward=count_w3, train_dataset=Stream([]), max_steps=1)
    with pytest.raises(ValueError, match="^train_dataset: expected rows that are dicts"):
        trainer(tmp_path, reward=count_w3, train_dataset=Stream(["w1"]), max_steps=1)
