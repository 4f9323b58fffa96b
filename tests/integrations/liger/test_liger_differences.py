"""Where `integrations/liger.py` differs from Liger-Kernel, and what it refuses: each line of
docs/liger.md."""

from types import SimpleNamespace

import pytest
import torch
from liger_cases import Options, data, exact, linear, truth
from liger_parity import BOUND, FORWARD, agree, distance, liger
from loss_cases import relative

from grpo_fast.integrations import rollout_ratio
from grpo_fast.integrations.liger.linear import LigerFusedLinearGRPOLoss
from grpo_fast.integrations.liger.logits import triton_grpo_loss


def test_luspo_sums_the_unmasked_tokens_and_liger_spreads_a_length():
    """Liger 0.8.5: (token_loss * length).sum() / (B T), with what is in the masked places."""
    theirs = liger("LigerFusedLinearGRPOLoss")
    o, d = Options("luspo", "token", delta=None), data(0.0)
    ours, other = linear(LigerFusedLinearGRPOLoss, o, data()), linear(theirs, o, d)
    agree(ours, truth(o, data()), o)
    ratio = _policy_ratio(o, d)
    advantages = d.advantages.double()[:, None]
    plain = ratio * advantages
    tokens = -torch.minimum(plain, ratio.clamp(0.8, 1.28) * advantages)
    spread = (tokens * d.mask.sum(1, keepdim=True)).mean()
    assert distance("loss", other["loss"], spread) < BOUND
    assert distance("loss", ours["loss"], (tokens * d.mask).sum() / 4) < BOUND
    assert abs(spread - ours["loss"]) > 0.1


def _policy_ratio(o, d):
    e = exact(o, d)
    return (e.logp.detach() - e.old).exp()


def call(**more):
    """One call of the class on the batch with NaN; forward's arguments by name, or options."""
    d = data()
    arguments = {name: more.pop(name) for name, _ in FORWARD if name in more}
    base = {"_input": d.hidden, "lin_weight": d.weight, "selected_token_ids": d.ids}
    base |= {"attention_mask": d.mask, "advantages": d.advantages}
    more = {"beta": 0.0, "use_ref_model": False, "compiled": False} | more
    return LigerFusedLinearGRPOLoss(**more)(**(base | arguments))


def test_masked_places_may_hold_anything_and_liger_reads_them():
    assert call()[0].isfinite()
    theirs = liger("LigerFusedLinearGRPOLoss")
    d = data(0.0)
    d.hidden[~d.mask] = torch.nan
    loss, _ = theirs(beta=0.0, use_ref_model=False, compiled=False)(
        d.hidden, d.weight, d.ids, d.mask, d.advantages
    )
    assert loss.isnan()


def test_ids_outside_the_vocabulary_are_refused_and_liger_takes_them():
    d = data(0.0)
    d.ids[0, 0] = 77
    with pytest.raises(ValueError, match=r"^selected_token_ids: expected token ids in \[0, 77\)"):
        call(selected_token_ids=d.ids)
    theirs = liger("LigerFusedLinearGRPOLoss")(beta=0.0, use_ref_model=False, compiled=False)
    assert theirs(d.hidden, d.weight, d.ids, d.mask, d.advantages)[0].isfinite()


def test_no_gradient_is_computed_under_no_grad():
    from torch.utils.flop_counter import FlopCounterMode

    d = data()
    weight = d.weight.clone().requires_grad_()
    function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    products = []
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted), FlopCounterMode(display=False) as counter:
            loss, _ = function(d.hidden, weight, d.ids, d.mask, d.advantages)
        assert loss.requires_grad == wanted
        products.append(counter.get_total_flops() / (2 * d.mask.sum().item() * weight.numel()))
    assert products == [2.0, 1.0]


def test_references_get_no_gradient():
    d = data()
    weight = d.weight.clone().requires_grad_()
    ref = [t.clone().requires_grad_() for t in (d.ref_hidden, d.ref_weight, d.ref_bias)]
    names = ("ref_input", "ref_weight", "ref_bias")
    more = dict(zip(names, ref, strict=True))
    loss, _ = call(lin_weight=weight, beta=0.1, use_ref_model=True, **more)
    loss.backward()
    assert weight.grad.any() and [t.grad for t in ref] == [None] * 3


