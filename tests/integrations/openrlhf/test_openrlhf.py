"""The adapter for OpenRLHF: its own Actor on tiny models, with its forward and with ours.

Where openrlhf is missing the file is skipped; `make test-openrlhf` has it.
"""

from __future__ import annotations

import copy
import importlib
import sys
from importlib import metadata

import pytest
import torch

pytest.importorskip("openrlhf", reason="needs openrlhf, which `make test-openrlhf` lays over")
import openrlhf.models
import openrlhf_cases as cases
from openrlhf.models import Actor, PolicyLoss

from grpo_fast import linear_logprob
from grpo_fast.integrations.openrlhf import actor as adapter
from grpo_fast.integrations.openrlhf import head as openrlhf_head

BOUND = 1e-5
FAMILIES = ("Qwen3", "Gemma2", "Granite", "Cohere", "Phi", "MiniCPM3")


@pytest.fixture(autouse=True)
def stock_again():
    yield
    Actor.forward = adapter._STOCK
    adapter.uninstall()


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many rows each call of linear_logprob was asked for."""
    rows: list[int] = []

    def counting(*args, mask=None, **kwargs):
        rows.append(int(mask.sum()))
        return linear_logprob(*args, mask=mask, **kwargs)

    monkeypatch.setattr(adapter, "linear_logprob", counting)
    return rows


def both(one: Actor, **options) -> tuple[dict, dict]:
    """Results with OpenRLHF's forward, and with ours."""
    theirs = cases.scored(one, **options)
    adapter.install()
    return cases.scored(one, **options), theirs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_actor(family, packed, entropy, temperature, asked):
    """Log-probs, entropies and all gradients of families with every transform of a head."""
    one = cases.actor(family, packed=packed, temperature=temperature)
    ours, theirs = both(one, entropy=entropy)
    far = cases.distances(ours, theirs)
    assert max(far.values()) <= BOUND, far
    assert ours["logp"].any() and set(far) >= {"logp", "gradients"} | (
        {"entropy"} if entropy else set()
    )
    # no row that is not an action
    assert asked == [int(cases.batch()["action_mask"].sum())]


@pytest.mark.parametrize("packed", [False, True])
def test_lora(packed):
    one = cases.actor(packed=packed, lora=True, temperature=0.8)
    ours, theirs = both(one)
    assert any("lora_A" in name for name in ours)
    assert all("lora" in name for name in ours if name.startswith("grad "))
    far = cases.distances(ours, theirs)
    assert max(far.values()) <= BOUND, far


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    one = cases.actor(lora=True)
    one.gradient_checkpointing_enable({"use_reentrant": reentrant})
    one.train()
    ours, theirs = both(one)
    far = cases.distances(ours, theirs)
    assert max(far.values()) <= BOUND, far


def test_bf16_from_a_checkpoint(tmp_path):
    """By OpenRLHF's own constructor; ours is what fp32 makes of the same bf16 hidden states, and
    OpenRLHF's is off by the rounding of the logits."""
    cases.actor("Qwen3Moe").model.save_pretrained(tmp_path)
    options = {"attn_implementation": "sdpa", "temperature": 0.8, "lora_rank": 4}
    one, data = Actor(str(tmp_path), **options, target_modules=["q_proj"]), cases.batch()
    lm, mask = one.model.get_base_model(), data["action_mask"]
    with torch.no_grad():
        theirs = one(**data)
        seen = data["attention_mask"]
        positions = (seen.cumsum(1) - 1).masked_fill(seen == 0, 1)
        hidden = lm.model(data["sequences"], seen, positions).last_hidden_state
        logits = hidden.float() @ lm.lm_head.weight.float().T / 0.8
    targets = data["sequences"][:, 1:, None]
    exact = logits[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0][:, -cases.A :] * mask
    adapter.install()
    ours, output = one(**data, return_output=True, return_entropy=True)
    assert hidden.dtype == torch.bfloat16 and ours.dtype == torch.float32
    assert cases.distance(ours, exact) <= BOUND < cases.distance(theirs, exact)
    (ours.sum() + output.entropy.sum() + output.aux_loss).backward()
    trained = [p for p in one.parameters() if p.requires_grad]
    assert trained and all(torch.isfinite(p.grad).all() for p in trained)


