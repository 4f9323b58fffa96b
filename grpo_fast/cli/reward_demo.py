"""The demo of reward models: human ratings of words and emoticons, from vaderSentiment.

Its lexicon has the ten raw ratings of each entry from -4 to 4 (Hutto and Gilbert, 2014). A set is
four entries, ranked by their mean; the entries of the held-out sets are in no set to train on.
"""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path
from typing import Any

from grpo_fast.checks import fail
from grpo_fast.trainer.reward_config import RewardModelConfig
from grpo_fast.trainer.reward_model import RewardModelTrainer

from .demo import weights

PROMPT = "How does it feel? It feels"
SET, TRAIN, HELD_OUT = 4, 480, 120
# an entry about which people disagree more says little; most have a std below 1
_LARGEST_STD = 1.5
# sets
_SHOWN = 2

# set for two CPU cores; every one can be overridden on the command line
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/reward-demo",
    "seed": 0,
    "max_steps": 60,
    "logging_steps": 5,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
}


def run(config: dict[str, Any]) -> None:
    """Train the demo's reward model and show what it says of held-out entries.

    Args:
        config: fields of `RewardModelConfig` that replace `DEFAULTS`.

    Raises:
        ValueError: when a package is missing (with the command that installs it) or a field is bad.
    """
    started = time.perf_counter()
    folder, gguf_file = weights()
    args = RewardModelConfig(**{**DEFAULTS, **config})
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), "gguf_file": gguf_file}
    train, held_out = rated_sets(args.seed)
    print(f"SmolLM2-135M-Instruct on human ratings: {len(train)} sets of {SET} to train on,")
    print(f"{len(held_out)} of other words and emoticons held out; seed {args.seed}", flush=True)
    trainer = RewardModelTrainer(str(folder), args, train, held_out)
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate()
    trainer.save_model()
    for name, values in (("before", before), ("after", after)):
        print(
            f"{name} training: held-out pair accuracy {values['eval_accuracy']:.3f} "
            f'("the longer wins": {values["eval_longer_accuracy"]:.3f}, chance: 0.5), '
            f"calibration error {values['eval_calibration']:.3f}"
        )
    for row in held_out[:_SHOWN]:
        scores = trainer.score([PROMPT] * SET, row["completions"])
        for text, rating, score in zip(row["completions"], row["scores"], scores, strict=True):
            print(f"  {text.strip():20} people {rating:+.1f}   score {score:+.2f}")
    output = Path(args.output_dir)
    print(f"reward model: {output}   curves: {output / 'curves.png'}")
    print(f"{time.perf_counter() - started:.0f} s in all")


def lexicon() -> dict[str, float]:
    """Entry -> mean of its ten human ratings, without those that people disagree about.

    Raises:
        ValueError: vaderSentiment is not installed.
    """
    spec = importlib.util.find_spec("vaderSentiment")
    if spec is None or not spec.submodule_search_locations:
        # its own code needs requests, its file does not
        hint = "pip install --no-deps vaderSentiment."
        fail("--demo", "the ratings in vaderSentiment", "no such package", hint)
    path = Path(next(iter(spec.submodule_search_locations))) / "vader_lexicon.txt"
    entries = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            text, mean, std, _ = line.split("\t")
            if float(std) <= _LARGEST_STD:
                entries[text] = float(mean)
    return entries


def rated_sets(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sets to train on and held-out ones, of different entries."""
    entries = lexicon()
    words = sorted(entries)
    rng = random.Random(f"{seed}:sets")
    rng.shuffle(words)
    parts = [words[i : i + SET] for i in range(0, len(words) - SET, SET)]
    parts = [part for part in parts if len({entries[w] for w in part}) > 1]
    rows = [
        {
            "prompt": PROMPT,
            "completions": [f" {word}" for word in part],
            "scores": [entries[word] for word in part],
        }
        for part in parts
    ]
    return rows[HELD_OUT : HELD_OUT + TRAIN], rows[:HELD_OUT]