def test_more_than_65535_tokens():
    T = 65_537
    logits = torch.randn(1, T + 1, 2, requires_grad=True)
    ids = torch.randint(2, (1, T))
    out, kl, _ = triton_grpo_loss(logits, None, None, ids, torch.ones(1), beta=0.0)
    assert out.shape == (1, T) and kl is None
    loss, _ = triton_grpo_loss(logits, None, None, ids, torch.ones(1), beta=0.0, reduce=True)
    loss.backward()
    assert abs(loss.item() + 1) < 1e-6 and logits.grad[0, T - 1].any()


def test_bound_of_cispo_is_the_ratio_itself():
    d = data()
    o = Options("cispo", "token")
    share = (_policy_ratio(o, data(0.0)) > 1.2) & (d.advantages[:, None] > 0) & d.mask
    more = {"loss_type": "cispo", "epsilon_high": 1.2, "temperature": 0.9}
    _, (clipped,) = call(old_per_token_logps=d.old_logp, **more)
    assert share.any() and clipped.item() == pytest.approx(share.sum().item() / 16)


REFUSED = [
    ({"loss_type": "gspo"}, "loss_type: expected one of grpo, bnpo"),
    (
        {"importance_sampling_level": "sequence_token"},
        "importance_sampling_level: expected token or",
    ),
    ({"delta": 1.1}, "delta: expected a finite number > 1.2"),
    ({"delta": 2.0, "loss_type": "cispo"}, "delta: expected None: cispo"),
    ({"delta": 2.0, "loss_type": "sapo"}, "delta: expected None: sapo"),
    ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, "sapo_temperature_pos: expected"),
    ({"loss_type": "sapo", "sapo_temperature_neg": -1.0}, "sapo_temperature_neg: expected"),
    ({"temperature": 0.0}, "temperature: expected"),
    ({"loss_type": "dr_grpo"}, "max_completion_length: expected a number of tokens: dr_grpo"),
    ({"use_ref_model": True}, "ref_per_token_logps: expected them or ref_input"),
    ({"vllm_is_ratio": torch.ones(4, 2)}, r"vllm_is_ratio: expected tensor \(4,\), \(4, 1\) or"),
    ({"attention_mask": torch.ones(4, 3)}, "attention_mask: expected"),
    ({"old_per_token_logps": torch.ones(4, 3)}, "old_per_token_logps: expected"),
    ({"epsilon_low": -0.1}, "epsilon_low: expected"),
]
REFUSED += [
    ({"loss_type": name, "importance_sampling_level": "sequence"}, f"importance_.*token for {name}")
    for name in ("cispo", "sapo", "vespo")
]
REFUSED += [
    ({"beta": -0.1, "use_ref_model": True}, "beta: expected"),
]


