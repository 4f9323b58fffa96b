"""Training loops of two libraries in one process, one optimizer step of each in turn."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks.measure import timing
from grpo_fast.engine.chunks import release_workspace


class _Closed(Exception):
    """Ends a contestant's training before its last step."""


class Turns:
    """A contestant's `train()` in a thread that does one optimizer step whenever it is told to."""

    def __init__(self, trainer: Any, device: torch.device) -> None:
        self.trainer, self.device = trainer, device
        self.durations: list[float] = []
        self.losses: list[float] = []
        self.peak = 0
        self._peaks = contextlib.ExitStack()
        self._want_peak = self._closing = False
        self._error: BaseException | None = None
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        trainer.turns = self
        trainer.add_callback(_StepEnd(self))
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()
        self._wait()

    @property
    def grad_norms(self) -> list[float]:
        """The norm of the gradient before clipping, of every step so far."""
        return [log["grad_norm"] for log in self.trainer.state.log_history if "grad_norm" in log]

    def window(self, peak: bool = False) -> float:
        """Seconds of an optimizer step, the mean over those that use one window of text."""
        self._want_peak = peak
        steps = self.trainer.args.num_iterations
        for _ in range(steps):
            self._go.release()
            self._wait()
        return sum(self.durations[-steps:]) / steps

    def close(self) -> None:
        """End the training where it is."""
        self._closing = True
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _train(self) -> None:
        # Boundary: what happens in the thread is raised where the step was asked for.
        try:
            self.trainer.train()
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._peaks.close()
            self._done.release()

    def begin(self) -> None:
        """Called by the trainer before it fetches a step's batch: wait, then start the clock."""
        self._done.release()
        self._go.acquire()
        if self._closing:
            raise _Closed
        self.losses.append(0.0)
        self._loss = torch.zeros((), device=self.device)
        if self._want_peak:
            self._peaks.enter_context(peak_memory(self.device, self._record_peak))
        timing.synchronize(self.device)
        self._started = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Called by the trainer with the loss of a micro-batch, which is what it adds to a step."""
        self._loss += loss.detach()

    def end(self) -> None:
        """Called by the trainer after the optimizer's step: stop the clock."""
        timing.synchronize(self.device)
        self.durations.append(time.perf_counter() - self._started)
        self.losses[-1] = self._loss.item()
        self._peaks.close()

    def _record_peak(self, peak: int) -> None:
        self.peak = max(self.peak, peak)


class _StepEnd(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turns.end()


@contextlib.contextmanager
def peak_memory(device: torch.device, tell: Callable[[int], None]) -> Iterator[None]:
    """Tells the bytes that this thread had allocated at its worst moment, above those at the start.

    On CPU as torch's profiler records them, which slows things down. The workspace that our calls
    keep for the next one counts.
    """
    release_workspace()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        torch.cuda.synchronize(device)
        tell(torch.cuda.max_memory_allocated(device) - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield
    events = recorded.profiler.kineto_results.events()
    alive = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    tell(peak)


class Stepped:
    """Goes before a trainer class: waits for its turn before each step and adds up its loss."""

    turns: Turns

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.turns.begin()
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.turns.add(loss)
        return loss