@pytest.mark.parametrize("packed", [False, True])
def test_router_loss(packed):
    """The auxiliary loss of a mixture of experts is the model's own."""
    one = cases.actor("Qwen3Moe", packed=packed)
    ours, theirs = both(one)
    far = cases.distances(ours, theirs)
    assert "aux_loss" in far and max(far.values()) <= BOUND, far


@pytest.mark.parametrize("packed", [False, True])
def test_all_log_probs(packed):
    """return_logprobs, of SFT and DPO: every place but the last, padding included."""
    one, data = cases.actor("Gemma2", packed=packed, temperature=1.3), cases.batch()
    data.pop("action_mask")
    theirs = one(**data, return_logprobs=True)
    adapter.install()
    logp, output = one(**data, return_logprobs=True, return_output=True)
    assert cases.distance(logp, theirs) <= BOUND
    assert torch.equal(one(**data, return_logprobs=True), logp)
    assert output.logits is None


def test_without_gradients():
    """What the rollout's old and reference log-probs are made by."""
    one, data = cases.actor(), cases.batch()
    with torch.no_grad():
        theirs = one(**data)
        adapter.install()
        ours = one(**data)
    assert not ours.requires_grad and cases.distance(ours, theirs) <= BOUND
    assert not ours[data["action_mask"] == 0].any()


def test_a_mask_of_fractions_is_a_factor():
    one, data = cases.actor(), cases.batch()
    data["action_mask"] = data["action_mask"] * 0.5
    with torch.no_grad():
        theirs = one(**data)
        adapter.install()
        assert cases.distance(one(**data), theirs) <= BOUND


def test_logits_come_from_the_stock_forward(asked):
    one, data = cases.actor(temperature=0.5), cases.batch()
    data.pop("action_mask")
    theirs = one(**data, return_output=True)
    adapter.install()
    ours = one(**data, return_output=True)
    assert torch.equal(ours.logits, theirs.logits) and asked == []


@pytest.mark.parametrize("why", ["is_vlm", "ring_attn_group"])
def test_images_and_rings_go_to_the_stock_forward(why, monkeypatch):
    one, data, calls = cases.actor(), cases.batch(), []
    monkeypatch.setattr(adapter, "_STOCK", lambda self, *a, **kw: calls.append((a, kw)))
    monkeypatch.setattr(Actor, "forward", adapter._forward)
    ring = object() if why == "ring_attn_group" else None
    one.is_vlm = why == "is_vlm"
    given = {"return_output": True, "allgather_logits": 1, "return_logprobs": 2}
    more = {"packed_seq_lens": [3], "return_entropy": 4, "pixel_values": 5}
    one(*data.values(), **given, **more, ring_attn_group=ring)
    ((args, kwargs),) = calls
    assert args[:3] == tuple(data.values()) and kwargs == {"pixel_values": 5}
    assert args[3:] == (True, 1, 2, ring, [3], 4)


def test_the_model_is_as_before():
    """Its forward and its head's are only lent, also when the call fails."""
    one, data = cases.actor(), cases.batch()
    adapter.install()
    lm = one.model
    kept = lm.lm_head.forward = lambda hidden: torch.nn.Linear.forward(lm.lm_head, hidden)
    one(**data)
    assert "forward" not in lm.__dict__ and lm.lm_head.__dict__["forward"] is kept
    data["sequences"][0, -1] = cases.V
    with pytest.raises((IndexError, ValueError)):
        one(**data)
    assert "forward" not in lm.__dict__ and lm.lm_head.__dict__["forward"] is kept


