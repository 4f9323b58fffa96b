"""How a policy is held in memory: dtype and packing of what is loaded, the optimizer that rounds at
random, and what is said before the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from grpo_fast.checks import ArgumentError, fail
from grpo_fast.models.head import innermost
from grpo_fast.models.quantized import quantization_config, settle_quantized
from grpo_fast.models.tiling import tile_mlp
from grpo_fast.plan.architecture import of_config
from grpo_fast.plan.devices import GIB, Devices
from grpo_fast.plan.setup import OPTIMIZERS, Setup
from grpo_fast.plan.step import StepPlan, estimate, summary

from .config import GRPOConfig

logger = logging.get_logger(__name__)

# share of the weights that an Adam step would leave where they are, from which on it is said
_STILL = 0.1
# weights that are looked at, of each tensor
_SAMPLE = 4096
# prompts that are looked at before the first step
_PROMPTS = 64
# share of the device beyond which a run is about to fail
_FULL = 0.95


def loading_of(args: GRPOConfig, peft_config: Any) -> dict[str, Any]:
    """Keywords of `load_policy` for a policy that is given by name.

    Under an adapter the base is frozen: where `bf16` is on it loads as bf16, half of the memory
    and the numbers that autocast multiplies anyway. `model_init_kwargs` with a dtype wins. Without
    `bf16`, which is off on a CPU unless asked for, it stays fp32.

    Args:
        args: the run's.
        peft_config: of the adapter, or None.

    Raises:
        ValueError: `quantization` without an adapter.
    """
    trust = {"trust_remote_code": True} if args.trust_remote_code else {}
    options = {**trust, **(args.model_init_kwargs or {})}
    named = "dtype" in options or "torch_dtype" in options
    if peft_config is not None and args.bf16 and not named:
        options["dtype"] = torch.bfloat16
    if args.quantization is None:
        return options
    if peft_config is None:
        hint = "give a peft_config (lora_r on the command line)."
        fail("quantization", "None without an adapter", repr(args.quantization), hint)
    dtype = options.get("dtype", options.get("torch_dtype", torch.float32))
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    options["quantization_config"] = quantization_config(args.quantization, compute)
    return options


def hold(model: nn.Module, args: GRPOConfig, loaded: bool) -> nn.Module:
    """The policy as the options want it held: its packing checked, its MLPs tiled.

    Args:
        model: the policy, in its adapter.
        args: the run's.
        loaded: whether it was given by name.

    Raises:
        ValueError: packed weights without an adapter, LLM.int8, `quantization` of a model that is
            built already, or MLPs that cannot be tiled.
    """
    if args.quantization is not None and not loaded:
        expected = "None with a model that is built already"
        fail("quantization", expected, repr(args.quantization), "load it packed.")
    settle_quantized(model, hasattr(model, "peft_config"))
    if args.mlp_tile is not None:
        tile_mlp(model, args.mlp_tile)
    return model


def rounding_optimizer(args: GRPOConfig) -> tuple[type, dict[str, Any]] | None:
    """torchao's AdamW with stochastic rounding and its arguments, where it is asked for.

    A bf16 weight w + u becomes one of its two neighbours, the nearer one more often, so that its
    expectation is w + u ("Revisiting BFloat16 Training", 2020). It draws from torch's global
    generator, which checkpoints hold.

    Raises:
        ValueError: torchao is not installed, or another optimizer was asked for too.
    """
    if not args.bf16_stochastic_rounding:
        return None
    if not str(args.optim).removeprefix("OptimizerNames.").lower().startswith("adamw_torch"):
        hint = "it comes with an AdamW of its own."
        fail("optim", "the default with bf16_stochastic_rounding", str(args.optim), hint)
    try:
        from torchao.optim import _AdamW
    except ImportError as error:
        hint = "pip install torchao."
        raise ArgumentError(
            "bf16_stochastic_rounding", "torchao to be installed", "no such package", hint
        ) from error
    return _AdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "bf16_stochastic_round": True,
    }


def still_weights(model: nn.Module, learning_rate: float) -> float:
    """Share of the trained 16-bit weights that a step of `learning_rate` rounds back to.

    Adam's step is about learning_rate for every weight. Rounding to the nearest undoes it where it
    is below half of the spacing there: 2^(e - 9) in bf16 for |w| = m 2^e with m in [1/2, 1), and
    2^(e - 12) in fp16.

    Args:
        model: the policy.
        learning_rate: the peak one.

    Returns:
        A share of up to 4,096 weights of each tensor, spread over it; 0 where none has 16 bits.
    """
    still = seen = 0
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter.dtype not in (torch.bfloat16, torch.float16):
            continue
        digits = 9 if parameter.dtype == torch.bfloat16 else 12
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].float()
        some = some[some != 0]
        half = torch.ldexp(torch.ones_like(some), torch.frexp(some).exponent - digits)
        still += int((half > learning_rate).sum())
        seen += some.numel()
    return still / max(seen, 1)


def setup_of(args: GRPOConfig, model: nn.Module, prompt: int) -> Setup:
    """How a run of these arguments is set up, for the planner.

    Args:
        args: the run's.
        model: its policy.
        prompt: tokens of its longest prompt.
    """
    adapter = hasattr(model, "peft_config")
    lm = innermost(model)
    quantized = getattr(lm, "hf_quantizer", None) is not None
    optim = str(getattr(args.optim, "value", args.optim))
    paged, small = "paged" in optim, "8bit" in optim
    known = "paged_adamw_8bit" if paged else "adamw_8bit" if small else optim
    checkpointing = args.gradient_checkpointing
    rank = next(iter(model.peft_config.values())).r if adapter else 1
    return Setup(
        method="qlora" if quantized else "lora" if adapter else "full",
        weights="fp32" if lm.dtype == torch.float32 else "bf16",
        autocast=bool(args.bf16 or args.fp16),
        rank=rank,
        ranks=args.world_size,
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        sampled=_at_once(args),
        prompt=max(1, prompt),
        completion=args.max_completion_length,
        generations=args.num_generations,
        checkpointing=checkpointing,
        offload=checkpointing and bool((args.gradient_checkpointing_kwargs or {}).get("offload")),
        tile=args.mlp_tile,
        optimizer=known if known in OPTIMIZERS else "sgd" if "sgd" in optim else "adamw",
        beta=args.beta,
        critic=getattr(args, "critic", "none"),
        share_prompts=bool(getattr(args, "share_prompts", False)),
        workspace_bytes=args.workspace_bytes,
        device="cuda" if args.device.type == "cuda" else "cpu",
    )


def _at_once(args: GRPOConfig) -> int:
    """Sequences that this process samples at once; a server's cache is not ours."""
    window = args.per_device_train_batch_size * args.steps_per_generation
    if args.sampler in ("vllm", "sglang"):
        return 1
    return min(window, args.sampling_batch_size or window)


