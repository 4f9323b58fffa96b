"""A driver as OpenRLHF's: `python openrlhf_driver.py` prints what one of its workers computes with,
and what a worker without a model has imported."""

from __future__ import annotations

import json
import sys

import ray
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor


def computes_with(actor) -> dict[str, str]:
    """Where this worker's Actor.forward and the PolicyLoss of its trainers come from."""
    from openrlhf.models import Actor
    from openrlhf.trainer.ray import ppo_actor

    loss = ppo_actor.PolicyLoss()
    config = getattr(loss, "loss_config", None)
    return {
        "forward": Actor.forward.__module__,
        "forward of the actor": ppo_actor.Actor.forward.__module__,
        "loss": type(loss).__module__,
        "loss_type": getattr(config, "loss_type", None),
    }


@ray.remote
def imported() -> list[str]:
    """Of what must not come into a worker of vLLM."""
    return [
        name for name in ("deepspeed", "transformers", "openrlhf.models") if name in sys.modules
    ]


def main() -> None:
    # a GPU in name alone, which the actor asks for
    ray.init(
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=80_000_000,
        runtime_env={"env_vars": {"NCCL_DEBUG": "WARN"}},
    )
    actor = PolicyModelActor.remote(1, 0, None, None)
    said = ray.get(actor.__ray_call__.remote(computes_with))
    print(json.dumps({**said, "imported": ray.get(imported.remote())}))
    ray.shutdown()


if __name__ == "__main__":
    main()
