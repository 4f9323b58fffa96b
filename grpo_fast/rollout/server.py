"""Sampling servers that the user started: token ids in, token ids and their log-probs out, and the
weights of every step pushed through a folder."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from grpo_fast.checks import fail

from .client import Client
from .failure import SamplerFailed
from .rollouts import Rollouts
from .weights import save_weights

# what an engine takes by the same name and meaning
_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ServerSampler(ABC):
    """An engine behind HTTP. Every rank asks for its own prompts; one rank moves the weights.

    `sync` writes them to a folder of its own, tells the server to load that folder and to forget
    its prefix cache, and deletes the one before: both sides have to see the same disk (a folder in
    memory, /dev/shm, is fastest where they share a machine). Nothing is moved when the weights are
    those of the last `sync`.

    Args:
        url: of the server.
        generation_config: `max_new_tokens` and the sampling settings.
        eos_ids: tokens that end a completion.
        folder: where the weights go.
        version: optimizer steps that the policy's weights have behind them; asked at each `sync`.
        main: whether this rank moves the weights. The others must not sample before it has: a
            trainer lets all ranks meet after `sync`.
        client: keywords of `Client`.

    Raises:
        ValueError: a setting that the engine has no field for, or a wrong url.
    """

    engine = ""

    def __init__(
        self,
        url: str,
        *,
        generation_config: GenerationConfig,
        eos_ids: set[int],
        folder: str | Path,
        version: Callable[[], int],
        main: bool = True,
        client: dict[str, Any] | None = None,
    ) -> None:
        self.client = Client(url, **(client or {}))
        self.eos_ids, self.folder = eos_ids, Path(folder)
        self.max_tokens = generation_config.max_new_tokens
        self.settings = _settings(generation_config)
        self.version, self.main = version, main
        self.loaded: int | None = None
        self._path: Path | None = None

    @abstractmethod
    def ask(self, prompts: list[list[int]], count: int, seeds: list[int]) -> list[Completions]:
        """`count` completions of each prompt."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Make the server read its weights from a folder and forget what it cached of the old."""

    def sync(self, model: nn.Module) -> None:
        """Push the weights, once for each optimizer step."""
        version = self.version()
        if version == self.loaded:
            return
        if self.main:
            self._push(model, version)
        self.loaded = version

    def _push(self, model: nn.Module, version: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder.absolute() / f"weights-{version:08d}"
        save_weights(model, path)
        self.load(path)
        if self._path is not None and self._path != path:
            shutil.rmtree(self._path, ignore_errors=True)
        self._path = path

    def sample(self, prompts: list[list[int]], num_generations: int) -> Rollouts:
        """`num_generations` completions of every prompt; seeds come from the global torch RNG.

        Raises:
            SamplerFailed: the server is gone, stalled, refused, or answered something else.
        """
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        answers = self.ask(prompts, num_generations, seeds)
        ids, logp = [], []
        for row, completions in enumerate(answers):
            if len(completions) != num_generations:
                raise SamplerFailed(
                    f"{self.client.url}: expected {num_generations} completions of prompt {row}, "
                    f"got {len(completions)}."
                )
            for tokens, values in completions:
                if len(tokens) != len(values):
                    raise SamplerFailed(
                        f"{self.client.url}: {len(tokens)} tokens came with {len(values)} "
                        "log-probs."
                    )
                ids.append(tokens)
                logp.append(values)
        return Rollouts(
            prompt_ids=[list(p) for p in prompts for _ in range(num_generations)],
            completion_ids=ids,
            truncated=[not (row and row[-1] in self.eos_ids) for row in ids],
            logp=logp,
            version=self.loaded,
        )


# token ids and log-probs of each completion of a prompt
Completions = list[tuple[list[int], list[float]]]


def _settings(config: GenerationConfig) -> dict[str, Any]:
    """Sampling settings of a request; what an engine does otherwise is refused by name."""
    known = {*_SETTINGS, "max_new_tokens", "do_sample"}
    default = GenerationConfig().to_dict()
    for name, value in config.to_dict().items():
        if value is None or name in known or name.startswith("_"):
            continue
        if value != default.get(name) and name not in ("pad_token_id", "eos_token_id"):
            fail("generation_kwargs", f"a field that a server knows too: {_SETTINGS}", name)
    out = {name: getattr(config, name, None) for name in _SETTINGS}
    return {name: value for name, value in out.items() if value is not None}
