"""`integrations/liger.py` against float64 for every option, and against Liger-Kernel itself where
that is installed. The tests of its Triton function are in `test_triton_liger.py`."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from liger_cases import (
    KINDS,
    Options,
    data,
    exact,
    from_logits,
    linear,
    options,
    token_truth,
    truth,
)
from liger_parity import compare, distance, liger
from loss_cases import relative

from grpo_fast.integrations import rollout_ratio
from grpo_fast.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

BOUND = 1e-5
# (name, default) in the order of Liger 0.8.5
CONSTRUCTOR = (
    ("beta", 0.04),
    ("compiled", True),
    ("use_ref_model", True),
    ("chunk_size", 1),
    ("epsilon_low", 0.2),
    ("epsilon_high", 0.2),
    ("loss_type", "dapo"),
    ("max_completion_length", None),
    ("importance_sampling_level", "token"),
    ("sapo_temperature_pos", 1.0),
    ("sapo_temperature_neg", 1.05),
    ("temperature", 1.0),
    ("delta", None),
    ("use_bias_correction_kl", False),
    ("vespo_k_pos", 2.0),
    ("vespo_lambda_pos", 3.0),
    ("vespo_k_neg", 3.0),
    ("vespo_lambda_neg", 2.0),
)
REQUIRED = inspect.Parameter.empty
FORWARD = tuple(
    (name, REQUIRED)
    for name in ("_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages")
) + tuple(
    (name, None)
    for name in ("bias", "ref_per_token_logps", "old_per_token_logps", "ref_input", "ref_weight")
    + ("ref_bias", "vllm_is_ratio", "num_items_in_batch")
)
FUNCTION = (
    *((n, REQUIRED) for n in ("logits", "old_logp", "ref_logp", "completion_ids", "advantages")),
    ("completion_mask", None),
    ("temperature", 0.9),
    ("beta", 0.04),
    ("eps_low", 0.2),
    ("eps_high", 0.4),
    ("inplace", True),
    ("loss_type", "dapo"),
    ("max_completion_length", None),
    ("importance_sampling_level", "token"),
    ("reduce", False),
    ("sapo_temperature_pos", 1.0),
    ("sapo_temperature_neg", 1.05),
    ("vllm_is_ratio", None),
    ("delta", None),
    ("use_bias_correction_kl", False),
    ("num_items_in_batch", None),
    *CONSTRUCTOR[-4:],
)


def signature(function) -> tuple:
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return tuple((p.name, p.default) for p in parameters if p.name != "self")


def agree(got: dict, want: dict, context) -> None:
    for name, value in got.items():
        if value is None:
            assert want[name] is None, (name, context)
            continue
        # the metric is that of the plain estimate, see docs/liger.md
        name = "kl" if name == "weighted_kl" and name not in want else name
        assert distance(name, value, want[name]) <= BOUND, (name, context)


def test_signatures_are_the_recorded_ones():
    assert signature(LigerFusedLinearGRPOLoss) == CONSTRUCTOR
    assert signature(LigerFusedLinearGRPOLoss.forward) == FORWARD
    assert signature(triton_grpo_loss) == FUNCTION


def test_signatures_are_those_of_liger():
    theirs = liger("LigerFusedLinearGRPOLoss")
    assert signature(theirs) == CONSTRUCTOR
    assert signature(theirs.forward) == FORWARD
    assert signature(liger("triton_grpo_loss")) == FUNCTION


@pytest.mark.parametrize("loss_type, level", KINDS)
def test_class_equals_float64(loss_type, level):
    d, clipped = data(), set()
    for o in options(loss_type, level):
        got = linear(LigerFusedLinearGRPOLoss, o, d)
        want = truth(o, d)
        plain = {("kl" if n == "weighted_kl" else n): value for n, value in got.items()}
        agree(plain, want, o)
        if o.old:
            clipped.add(got["clip_ratio"].item())
    bounded = loss_type not in ("sapo", "vespo")
    assert all(0 < share < 1 for share in clipped) if bounded else clipped == {0.0}


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("loss_type, level", KINDS)
def test_function_equals_float64(loss_type, level, reduce):
    d = data()
    for o in options(loss_type, level):
        if o.ref == "hidden":
            continue
        got = from_logits(triton_grpo_loss, o, d, reduce)
        if reduce and "weighted_kl" in got:
            got["kl"] = got.pop("weighted_kl")
        agree(got, (truth if reduce else token_truth)(o, d), o)


@pytest.mark.parametrize("loss_type, level", KINDS)
def test_class_equals_liger(loss_type, level):
    for name, row in compare(loss_type, level).items():
        assert max(row.values()) <= BOUND, (name, row)


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
    ({"delta": 1.1}, "delta must be a finite number > 1.2"),
    ({"delta": 2.0, "loss_type": "cispo"}, "delta: cispo"),
    ({"delta": 2.0, "loss_type": "sapo"}, "delta: sapo"),
    ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos must be"),
    ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg must be"),
    ({"temperature": 0.0}, "temperature must be"),
    ({"loss_type": "dr_grpo"}, "max_completion_length: dr_grpo"),
    ({"use_ref_model": True}, "ref_per_token_logps: expected them or ref_input"),
    ({"vllm_is_ratio": torch.ones(4, 2)}, r"vllm_is_ratio: expected tensor \(4,\), \(4, 1\) or"),
    ({"attention_mask": torch.ones(4, 3)}, "attention_mask: expected"),
    ({"old_per_token_logps": torch.ones(4, 3)}, "old_per_token_logps: expected"),
    ({"epsilon_low": -0.1}, "epsilon_low must be"),
]
REFUSED += [
    ({"loss_type": name, "importance_sampling_level": "sequence"}, f"importance_.*token for {name}")
    for name in ("cispo", "sapo", "vespo")
]
VESPO = {"loss_type": "vespo", "use_bias_correction_kl": True, "use_ref_model": True, "beta": 0.1}
REFUSED += [
    (VESPO, "use_bias_correction_kl: expected False for vespo"),
    ({"beta": -0.1, "use_ref_model": True}, "beta must be"),
]


@pytest.mark.parametrize("more, message", REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_refused_is_named(more, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**more)


def test_function_names_its_own_arguments():
    d = data()
    logits = torch.randn(4, 10, 77)
    for change, message in (
        ({"eps_high": -1.0}, "eps_high must be"),
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


def test_importing_loads_nothing_of_liger():
    from test_packaging import run_python

    code = "import sys, grpo_fast.integrations.liger; print('liger_kernel' in sys.modules)"
    assert run_python(code) == "False"
