"""Names that TRL's trainer has and this one lacks: honoured where they can be, else refused.

One table says for each of them what to use instead, so that a script which changes its import hears
a sentence and no TypeError. `docs/trl.md` is printed from it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from grpo_fast.checks import fail

from .kl import option as _option

_SERVER = "sampler='vllm' with sampler_url asks a vLLM server"
_ENGINE = "the server of sampler='vllm' is started with its own options"
_CORRECTION = "rollout_correction, rollout_ratio_min and rollout_ratio_max set what is done with it"

# field -> (the values that change nothing here, what to use instead)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cache_implementation": (
        (None,),
        "the sampler fills a cache of its own, with each prompt once for its group; leave it out",
    ),
    "use_vllm": ((False,), _SERVER),
    "vllm_mode": (("colocate",), f"no engine runs inside the trainer; {_SERVER}"),
    "vllm_model_impl": (("vllm",), _ENGINE),
    "vllm_enable_sleep_mode": ((False,), _ENGINE),
    "vllm_structured_outputs_regex": ((None,), "a rollout_func can sample under a grammar"),
    "vllm_server_base_url": ((None,), "sampler_url is the address of the server"),
    "vllm_server_host": (("0.0.0.0",), "sampler_url is the address of the server"),
    "vllm_server_port": ((8000,), "sampler_url is the address of the server"),
    "vllm_server_timeout": ((240.0,), "sampler_kwargs has the timeout of a request"),
    "vllm_group_port": ((51216,), "weights reach the server through sampler_weights_dir"),
    "vllm_gpu_memory_utilization": ((0.3,), _ENGINE),
    "vllm_max_model_length": ((None,), _ENGINE),
    "vllm_tensor_parallel_size": ((1,), _ENGINE),
    "vllm_importance_sampling_correction": ((True,), _CORRECTION),
    "vllm_importance_sampling_mode": (("sequence_mask",), _CORRECTION),
    "vllm_importance_sampling_clip_max": ((3.0,), _CORRECTION),
    "vllm_importance_sampling_clip_min": ((None,), _CORRECTION),
    "vllm_importance_sampling_cap": ((None,), _CORRECTION),
    "use_transformers_continuous_batching": ((False,), "set sampler='continuous'"),
    "transformers_continuous_batching_config": (
        (None,),
        "sampler_kwargs has the settings of sampler='continuous'",
    ),
    "use_transformers_paged": ((False,), "set sampler='continuous'"),
    "max_tool_calling_iterations": ((None,), "a rollout_func runs tools, and counts the turns"),
    # no image is ever shown or logged, so both of its values do nothing
    "log_multimodal": ((True, False), "policies are shown text alone"),
    "log_unique_prompts": (
        (False,),
        "the parquet files of log_completions hold every completion; drop the repeats there",
    ),
    "log_completions_hub_repo": (
        (None,),
        "upload the parquet files that log_completions writes under output_dir/completions",
    ),
}

# argument of the constructor -> what to use instead of it
REFUSED_ARGUMENTS = {
    "quantization_config": "load the model quantised and pass it, with a peft_config",
    "tools": "a rollout_func runs tools; see samplers.from_function",
    "environment_factory": "a rollout_func plays episodes; see samplers.from_function",
}

# field -> why its default is another one than TRL's
OTHER_DEFAULTS = {
    "gradient_checkpointing": (
        "off: logits and padding are no part of the memory here, and checkpointing computes every "
        "forward twice; set it to True where activations do not fit"
    ),
    "importance_sampling_level": "the level of the paper of loss_type: token for all but luspo",
    "scale_rewards": "the division of loss_type's advantages: by the std of the group as in TRL",
}

# field -> how it is honoured where that needs a word
HONOURED = {
    "pad_to_multiple_of": "tokens of a packed row are rounded up to it; 'auto' rounds nothing",
    "entropy_coef": (
        "nats per token, whatever the loss type; with grpo and sapo each completion counts alike "
        "in that mean, in TRL each token"
    ),
    "use_adaptive_entropy": (
        "with the entropy of all tokens of the optimizer step, over all ranks; its state is in "
        "checkpoints"
    ),
    "importance_sampling_level": "vespo takes 'token' as TRL does, and is of the sequence anyway",
    "delta": "above 1 + epsilon_high; cispo, sapo and vespo refuse it, where TRL ignores it",
    "trust_remote_code": "for the model, its tokenizer, and reward models given by name",
    "model_init_kwargs": "its revision and trust_remote_code hold for the tokenizer too",
    "router_aux_loss_coef": "None takes that of the model's config; 0 switches the loss off",
    "cast_lm_head_to_fp32": "the weight and the products; the embeddings of a tied head stay as "
    "they are read",
    "shuffle_dataset": "a stream keeps its order",
}


def _hidden(default: object) -> Any:
    """A field that --help does not list: it has no effect here."""
    return field(default=default, metadata={"help": argparse.SUPPRESS})


@dataclass
class TRLOptions:
    """Fields of TRL 1.16's GRPOConfig without another name here."""

    trust_remote_code: bool = _option(
        False, "Run the code that a checkpoint brings, for the model and its tokenizer."
    )
    router_aux_loss_coef: float | None = _option(
        None, "Coefficient of a mixture of experts' router loss; default: the model config's."
    )
    cast_lm_head_to_fp32: bool = _option(False, "Hold and compute the lm_head in float32.")
    pad_to_multiple_of: int | str | None = _option(
        "auto", "Round the tokens of a packed row up to a multiple of this; auto: no rounding."
    )
    use_adaptive_entropy: bool = _option(
        False, "Move entropy_coef so that the policy's entropy stays near entropy_target."
    )
    entropy_coef_min: float = _option(0.0, "Lower bound of the adaptive entropy_coef.")
    entropy_coef_max: float = _option(1.0, "Upper bound of the adaptive entropy_coef.")
    entropy_coef_delta: float = _option(0.005, "Change of the adaptive entropy_coef in a step.")
    entropy_target: float = _option(
        0.2, "Nats per token at and below which the adaptive bonus is on and grows."
    )

    cache_implementation: str | None = _hidden(None)
    use_vllm: bool = _hidden(False)
    vllm_mode: str = _hidden("colocate")
    vllm_model_impl: str = _hidden("vllm")
    vllm_enable_sleep_mode: bool = _hidden(False)
    vllm_structured_outputs_regex: str | None = _hidden(None)
    vllm_server_base_url: str | None = _hidden(None)
    vllm_server_host: str = _hidden("0.0.0.0")
    vllm_server_port: int = _hidden(8000)
    vllm_server_timeout: float = _hidden(240.0)
    vllm_group_port: int = _hidden(51216)
    vllm_gpu_memory_utilization: float = _hidden(0.3)
    vllm_max_model_length: int | None = _hidden(None)
    vllm_tensor_parallel_size: int = _hidden(1)
    vllm_importance_sampling_correction: bool = _hidden(True)
    vllm_importance_sampling_mode: str = _hidden("sequence_mask")
    vllm_importance_sampling_clip_max: float | None = _hidden(3.0)
    vllm_importance_sampling_clip_min: float | None = _hidden(None)
    vllm_importance_sampling_cap: float | None = _hidden(None)
    use_transformers_continuous_batching: bool = _hidden(False)
    transformers_continuous_batching_config: dict | str | None = _hidden(None)
    use_transformers_paged: bool = _hidden(False)
    max_tool_calling_iterations: int | None = _hidden(None)
    log_multimodal: bool = _hidden(True)
    log_unique_prompts: bool = _hidden(False)
    log_completions_hub_repo: str | None = _hidden(None)

    def check_trl(self) -> None:
        """Refuse what cannot be honoured, each name with what to use instead.

        Raises:
            ValueError: naming the field.
        """
        for name, (allowed, instead) in REFUSED.items():
            value = getattr(self, name)
            # None is never a wish
            if value is not None and value not in allowed:
                fail(name, f"{allowed[0]!r}, the default", repr(value), f"{instead}.")
        self._check_entropy()
        if isinstance(self.pad_to_multiple_of, str) and self.pad_to_multiple_of.isdigit():
            self.pad_to_multiple_of = int(self.pad_to_multiple_of)
        multiple = self.pad_to_multiple_of
        good = isinstance(multiple, int) and not isinstance(multiple, bool) and multiple >= 1
        if multiple not in (None, "auto") and not good:
            fail("pad_to_multiple_of", "None, 'auto' or an integer >= 1", repr(multiple))
        if self.router_aux_loss_coef is not None and not _at_least_zero(self.router_aux_loss_coef):
            got = repr(self.router_aux_loss_coef)
            fail("router_aux_loss_coef", "None or a finite number >= 0", got)
        if self.sampler == "hf" and "cache_implementation" in (self.generation_kwargs or {}):
            hint = f"{REFUSED['cache_implementation'][1]}."
            fail("generation_kwargs", "no cache", "'cache_implementation'", hint)

    def _check_entropy(self) -> None:
        names = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
        for name in names:
            value = getattr(self, name)
            if not _at_least_zero(value):
                fail(name, "a finite number >= 0", repr(value))
            default = type(self).__dataclass_fields__[name].default
            if value != default and not self.use_adaptive_entropy:
                expected = f"{default!r} without use_adaptive_entropy, which alone reads it"
                fail(name, expected, repr(value))
        if self.use_adaptive_entropy and not (
            self.entropy_coef_min <= self.entropy_coef <= self.entropy_coef_max
        ):
            expected = (
                f"a number between entropy_coef_min = {self.entropy_coef_min:g} and "
                f"entropy_coef_max = {self.entropy_coef_max:g}"
            )
            fail("entropy_coef", expected, self.entropy_coef)

    @property
    def row_multiple(self) -> int:
        """What the tokens of a packed row are a multiple of."""
        return self.pad_to_multiple_of if isinstance(self.pad_to_multiple_of, int) else 1


def _at_least_zero(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < float("inf")


def check_further(**given: Any) -> None:
    """Refuse arguments of TRL's constructor that cannot be honoured; None and [] say nothing.

    Raises:
        ValueError: naming the argument, and what to use instead of it.
    """
    for name, value in given.items():
        if value is None or (isinstance(value, (list, tuple, dict)) and not value):
            continue
        fail(name, "None", type(value).__name__, f"{REFUSED_ARGUMENTS[name]}.")
