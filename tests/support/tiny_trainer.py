"""A tiny random Llama with a word tokenizer, and a GRPOTrainer around it, for the trainer's
tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.trainer.curves import Curves

WORDS = [f"w{i}" for i in range(29)]
VOCAB = ["<pad>", "<eos>", "<unk>", *WORDS]
TEMPLATE = (
    "{% for m in messages %}{{ 'w0 ' if m['role'] == 'user' else 'w1 ' }}{{ m['content'] }} "
    "{% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the words w0 ... w28, split at spaces."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    return fast


def model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Two layers of width 32; logits spread enough that completions end at uneven lengths."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
        **overrides,
    )
    return LlamaForCausalLM(config)


def checkpoint(folder: Any, seed: int = 0, **overrides: Any) -> str:
    """Two layers of width 32, tied to no embedding, saved where a reference can be read from."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **{"tie_word_embeddings": False, "initializer_range": 0.2, **overrides},
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def dataset(rows: int = 8) -> list[dict[str, Any]]:
    """Prompts of two to five words, with a column for the rewards."""
    return [
        {"prompt": " ".join(WORDS[(i + j) % 29] for j in range(2 + i % 4)), "target": f"w{i % 5}"}
        for i in range(rows)
    ]


def count_w3(completions: list[str], **_: Any) -> list[float]:
    """Share of w3 among the words of a completion."""
    return [c.split().count("w3") / max(len(c.split()), 1) for c in completions]


def spread_reward(completions: list[str], **_: Any) -> list[float]:
    """Different for almost every two completions, so that groups have a gradient."""
    return [float(sum(int(w[1:]) for w in c.split()) % 11) for c in completions]


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of gradients a from gradients b."""
    gap = sum((a[n].double() - b[n].double()).square().sum() for n in b)
    return (gap / sum(b[n].double().square().sum() for n in b)).sqrt().item()


def logprobs(policy, prompt, completion, temperature):
    """log p of each completion token, one sequence at a time, through the model's own logits."""
    logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def double(weights):
    """A policy in float64 that holds these weights."""
    policy = model().double()
    policy.load_state_dict({k: v.double() for k, v in weights.items()})
    return policy.eval()


class Recording(GRPOTrainer):
    """Keeps the rollouts of every window, and weights, gradients and losses of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.windows: list[tuple] = []
        self.steps: list[dict[str, Any]] = []
        self.add_callback(_Record(self))

    def batch(self, rollouts: Any, advantages: torch.Tensor, evaluate: bool = False) -> list:
        if not evaluate:
            weights = copy.deepcopy(self.model.state_dict())
            self.windows.append((rollouts, advantages.clone(), weights))
        return super().batch(rollouts, advantages, evaluate)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.steps[-1]["losses"].append(loss.item())
        return loss


class _Record(TrainerCallback):
    def __init__(self, run: Recording) -> None:
        self.run = run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = copy.deepcopy(self.run.model.state_dict())
        self.run.steps.append({"weights": weights, "losses": []})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = self.run.model.named_parameters()
        # a step that is dropped has none
        gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
        self.run.steps[-1]["gradients"] = gradients


def config(output_dir: Any, **overrides: Any) -> GRPOConfig:
    """Small batches, no progress bar, nothing saved unless asked."""
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return GRPOConfig(output_dir=str(output_dir), **{**settings, **overrides})


def trainer(output_dir: Any, policy: Any = None, reward: Any = count_w3, **overrides: Any) -> Any:
    """A GRPOTrainer; keywords that GRPOTrainer takes go there, all others to GRPOConfig."""
    own = ("train_dataset", "eval_dataset", "peft_config", "callbacks", "processing_class")
    given = {name: overrides.pop(name) for name in own if name in overrides}
    cls, curves = overrides.pop("cls", GRPOTrainer), overrides.pop("curves", False)
    run = cls(
        model=model() if policy is None else policy,
        reward_funcs=reward,
        args=config(output_dir, **overrides),
        **{"train_dataset": dataset(), "processing_class": tokenizer(), **given},
    )
    if not curves:
        # drawing takes longer than everything else in these runs
        run.remove_callback(Curves)
    return run
