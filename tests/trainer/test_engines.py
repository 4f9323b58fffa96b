"""What the trainer refuses of an engine, by name; and what needs no second process."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from tiny_trainer import model, trainer
from torch import nn

from grpo_fast.models import ReferencePolicy
from grpo_fast.models.sharding import full_state, is_sharded, load_full_state, reshard, whole
from grpo_fast.trainer.checkpoint import model_digest
from grpo_fast.trainer.head_sharding import HeadSharding
from grpo_fast.trainer.sharding import ShardedTrainer, _untied


def stand_in(kind: str, plugin=None, parallelism=None, policy=None, **args):
    """A trainer as `check_engine` looks at one."""
    given = {"fsdp": False, "deepspeed": None, "target_kl": None, **args}
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind), state=state, parallelism_config=parallelism
    )
    fake = SimpleNamespace(
        args=SimpleNamespace(**given),
        accelerator=accelerator,
        model=nn.Linear(2, 2) if policy is None else policy,
        is_fsdp_enabled=plugin is not None,
        is_deepspeed_enabled=kind == "DEEPSPEED",
    )
    for name in ("_check_fsdp", "_check_deepspeed"):
        setattr(fake, name, getattr(ShardedTrainer, name).__get__(fake))
    return fake


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A plugin writes what it was told into the environment, from where the next one reads it."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "False")


def plugin(**options):
    options = {"cpu_ram_efficient_loading": False, **options}
    return FullyShardedDataParallelPlugin(fsdp_version=2, **options)


def test_ddp_does_not_pose_as_an_engine(monkeypatch):
    """Accelerate on a CPU trains DDP when it is asked for FSDP, and says nothing."""
    check = ShardedTrainer.check_engine
    for fake in (
        stand_in("MULTI_CPU", plugin(), fsdp=True),
        stand_in("MULTI_CPU", None, fsdp=True),
        stand_in("NO", None, fsdp=True),
    ):
        with pytest.raises(ValueError, match="fsdp: expected .* got .* hold all parameters"):
            check(fake)
    with pytest.raises(ValueError, match="deepspeed: expected .* got MULTI_CPU"):
        check(stand_in("MULTI_CPU", deepspeed="zero3.json"))
    check(stand_in("MULTI_CPU"))
    # as `accelerate launch` says it
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp: expected"):
        check(stand_in("MULTI_CPU"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="deepspeed: expected"):
        check(stand_in("NO"))


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (
            lambda: stand_in("FSDP", FullyShardedDataParallelPlugin(fsdp_version=1), fsdp=True),
            "fsdp_config: expected version 2, got 1",
        ),
        (
            lambda: stand_in("FSDP", plugin(cpu_ram_efficient_loading=True), fsdp=True),
            "fsdp_config: expected cpu_ram_efficient_loading False",
        ),
        (
            lambda: stand_in("MULTI_GPU", parallelism=SimpleNamespace(cp_size=2)),
            "parallelism_config: expected cp_size = 1, got 2",
        ),
        (
            lambda: stand_in("DEEPSPEED", deepspeed={"a": 1}, target_kl=0.1),
            "target_kl: expected None under DeepSpeed, got 0.1",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(fake, message):
    with pytest.raises(ValueError, match=message):
        ShardedTrainer.check_engine(fake())


def test_packed_bits_that_would_stay_whole_are_refused():
    class Params4bit(nn.Parameter):
        pass

    policy = nn.Module()
    policy.weight = Params4bit(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="model: expected bnb_4bit_quant_storage of a float"):
        ShardedTrainer.check_engine(stand_in("FSDP", plugin(), policy=policy, fsdp=True))


def test_a_model_in_shards_already_is_refused():
    policy = nn.Linear(2, 2)
    policy.weight.ds_id, policy.weight.ds_status = 1, None
    with pytest.raises(ValueError, match="model: expected whole weights"):
        ShardedTrainer.check_engine(stand_in("DEEPSPEED", policy=policy))


def test_losses_and_logprobs_are_not_rounded_to_bf16():
    """Accelerate's policy for bf16 casts what a forward returns, and adds gradients up in bf16."""
    found = plugin()
    found.set_mixed_precision("bf16")
    assert found.mixed_precision_policy.output_dtype == torch.bfloat16
    ShardedTrainer.check_engine(stand_in("FSDP", found, fsdp=True))
    assert found.mixed_precision_policy.output_dtype is None
    assert found.mixed_precision_policy.reduce_dtype == torch.float32
    assert found.mixed_precision_policy.param_dtype == torch.bfloat16