def test_an_unknown_head_is_refused():
    one = cases.actor("Gemma2")
    # what its config says is not what its forward does any more
    inner = type(one.model).forward

    def tripled(self, *args, **kwargs):
        output = inner(self, *args, **kwargs)
        output.logits = output.logits * 3
        return output

    one.model.forward = tripled.__get__(one.model)
    adapter.install()
    for _ in range(2):
        with pytest.raises(ValueError, match="its head does something unknown"):
            one(**cases.batch())


def test_the_head_is_checked_once(monkeypatch):
    checked = []
    monkeypatch.setattr(openrlhf_head, "check_head", lambda lm, head: checked.append(lm))
    one, data = cases.actor(lora=True), cases.batch()
    adapter.install()
    for _ in range(3):
        one(**data)
    assert len(checked) == 1


def test_a_model_that_does_not_call_its_head_is_refused():
    one, data = cases.actor(), cases.batch()
    adapter.install()
    one(**data)
    one.model.forward = lambda *args, **kwargs: {"logits": torch.zeros(4, 14, 97)}
    with pytest.raises(ValueError, match="one call of the output embedding, got 0 calls"):
        one(**data)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"attention_mask": None}, r"attention_mask: expected a tensor \(4, 14\), got None"),
        (
            {"action_mask": torch.ones(4, 14)},
            r"action_mask: expected a tensor \(4, A\) with A < 14",
        ),
        ({"return_entropy": True}, "return_entropy: expected return_output=True"),
    ],
)
def test_bad_calls(changes, match):
    one = cases.actor()
    adapter.install()
    with pytest.raises(ValueError, match=match):
        one(**{**cases.batch(), **changes})


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("autotp_size", 2, "ds.tensor_parallel_size: expected 1, got 2"),
        ("is_deepcompile_enabled", True, "ds.deepcompile: expected False"),
    ],
)
def test_what_deepspeed_must_not_do(name, value, match):
    one = cases.actor()
    setattr(one.model, name, lambda: value)
    adapter.install()
    with pytest.raises(ValueError, match=match):
        one(**cases.batch())


def test_install_and_uninstall():
    stock = Actor.forward
    adapter.install()
    adapter.install("cispo", epsilon_high=4.0)
    assert Actor.forward is adapter._forward
    assert openrlhf.models.PolicyLoss is openrlhf.models.loss.PolicyLoss is not PolicyLoss
    assert openrlhf.models.PolicyLoss().loss_config.ratio_bounds == (0.0, 4.0)
    adapter.install()
    assert openrlhf.models.PolicyLoss is PolicyLoss and Actor.forward is adapter._forward
    adapter.uninstall()
    adapter.uninstall()
    assert Actor.forward is stock and openrlhf.models.loss.PolicyLoss is PolicyLoss


def test_does_not_undo_somebody_else():
    other = Actor.forward = lambda self: None
    for call in (adapter.install, adapter.uninstall):
        with pytest.raises(ValueError, match=r"Actor\.forward has been replaced"):
            call()
    assert Actor.forward is other


def _again(patch: pytest.MonkeyPatch):
    """Import the module anew; the one that others hold stays."""
    patch.delitem(sys.modules, "grpo_fast.integrations.openrlhf.actor")
    return importlib.import_module("grpo_fast.integrations.openrlhf.actor")


def test_without_openrlhf(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "openrlhf"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"with openrlhf 0\.11\.2 \(pip install openrlhf==0"):
        _again(monkeypatch)


def test_with_another_openrlhf(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.12.0")
    with pytest.warns(UserWarning, match=r"openrlhf 0\.11\.2; 0\.12\.0 is installed and untested"):
        _again(monkeypatch)


def test_with_an_openrlhf_without_the_functions(monkeypatch):
    monkeypatch.delattr("openrlhf.models.ring_attn_utils.unpad_and_slice_tensor")
    with pytest.raises(ImportError, match=r"works with openrlhf 0\.11\.2"):
        _again(monkeypatch)


def test_actors_copied_after_install_are_whole():
    """An EMA model is a copy of the weights: nothing of a call stays in a model."""
    one = cases.actor()
    adapter.install()
    first = one(**cases.batch())
    assert torch.equal(copy.deepcopy(one)(**cases.batch()), first)