@pytest.mark.parametrize("more, message", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_refused_is_named(more, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**more)


def test_function_names_its_own_arguments():
    d = data()
    logits = torch.randn(4, 10, 77)
    for change, message in (
        ({"eps_high": -1.0}, "eps_high: expected"),
        ({"completion_ids": d.ids[:, 1:]}, r"completion_ids: expected integer .* \(4, 9\)"),
        ({"completion_mask": d.mask[:, 1:]}, r"completion_mask: expected tensor \(4, 9\)"),
        ({"old_logp": d.old_logp[:, 1:]}, r"old_logp: expected .* \(4, 9\)"),
        ({"logits": logits[0]}, r"logits: expected tensor \(B, L\+1, V\)"),
        ({"ref_logp": None, "beta": 0.1}, "ref_logp: expected"),
    ):
        base = {"logits": logits, "old_logp": None, "ref_logp": None, "completion_ids": d.ids}
        base |= {"advantages": d.advantages, "completion_mask": d.mask, "beta": 0.0}
        with pytest.raises(ValueError, match=f"^{message}"):
            triton_grpo_loss(**(base | change))


def test_no_reference_model_is_a_kl_of_zero():
    d = data()
    loss, (kl, clip_ratio) = call(beta=0.3, ref_per_token_logps=d.ref_logp)
    assert kl.item() == 0.0 and loss.item() == call()[0].item() and clip_ratio.item() == 0.0


def test_two_references_warn_and_log_probs_win():
    d = data()
    more = {"beta": 0.3, "use_ref_model": True, "ref_per_token_logps": d.ref_logp}
    want = call(**more)[0]
    with pytest.warns(UserWarning, match="^ref_input: not used"):
        assert call(ref_input=d.ref_hidden, ref_weight=d.ref_weight, **more)[0].equal(want)


def test_compiled_and_chunk_size_change_nothing():
    want = call()[0]
    assert call(compiled=True)[0].equal(want) and call(chunk_size=3)[0].equal(want)


def test_attributes_are_read_at_each_call():
    d = data()
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
    assert isinstance(loss, torch.nn.Module) and not list(loss.parameters())
    loss.loss_type, loss.max_completion_length = "dr_grpo", 12
    got, metrics = loss(d.hidden, d.weight, d.ids, d.mask, d.advantages)
    assert got.equal(call(loss_type="dr_grpo", max_completion_length=12)[0])
    assert isinstance(metrics, tuple) and len(metrics) == 1


@pytest.mark.parametrize(
    "loss_type", ["dapo", "cispo", "vespo", "grpo", "bnpo", "luspo", "dr_grpo"]
)
@pytest.mark.parametrize("items", [None, 40, torch.tensor(40), torch.tensor(0)])
def test_denominators_of_two_processes(monkeypatch, loss_type, items):
    """dapo, cispo and vespo divide by the window's tokens, or by those of all ranks, over the world
    size; the others by what this call holds."""

    def all_reduce(tensor, op=None):
        # the other rank has 10 tokens
        tensor.add_(10)

    ranks = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "all_reduce": all_reduce}
    fake = SimpleNamespace(is_available=lambda: True, **ranks)
    alone = call(loss_type=loss_type, max_completion_length=12)[0]
    monkeypatch.setattr(rollout_ratio, "dist", fake)
    got = call(loss_type=loss_type, max_completion_length=12, num_items_in_batch=items)[0]
    tokens = {None: 26, 40: 40}.get(items, 40) if not isinstance(items, torch.Tensor) else items
    factor = 16 / max(float(tokens) / 2, 1) if loss_type in ("dapo", "cispo", "vespo") else 1.0
    assert got.item() == pytest.approx(alone.item() * factor, rel=1e-6)
    theirs = liger("LigerFusedLinearGRPOLoss")
    for name, function in ranks.items():
        monkeypatch.setattr(torch.distributed, name, function)
    d = data(0.0, lengths=(9, 1, 0, 6))
    other = theirs(
        beta=0.0, use_ref_model=False, compiled=False, loss_type=loss_type, max_completion_length=12
    )(d.hidden, d.weight, d.ids, d.mask, d.advantages, num_items_in_batch=items)[0]
    if loss_type != "luspo":
        assert got.item() == pytest.approx(other.item(), rel=BOUND)


def test_a_token_of_ratio_zero_is_left_out_of_the_clip_ratio():
    d = data()
    more = {"old_per_token_logps": d.old_logp, "temperature": 0.9}
    ones = torch.ones_like(d.old_logp)
    _, (whole,) = call(vllm_is_ratio=ones, **more)
    loss, (clipped,) = call(vllm_is_ratio=0 * ones, **more)
    assert whole > 0 and clipped == 0 and loss == 0


def test_second_backward_is_refused():
    loss, _ = call(lin_weight=data().weight.requires_grad_())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        loss.backward()


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_a_weight_of_another_dtype_is_cast_like_in_liger(dtypes):
    def gradients(function, d):
        hidden = d.hidden.to(dtypes[0]).requires_grad_()
        weight = d.weight.to(dtypes[1]).requires_grad_()
        loss = function(beta=0.0, use_ref_model=False, compiled=False)
        loss(hidden, weight, d.ids, d.mask, d.advantages)[0].backward()
        assert hidden.grad.dtype == dtypes[0] and weight.grad.dtype == dtypes[1]
        return hidden.grad, weight.grad

    ours = gradients(LigerFusedLinearGRPOLoss, data())
    other = gradients(liger("LigerFusedLinearGRPOLoss"), data(0.0))
    assert all(relative(a, b) < 2e-2 for a, b in zip(ours, other, strict=True))


@pytest.mark.parametrize("leaf", [True, False])
def test_inplace_writes_over_logits_that_are_no_leaf(leaf):
    d = data(0.0)
    parameter = torch.randn(4, 10, 77).requires_grad_()
    logits = parameter if leaf else parameter * 1.0
    before = logits.detach().clone()
    args = (None, None, d.ids, d.advantages, d.mask)
    # the gradient is there when the call returns, not after backward as with Liger
    loss, _ = triton_grpo_loss(logits, *args, beta=0.0, reduce=True)
    assert torch.equal(logits.detach(), before) == leaf
    loss.backward()
    kept = parameter.detach().clone().requires_grad_()
    plain, _ = triton_grpo_loss(kept * 1.0, *args, beta=0.0, reduce=True, inplace=False)
    plain.backward()
    assert loss.equal(plain) and parameter.grad.equal(kept.grad)