def plan_of(args: GRPOConfig, model: nn.Module, prompt: int) -> StepPlan | None:
    """The memory of a step of this run; None for a family that cannot be counted.

    Args:
        args, model, prompt: see `setup_of`.
    """
    try:
        return estimate(of_config(innermost(model).config), setup_of(args, model, prompt))
    except ValueError:
        return None


class MemoryNotices(TrainerCallback):
    """Says before the first step which weights will not move and whether the step fits, and during
    the run when the device is almost full.

    Args:
        trainer: has `encode` and `train_dataset`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def longest_prompt(self) -> int:
        """Tokens of the longest of the first prompts: all of a data set would take too long."""
        data = self.trainer.train_dataset
        some = range(0 if data is None else min(_PROMPTS, len(data)))
        return max((len(self.trainer.encode(data[i]["prompt"])) for i in some), default=1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        model = kwargs["model"]
        # the engines keep fp32 weights of their own
        masters = args.deepspeed or args.fsdp or args.bf16_stochastic_rounding
        share = 0.0 if masters else still_weights(model, args.learning_rate)
        if share > _STILL and state.is_world_process_zero:
            logger.warning(
                f"{share:.0%} of the 16-bit weights that are trained will not move: a step of "
                f"learning_rate {args.learning_rate:g} is below half of the spacing of their dtype "
                "there. Load fp32 weights (model_init_kwargs={'dtype': 'float32'}, with bf16=True "
                "for bf16 products), train an adapter, or set bf16_stochastic_rounding=True."
            )
        if args.device.type == "cuda" and not (args.deepspeed or args.fsdp):
            self._compare(args, model, torch.cuda.mem_get_info(args.device)[1])

    def _compare(self, args: Any, model: nn.Module, there: int) -> None:
        plan = plan_of(args, model, self.longest_prompt())
        if plan is not None and plan.total > _FULL * there:
            logger.warning(
                f"this run is about to exceed the device: {plan.total / GIB:.1f} GiB planned, "
                f"{there / GIB:.1f} GiB there.\n{summary(plan)}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where a longer batch would not fit."""
        if args.device.type != "cuda":
            return
        used, there = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info(args.device)[1]
        if used > _FULL * there:
            logger.warning_once(
                f"{used / GIB:.1f} of {there / GIB:.1f} GiB of the device are taken: a longer "
                "batch will not fit. Fewer sequences (per_device_train_batch_size), "
                "gradient_checkpointing, mlp_tile or fewer completions sampled at once "
                "(sampling_batch_size) need less."
            )


def watch_memory(trainer: Any) -> None:
    """Give a trainer the notices, and the optimizer that its options ask for.

    Args:
        trainer: a `GRPOTrainer` whose `Trainer.__init__` has run.

    Raises:
        ValueError: see `rounding_optimizer`.
    """
    trainer.add_callback(MemoryNotices(trainer))
    chosen = rounding_optimizer(trainer.args)
    if chosen is not None:
        trainer.optimizer_cls_and_kwargs = chosen


def memory_summary(trainer: Any) -> str | None:
    """Two lines on the memory of a step, for the start of a run; None for a family that cannot be
    counted. Counting takes a second or two of one core.

    Args:
        trainer: a `GRPOTrainer` that is built.
    """
    plan = plan_of(trainer.args, trainer.model, MemoryNotices(trainer).longest_prompt())
    if plan is None:
        return None
    device = trainer.args.device
    if device.type != "cuda":
        return summary(plan)
    name, there = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    return summary(plan, Devices(1, name, there))