def of_head(policy, loss_type: str = "dapo", fsdp: bool = True, quantile: float = 1.0, **args):
    given = {"head_sharding": "vocabulary", "target_kl": None, **args}
    window = SimpleNamespace(window=loss_type != "bnpo")
    config = SimpleNamespace(preset=window, loss_type=loss_type, top_entropy_quantile=quantile)
    return SimpleNamespace(
        args=SimpleNamespace(**given),
        accelerator=SimpleNamespace(num_processes=2),
        is_fsdp_enabled=fsdp,
        loss_config=config,
        model=policy,
    )


def test_a_split_head_where_it_would_be_wrong_is_refused():
    import peft

    adapted = peft.LoraConfig(target_modules=["lm_head"], r=2)
    copied = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
    for fake, message in (
        (of_head(model(), fsdp=False), "head_sharding: expected None without FSDP2"),
        (of_head(model(), "bnpo"), "head_sharding: expected None for loss_type 'bnpo'"),
        (of_head(model(), target_kl=0.1), "target_kl: expected None with head_sharding"),
        (of_head(model(), quantile=0.2), "top_entropy_quantile: expected 1"),
        (of_head(model(tie_word_embeddings=True)), "expected None with tied embeddings"),
        (of_head(peft.get_peft_model(model(), adapted)), "None with an adapter on the lm_head"),
        (of_head(peft.get_peft_model(model(), copied)), "None with an adapter on the lm_head"),
    ):
        with pytest.raises(ValueError, match=message):
            HeadSharding(fake)
    HeadSharding(of_head(model()))


def test_another_word_for_head_sharding_is_refused(tmp_path):
    with pytest.raises(ValueError, match="head_sharding: expected None or 'vocabulary'"):
        trainer(tmp_path, head_sharding="rows")
    with pytest.raises(ValueError, match="head_sharding: expected None without FSDP2"):
        trainer(tmp_path, head_sharding="vocabulary")


def test_a_model_that_nothing_shards_is_left_alone():
    policy = model()
    before = copy.deepcopy(policy.state_dict())
    reshard(policy)
    with whole(policy):
        assert not is_sharded(policy)
    assert full_state(policy).keys() == before.keys()
    other = model(1)
    load_full_state(other, before)
    assert all(torch.equal(other.state_dict()[n], t) for n, t in before.items())


def test_the_digest_of_a_model_is_that_before_an_engine_took_it():
    policy = model()
    digest = model_digest(policy)
    policy.__class__ = type("FSDP" + type(policy).__name__, (type(policy),), {})
    layers = policy.model.layers
    for i in range(len(layers)):
        wrapper = nn.Module()
        wrapper._checkpoint_wrapped_module = layers[i]
        layers[i] = wrapper
    first = policy.model.embed_tokens.weight
    first.ds_shape, first.data = first.shape, torch.empty(0)
    assert model_digest(policy) == digest


def test_a_reference_moves_under_a_wrapper_for_checkpointing():
    policy = model()
    reference = ReferencePolicy(policy, peft=False)
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    policy.model.layers[0] = checkpoint_wrapper(policy.model.layers[0])
    with torch.no_grad():
        policy.model.norm.weight.add_(1)
    reference.sync(policy, 0.5)
    moved = reference.model.model.norm.weight
    assert torch.allclose(moved, policy.model.norm.weight - 0.5)


def test_a_tied_weight_is_saved_once():
    policy = model(tie_word_embeddings=True)
    state = dict(policy.state_dict())
    assert "lm_head.weight" in state
    assert "lm_head.weight" not in _untied(policy, state)
    plain = model()
    assert _untied(plain, plain.state_dict()).keys() == plain.state_dict().keys()


def test_a_stage_is_just_run_by_one_process():
    fake = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    assert ShardedTrainer.on_every_rank(fake, "a stage", lambda: 7) == 7
