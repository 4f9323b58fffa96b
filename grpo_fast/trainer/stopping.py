"""SIGTERM and Ctrl-C: the first lets the step end and saves it, the second stops at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping(TrainerCallback):
    """Ends a run after the step in which a signal came, with a checkpoint of it.

    A signal that reaches one rank ends the run on all of them after the same step: where there are
    several they tell each other after each step, one number each.

    Attributes:
        heard: the signal, None where there was none.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.heard: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are heard; afterwards they do what they did before.

        Python hands signals to the main thread alone: a run in another one hears nothing.
        """
        self.heard = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: a handler that was not set from Python
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.heard is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.heard = number
        step = self.trainer.state.global_step + 1
        logger.warning("%s: stopping when step %d is done; once more to stop at once.", name, step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Save and stop, on every rank at once."""
        heard = self._agreed()
        if heard is None or state.global_step >= state.max_steps:
            return
        self.heard = heard
        # a checkpoint that was asked for anyway is written once
        control.should_save = control.should_training_stop = True

    def _agreed(self) -> int | None:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return self.heard
        mine = torch.tensor([self.heard or 0], device=accelerator.device)
        return int(accelerator.gather(mine).max()) or None

    @property
    def stopped(self) -> int | None:
        """The signal that ended the run before its last step, None where it went on to its end."""
        state = self.trainer.state
        return self.heard if state.global_step < state.max_steps else None

    def sentence(self) -> str:
        """Where a run that was stopped stands, and how it goes on from Python."""
        step = self.trainer.state.global_step
        folder = Path(self.trainer.args.output_dir) / f"checkpoint-{step}"
        return (
            f"{signal.Signals(self.heard).name}: stopped after step {step} of "
            f"{self.trainer.state.max_steps}, saved as {folder}; "
            "train(resume_from_checkpoint=True) goes on from there."
        )