def test_no_mask_means_every_token():
    d = data(0.0, lengths=(5, 5))
    logits = torch.randn(2, 6, 77)
    args = (logits, None, None, d.ids, d.advantages)
    for reduce in (True, False):
        got = triton_grpo_loss(*args, beta=0.0, reduce=reduce)[0]
        want = triton_grpo_loss(*args, d.mask, beta=0.0, reduce=reduce)[0]
        assert got.equal(want) and got.isfinite().all()


def test_dr_grpo_of_the_function_divides_by_the_width_by_default():
    d = data(0.0)
    args = (torch.randn(4, 10, 77), None, None, d.ids, d.advantages, d.mask)
    more = {"beta": 0.0, "loss_type": "dr_grpo", "reduce": True}
    want = triton_grpo_loss(*args, max_completion_length=9, **more)[0]
    assert triton_grpo_loss(*args, **more)[0].equal(want)


def test_kl_metric_is_the_plain_estimate_and_that_of_liger_the_product():
    o = Options("dapo", "token", 0.3, True)
    want = truth(o, data())
    ours = linear(LigerFusedLinearGRPOLoss, o, data())["weighted_kl"]
    other = linear(liger("LigerFusedLinearGRPOLoss"), o, data(0.0))["weighted_kl"]
    assert distance("kl", ours, want["kl"]) < BOUND
    assert distance("kl", other, want["weighted_kl"]) < BOUND
    assert abs(ours - other) > 0.001


def test_a_mask_of_fractions_counts_as_ones():
    d = data()
    assert call(attention_mask=0.5 * d.mask)[0].equal(call()[0])
    more = {"beta": 0.0, "use_ref_model": False, "compiled": False, "loss_type": "grpo"}
    theirs = liger("LigerFusedLinearGRPOLoss")(**more)
    d = data(0.0)
    whole, half = (
        theirs(d.hidden, d.weight, d.ids, m.float(), d.advantages)[0] for m in (d.mask, d.mask / 2)
    )
    assert abs(whole - half) > 0.01


def test_ratios_are_clamped_at_20_nats_and_those_of_liger_are_not():
    d = data(0.0)
    old = torch.where(d.mask, d.old_logp - 25.0, d.old_logp)
    more = {"old_per_token_logps": old, "epsilon_high": 1e12, "epsilon_low": 1.0}
    ours = call(**more)[0]
    theirs = liger("LigerFusedLinearGRPOLoss")
    more = {"epsilon_high": 1e12, "epsilon_low": 1.0, "compiled": False}
    args = (d.hidden, d.weight, d.ids, d.mask, d.advantages)
    other = theirs(beta=0.0, use_ref_model=False, **more)(*args, old_per_token_logps=old)[0]
    assert ours.isfinite() and other.abs() > 50 * ours.abs()


def test_vespo_with_a_ratio_scores_the_policy_where_nobody_did():
    from torch.utils.flop_counter import FlopCounterMode

    d = data()
    o = Options("vespo", "token")
    function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, **_keywords(o))
    args = (d.hidden, d.weight, d.ids, d.mask, d.advantages)
    products = []
    for old in (d.old_logp, None):
        with FlopCounterMode(display=False) as counter:
            function(*args, old_per_token_logps=old, vllm_is_ratio=d.ratios["BT"])
        products.append(counter.get_total_flops() / (2 * d.mask.sum().item() * d.weight.numel()))
    assert products == [1.0, 2.0]


def _keywords(o):
    keywords = o.keywords
    del keywords["beta"]
    return keywords


def test_the_decay_of_vespo_is_at_least_1e_4_as_in_liger():
    d = data(0.0)
    args = (d.hidden, d.weight, d.ids, d.mask, d.advantages)
    more = {"beta": 0.0, "use_ref_model": False, "compiled": False, "loss_type": "vespo"}
    more |= {"vespo_lambda_pos": 0.0, "vespo_lambda_neg": -1.0}
    ours, other = (
        function(**more)(*args, old_per_token_logps=d.old_logp)[0]
        for function in (LigerFusedLinearGRPOLoss, liger("LigerFusedLinearGRPOLoss"))
    )
    assert distance("loss", ours, other) < BOUND
