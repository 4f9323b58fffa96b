"""Tensors that a loss makes for itself lie where its data lie, whatever the default device is."""

import pytest
import torch
from loss_cases import make_case, preset_config

from grpo_fast import PRESETS, linear_policy_loss, policy_loss
from grpo_fast.models.policy import attach

OPTIONS = {
    "on_policy": {},
    "old": {},
    "kl": {"beta": 0.1},
    "bonus": {"entropy_coef": 0.01},
    "drift": {"off_policy_mask_threshold": 0.05},
}


def answers(loss_type: str, name: str) -> list[torch.Tensor]:
    """Loss, metrics and gradients of both losses, NaN as 0."""
    case = make_case()
    options = {
        "mask": case.mask,
        "old_logp": None if name == "on_policy" else case.old_logp,
        "ref_logp": case.ref_logp if name == "kl" else None,
        "config": preset_config(loss_type, **OPTIONS[name]),
    }
    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
    loss, metrics = linear_policy_loss(*leaves, case.ids, case.advantages, **options)
    loss.backward()
    logits = (case.hidden @ case.weight.T).detach().requires_grad_()
    other, _ = policy_loss(logits, case.ids, case.advantages, **options)
    other.backward()
    out = [loss, *metrics.values(), *(leaf.grad for leaf in leaves), other, logits.grad]
    return [torch.nan_to_num(t.detach()) for t in out]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("loss_type", PRESETS)
def test_no_gradient_is_lost_to_the_default_device(loss_type, name):
    want = answers(loss_type, name)
    # what is made on the default device holds no numbers: a write through it is lost in silence
    case = make_case()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "make_case", lambda: case)
        with torch.device("meta"):
            got = answers(loss_type, name)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.device == theirs.device and torch.equal(ours, theirs)


def test_attach_makes_its_noise_on_the_host():
    from tiny_trainer import model

    policy = model()
    with torch.device("meta"):
        attach(policy)
