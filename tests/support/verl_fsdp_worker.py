"""One rank of `test_verl_fsdp.py`: the fused head under FSDP as verl's engine wraps a model, with
other tokens on each rank, against the mean of the gradients of plain copies."""

from __future__ import annotations

import copy
import sys

import ranks
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from tiny_verl import model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.fsdp_utils import apply_fsdp2, get_fsdp_wrap_policy

import grpo_fast.integrations.verl  # noqa: F401

TOLERANCE = 1e-5


def built(family: str, **options: object) -> torch.nn.Module:
    """With the same weights on each rank."""
    torch.manual_seed(0)
    made = model(family, **options)
    fused = {"use_fused_kernels": True, "fused_kernels_backend": "torch"}
    apply_monkey_patch(made, use_remove_padding=False, **fused)
    return made


def step(one: torch.nn.Module) -> torch.Tensor:
    """Forward and backward on this rank's tokens; its log-probs."""
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
    out = one(input_ids=ids, temperature=0.7, return_dict=True, use_cache=False)
    ((out.log_probs * torch.arange(18.0).view(2, 9)).sum() + out.entropy.sum()).backward()
    return out.log_probs.detach()


def means(plain: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients over the ranks."""
    out = {}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            out[name] = parameter.grad / dist.get_world_size()
    return out


def fsdp2() -> None:
    """Where embeddings are not tied the head is a unit of its own, whose forward never runs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    untied = {"tie_word_embeddings": False}
    for family, more in (("Qwen3", {}), ("Qwen3", untied), ("Gemma2", {}), ("Phi", {})):
        made = built(family, **more)
        plain = copy.deepcopy(made)
        apply_fsdp2(made, options, OmegaConf.create({"wrap_policy": {}}))
        assert torch.equal(step(made), step(plain))
        wanted = means(plain)
        for name, parameter in made.named_parameters():
            got, want = parameter.grad.full_tensor(), wanted[name]
            error = (got - want).abs().max() / want.abs().max()
            assert error < TOLERANCE, f"{family} {more} {name} {error}"


def fsdp1() -> None:
    """Flattened parameters: the norm of the whole gradient."""
    cases = [("Qwen3", {}, None), ("Gemma2", {}, None), ("Phi", {}, None)]
    cases += [("Qwen3", {"tie_word_embeddings": False}, ["q_proj"])]
    for family, more, targets in cases:
        for original in (False, True):
            made = built(family, **more)
            if targets is not None:
                lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
                made = get_peft_model(made, lora)
            plain = copy.deepcopy(made)
            wrap = get_fsdp_wrap_policy(made, None, is_lora=targets is not None)
            options = {"auto_wrap_policy": wrap, "use_orig_params": original}
            made = FullyShardedDataParallel(made, device_id=torch.device("cpu"), **options)
            assert (step(made) - step(plain)).abs().max() < TOLERANCE
            found = sum(p.grad.square().sum() for p in made.parameters() if p.grad is not None)
            dist.all_reduce(found)
            wanted = sum(grad.square().sum() for grad in means(plain).values())
            assert abs(found / wanted - 1) < TOLERANCE, f"{family} {more} {targets} {original}"


CHECKS = (fsdp2, fsdp1)

if __name__ == "__main__":
    ranks.answer(CHECKS, *sys.argv[1:])
