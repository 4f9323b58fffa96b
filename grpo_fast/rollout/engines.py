"""The routes of vLLM's and SGLang's servers."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from .failure import SamplerFailed
from .server import Completions, ServerSampler

logger = logging.getLogger(__name__)


class VLLMSampler(ServerSampler):
    """A vLLM server, started by

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

    The mode makes its log-probs those of the distribution that is sampled from; the default,
    `raw_logprobs`, is before the temperature. The development mode has the routes that load weights
    from a folder and reset the prefix cache.
    """

    engine = "vllm"
    _name: str | None = None

    def ask(self, prompts: list[list[int]], count: int, seeds: list[int]) -> list[Completions]:
        """`POST /v1/completions`, a request for each prompt."""
        if self._name is None:
            self._name = self.client.ask("GET", "/v1/models")["data"][0]["id"]
        # vLLM has -1 for no limit in some versions and 0 in others; absent is off in all
        settings = {k: v for k, v in self.settings.items() if not (k == "top_k" and v == 0)}
        bodies = [
            {
                "model": self._name,
                "prompt": prompt,
                "n": count,
                "max_tokens": self.max_tokens,
                "logprobs": 0,
                "return_token_ids": True,
                "stop_token_ids": sorted(self.eos_ids),
                "skip_special_tokens": False,
                "seed": seed,
                **settings,
            }
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        answers = self.client.ask_all("POST", "/v1/completions", bodies)
        return [[_of_vllm(choice) for choice in _choices(answer)] for answer in answers]

    def load(self, folder: Path) -> None:
        """`POST /collective_rpc reload_weights`, then `/reset_prefix_cache`."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self.client.ask("POST", "/collective_rpc", body)
        self.client.ask("POST", "/reset_prefix_cache", {})


def _choices(answer: Any) -> list[dict[str, Any]]:
    try:
        return sorted(answer["choices"], key=lambda choice: choice["index"])
    except (KeyError, TypeError):
        raise SamplerFailed(f"vllm: expected choices, got {str(answer)[:200]}.") from None


def _of_vllm(choice: dict[str, Any]) -> tuple[list[int], list[float]]:
    tokens = choice.get("token_ids")
    values = (choice.get("logprobs") or {}).get("token_logprobs")
    if tokens is None or values is None:
        hint = "vLLM 0.10.2 or later gives both where return_token_ids and logprobs are asked for"
        raise SamplerFailed(f"vllm: an answer without token_ids or log-probs; {hint}.")
    return list(tokens), [math.nan if v is None else float(v) for v in values]


class SGLangSampler(ServerSampler):
    """An SGLang server, started by `python -m sglang.launch_server --model-path MODEL`.

    Its log-probs are those of the logits over the temperature; top_k, top_p and min_p are not in
    them, so such settings leave a difference that the rollout correction sees.
    """

    engine = "sglang"

    def ask(self, prompts: list[list[int]], count: int, seeds: list[int]) -> list[Completions]:
        """`POST /generate`, one request for all prompts."""
        settings = {k: v for k, v in self.settings.items() if not (k == "top_k" and v == 0)}
        sampling = [
            {
                "n": count,
                "max_new_tokens": self.max_tokens,
                "stop_token_ids": sorted(self.eos_ids),
                "skip_special_tokens": False,
                "no_stop_trim": True,
                "sampling_seed": seed,
                **settings,
            }
            for seed in seeds
        ]
        body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
        answer = self.client.ask("POST", "/generate", body)
        if not isinstance(answer, list) or len(answer) != count * len(prompts):
            raise SamplerFailed(f"sglang: expected a list of answers, got {str(answer)[:200]}.")
        rows = [_of_sglang(one) for one in answer]
        return [rows[i * count : (i + 1) * count] for i in range(len(prompts))]

    def load(self, folder: Path) -> None:
        """`POST /update_weights_from_disk`, which flushes the cache."""
        body = {"model_path": str(folder), "flush_cache": True}
        answer = self.client.ask("POST", "/update_weights_from_disk", body)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise SamplerFailed(f"sglang could not load {folder}: {answer.get('message')}")


def _of_sglang(answer: dict[str, Any]) -> tuple[list[int], list[float]]:
    try:
        pairs = answer["meta_info"]["output_token_logprobs"]
    except (KeyError, TypeError):
        raise SamplerFailed(f"sglang: an answer without log-probs: {str(answer)[:200]}.") from None
    return [int(token) for _, token, *_ in pairs], [float(value) for value, *_ in pairs]
