"""`grpo-fast plan`: the route of the loss for a shape, without a model, a GPU or a tensor. With a
model it is about the memory of a step (`step.py`)."""

from __future__ import annotations

import argparse

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.plan.head_sharding import head_traffic
from grpo_fast.plan.route import choose
from grpo_fast.plan.shape import _DTYPES, facts_of_shape
from grpo_fast.presets import LEVELS, PRESETS

_EXAMPLES = """\
examples:
  grpo-fast plan --tokens 8192 --hidden 4096 --vocab 151936
  grpo-fast plan --tokens 8192 --model Qwen/Qwen3-8B --active 0.3 --old-logp
  grpo-fast plan --tokens 8192 --hidden 4096 --vocab 151936 --old-logp \\
      --loss-type gspo --longest 4096
"""


def run(argv: list[str]) -> int:
    """Print the plan; 0.

    Args:
        argv: the arguments after `plan`.
    """
    # a model, or what it shall run on: about a step
    if argv and (not argv[0].startswith("-") or "--gpus" in argv):
        from .step import run as plan_step

        return plan_step(argv)
    asked = _parser().parse_args(argv)
    hidden, vocab = _shape(asked)
    print(choose(facts_of_shape(asked, hidden, vocab)))
    if asked.ranks != 1:
        itemsize = {"fp32": 4, "fp64": 8}.get(asked.dtype, 2)
        print(
            head_traffic(asked.tokens * asked.ranks, hidden, vocab, asked.ranks, itemsize=itemsize)
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grpo-fast plan",
        description="The route that linear_policy_loss takes for a shape: what it multiplies, what "
        "it holds, and why. `linear_policy_loss(..., explain=True)` says the same of a call. "
        "`grpo-fast plan MODEL --gpus 1xH100-80` plans the memory of a whole step instead: "
        "`grpo-fast plan MODEL --help`.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=int, required=True, help="unmasked tokens of one call")
    add("--hidden", type=int, help="width H of the hidden states")
    add("--vocab", type=int, help="vocabulary V")
    add("--model", help="folder or name of a model, in place of --hidden and --vocab")
    add("--active", type=float, default=1.0, help="share of the tokens that may have a gradient")
    add("--longest", type=int, help="tokens of the longest sequence; default: --tokens")
    add("--loss-type", default=LossConfig.loss_type, choices=tuple(PRESETS), metavar="NAME")
    add("--level", choices=LEVELS, metavar="LEVEL", help="importance_sampling_level")
    add("--beta", type=float, default=0.0, help="above 0: a KL, every token has a gradient")
    add("--entropy-coef", type=float, default=0.0, help="above 0: every token has a gradient")
    add("--top-entropy-quantile", type=float, default=1.0, help="share of tokens that is kept")
    add("--old-logp", action="store_true", help="old log-probs are given (not on-policy)")
    add("--rollout-logp", action="store_true", help="log-probs of the rollout engine are given")
    add("--frozen-head", action="store_true", help="the lm_head needs no gradient")
    add("--lora-rank", type=int, default=0, help="adapter of the lm_head itself")
    add("--no-grad", action="store_true", help="the values alone")
    add("--dtype", choices=tuple(_DTYPES), default="bf16", help="of hidden states and weight")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--ranks", type=int, default=1, help="of FSDP2: what the lm_head moves, split or gathered")
    add("--workspace-bytes", type=int, help="budget of the logits; default: the loss's own")
    return parser


def _shape(asked: argparse.Namespace) -> tuple[int, int]:
    if asked.model is not None:
        if asked.hidden is not None or asked.vocab is not None:
            fail("--model", "none beside --hidden and --vocab", "both")
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(asked.model).get_text_config()
        return config.hidden_size, config.vocab_size
    for name in ("hidden", "vocab"):
        if getattr(asked, name) is None:
            fail(f"--{name}", "a number, or --model", "nothing")
    return asked.hidden, asked.vocab
