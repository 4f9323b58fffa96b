"""OpenRLHF's own ActorPPOTrainer on a CPU: what DeepSpeed and the launcher do is stood in for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import openrlhf_cases as cases
import torch
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray import ppo_actor

METRICS = ("policy_loss", "entropy_loss", "ppo_clip_ratio", "ppo_kl", "kl", "logprobs_diff")
METRICS += ("vllm_kl", "is_filter_ratio")


def arguments(**options: Any) -> SimpleNamespace:
    """The options that the trainer reads, with steps large enough that ratios leave their
    bounds."""
    given = {
        "entropy_coef": 0.01,
        "aux_loss_coef": 0.0,
        "dual_clip": None,
        "policy_loss_type": "ppo",
        "loss_agg_mode": "token-mean",
        "eps_clip_low_high": (0.05, 0.08),
        "is_correction_level": "off",
        "is_correction_mode": "mask",
        "kl_use_loss": True,
        "kl_estimator": "k3",
        **options,
    }
    advantage = {n: given.pop(n) for n in ("is_correction_level", "is_correction_mode")}
    advantage |= {"is_correction_gating": "ratio", "is_correction_threshold": [0.7, 1.4]}
    kl = {"use_loss": given.pop("kl_use_loss"), "estimator": given.pop("kl_estimator")}
    kl |= {"init_coef": 0.01, "unbiased_gradient": False}
    algo = SimpleNamespace(advantage=SimpleNamespace(**advantage), kl=SimpleNamespace(**kl))
    train = {"max_epochs": 1, "dynamic_batch_enable": False}
    train |= {"colocate_all": False, "async_enable": False}
    return SimpleNamespace(
        actor=SimpleNamespace(**given),
        algo=algo,
        train=SimpleNamespace(**train),
        ds=SimpleNamespace(packing_samples=False, tensor_parallel_size=1),
        vllm=SimpleNamespace(sync_backend="gloo"),
    )


class Strategy:
    """One process without DeepSpeed: plain backward, plain SGD."""

    ring_attn_group = None
    ds_device_mesh = None
    accumulated_gradient = 1

    def __init__(self, args: SimpleNamespace) -> None:
        self.args = args

    def backward(self, loss: torch.Tensor, model: Actor, optimizer: Any) -> None:
        """As the engine's."""
        loss.backward()

    def optimizer_step(self, optimizer: Any, *_: Any, name: str) -> None:
        """As the engine's."""
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model: Actor) -> float:
        """Of nothing: the step is over."""
        return 0.0


def experience(one: Actor, reference: Actor, seed: int) -> Experience:
    """A batch with old log-probs of the actor, those of a reference, and a sampler's near them."""
    data, g = cases.batch(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        old, base = one(**data), reference(**data)
    mask = data["action_mask"]
    noise = torch.randn(old.shape, generator=g)
    return Experience(
        sequences=data["sequences"],
        attention_mask=data["attention_mask"],
        action_mask=mask,
        action_log_probs=old,
        base_action_log_probs=base,
        rollout_log_probs=(old + 0.4 * noise) * mask,
        advantages=torch.randn(len(mask), 1, generator=g).expand(mask.shape) * mask,
        info={},
    )


def train(one: Actor, steps: int = 6, **options: Any) -> dict[str, torch.Tensor]:
    """Metrics of each step (steps,), and the weights at the end; two steps for each experience."""
    args = arguments(**options)
    args.ds.packing_samples = one.packing_samples
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.02)
    scheduler = SimpleNamespace(get_last_lr=lambda: [0.02])
    trainer = ppo_actor.ActorPPOTrainer(Strategy(args), one, None, optimizer, scheduler)
    reference = cases.actor("Qwen3", packed=one.packing_samples, temperature=one.temperature)
    logged: dict[str, list[float]] = {}
    for step in range(steps):
        if step % 2 == 0:
            batch = experience(one, reference, seed=step)
        metrics = trainer.training_step(batch, 0.05, step)["metrics"]
        for name in METRICS:
            if name in metrics:
                logged.setdefault(name, []).append(float(metrics[name]))
    out = {name: torch.tensor(values) for name, values in logged.items()}
    weights = [p.detach().flatten() for p in one.parameters() if p.requires_grad]
    return {**out, "weights": torch.cat(weights).clone()}
