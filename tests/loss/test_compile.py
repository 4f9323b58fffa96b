"""torch.compile: one graph, the same bits, at most two compilations over many lengths."""

import shutil

import pytest
import torch
from loss_cases import make_case
from torch._dynamo.backends.debugging import aot_eager

from grpo_fast import (
    LossConfig,
    linear_logprob,
    linear_policy_loss,
    logprob,
    policy_loss,
    reference,
)
from grpo_fast.loss import metrics

LORA_RANK = 3
pytestmark = pytest.mark.slow


class Counter:
    """A backend that counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        self.calls += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    counter = Counter()
    return torch.compile(function, fullgraph=True, backend=counter), counter


def leaves_of(case, half=torch.float32):
    g = torch.Generator().manual_seed(3)
    V, H = case.weight.shape
    return {
        "hidden": torch.nan_to_num(case.hidden).to(half),
        "weight": case.weight.to(half),
        "bias": torch.randn(V, generator=g).to(half),
        "A": torch.randn(LORA_RANK, H, generator=g).to(half),
        "B": 0.1 * torch.randn(V, LORA_RANK, generator=g).to(half),
    }


def linear_call(hidden, weight, bias, A, B, case, given):
    return linear_policy_loss(
        hidden,
        weight,
        case["ids"],
        case["advantages"],
        mask=case["mask"],
        bias=bias,
        lora=None if A is None else (A, B, 0.5),
        softcap=8.0,
        **given,
    )


def gradients(function, leaves, wanted, *args, upstream=1.0):
    """Results of a call and the gradients of the wanted leaves."""
    mine = {k: v.clone().requires_grad_(k in wanted) for k, v in leaves.items()}
    loss, found = function(*mine.values(), *args)
    if wanted:
        (loss * upstream).backward()
    return loss.detach(), found, [mine[k].grad for k in wanted]


def check_equal(got, want):
    loss, found, grads = got
    assert torch.equal(loss, want[0])
    assert list(found) == list(want[1])
    for name, value in found.items():
        assert torch.equal(value, want[1][name]) and value.dtype == want[1][name].dtype, name
        assert not value.requires_grad
    for grad, exact in zip(grads, want[2], strict=True):
        assert grad.dtype == exact.dtype and torch.equal(grad, exact)


ROUTES = [
    # one pass, known derivative, whole sequences, frozen head, two passes
    (LossConfig(beta=0.1), "old ref", ("hidden", "weight", "bias", "A", "B")),
    (LossConfig(loss_type="gspo"), "", ("hidden", "weight")),
    (LossConfig(loss_type="gspo"), "old", ("hidden", "weight")),
    (LossConfig(loss_type="gmpo"), "old", ("hidden",)),
    (LossConfig(top_entropy_quantile=0.5), "old rollout", ("A", "B")),
    (LossConfig(loss_type="gspo"), "old rollout", ()),
]


@pytest.mark.parametrize("config, optional, wanted", ROUTES)
@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
def test_linear_policy_loss_compiles_to_the_same_bits(config, optional, wanted, half):
    case = make_case()
    given = {"config": config}
    for name in optional.split():
        given[f"{name}_logp"] = case.old_logp if name != "ref" else case.ref_logp
    leaves = leaves_of(case, half)
    if not {"A", "B"} & set(wanted):
        leaves["A"] = leaves["B"] = torch.zeros(0)

    def call(hidden, weight, bias, A, B, case):
        A, B = (None, None) if A.numel() == 0 else (A, B)
        return linear_call(hidden, weight, bias, A, B, case, given)

    function, counter = compiled(call)
    for upstream in (1.0, 65536.0):
        # a length for which nothing is compiled yet, and the same one again
        want = gradients(call, leaves, wanted, vars(case), upstream=upstream)
        check_equal(gradients(function, leaves, wanted, vars(case), upstream=upstream), want)
    assert counter.calls == 1


@pytest.mark.parametrize("half", [torch.float32, torch.float16])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_loss_compiles_to_the_same_bits(half, level):
    case = make_case()
    config = LossConfig(importance_sampling_level=level, beta=0.1)
    logits = torch.nan_to_num(reference.head_logits(case.hidden, case.weight)).to(half)

    def call(logits, case):
        return policy_loss(
            logits * 1.5,
            case["ids"],
            case["advantages"],
            config=config,
            mask=case["mask"],
            old_logp=case["old_logp"],
            ref_logp=case["ref_logp"],
            denominator=torch.tensor(7.0),
        )

    for wanted in (("logits",), ()):
        want = gradients(call, {"logits": logits}, wanted, vars(case), upstream=1024.0)
        function, _ = compiled(call)
        got = gradients(function, {"logits": logits}, wanted, vars(case), upstream=1024.0)
        check_equal(got, want)


@pytest.mark.parametrize("wanted", [("hidden",), ("hidden", "weight", "bias", "A", "B"), ("bias",)])
@pytest.mark.parametrize("per_token", [False, True])
def test_linear_logprob_compiles_to_the_same_bits(wanted, per_token):
    case = make_case()
    temperature = torch.linspace(0.5, 1.5, 36).view(4, 9) if per_token else 0.9

    def call(hidden, weight, bias, A, B):
        out = linear_logprob(
            hidden,
            weight,
            case.ids,
            mask=case.mask,
            bias=bias,
            lora=(A, B, 0.5),
            temperature=temperature,
            entropy=True,
        )
        return (out.logp * 2 + out.entropy).sum() + out.lse.square().sum(), out._asdict()

    function, _ = compiled(call)
    leaves = leaves_of(case)
    if wanted == ("hidden",):
        leaves["A"].zero_()
    loss, found, grads = gradients(function, leaves, wanted)
    want = gradients(call, leaves, wanted)
    assert torch.equal(loss, want[0])
    assert all(torch.equal(found[name], want[1][name]) for name in want[1])
    assert all(torch.equal(*pair) for pair in zip(grads, want[2], strict=True))


def test_frozen_head_keeps_its_slope_when_compiled():
    case = make_case()

    def call(hidden, weight):
        out = linear_logprob(hidden, weight, case.ids, mask=case.mask)
        assert out.entropy is None
        return out.logp.square().sum(), {}

    leaves = {k: leaves_of(case)[k] for k in ("hidden", "weight")}
    check_equal(
        gradients(compiled(call)[0], leaves, ("hidden",)), gradients(call, leaves, ("hidden",))
    )


@pytest.mark.parametrize("masked", [False, True])
def test_logprob_compiles_to_the_same_bits(masked):
    case = make_case()
    logits = torch.nan_to_num(reference.head_logits(case.hidden, case.weight))
    ids = case.ids.clamp(min=0)

    def call(logits):
        out = logprob(logits, ids, mask=case.mask if masked else None, temperature=0.7)
        return out.logp.sum() + out.lse.sum() * 2, {"logp": out.logp.detach()}

    leaves = {"logits": logits}
    want = gradients(call, leaves, ("logits",))
    check_equal(gradients(compiled(call)[0], leaves, ("logits",)), want)


def test_fifty_lengths_are_at_most_two_compilations():
    def everything(hidden, weight, ids, advantages, old):
        loss, found = linear_policy_loss(hidden, weight, ids, advantages, old_logp=old)
        logits = hidden @ weight.T
        other, _ = policy_loss(logits, ids, advantages, old_logp=old, denominator=ids.numel())
        logp = linear_logprob(hidden, weight, ids).logp + logprob(logits, ids).logp
        return loss + other + logp.mean(), found["tokens"]

    function, counter = compiled(everything)
    for T in range(2, 52):
        case = make_case(lengths=(T, T, T))
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        args = (case.ids, case.advantages, case.old_logp)
        loss, tokens = function(hidden, weight, *args)
        loss.backward()
        assert tokens == 3 * T and hidden.grad.isfinite().all()
    want = everything(case.hidden, case.weight, *args)[0]
    torch.testing.assert_close(loss.detach(), want)
    assert counter.calls <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_layout_and_the_numbers():
    case = make_case()

    def call(hidden, weight):
        # what inductor would fuse, and logits whose last position is cut off
        hidden = torch.nn.functional.silu(hidden) * 2.0
        args = (case.ids, case.advantages)
        loss, found = linear_policy_loss(hidden, weight, *args, mask=case.mask)
        logits = (hidden @ weight.T)[:, :-1]
        out = logprob(logits, case.ids[:, :-1], mask=case.mask[:, :-1], entropy=True)
        return loss + out.logp.mean() + out.entropy.mean(), found

    leaves = {k: leaves_of(case)[k] for k in ("hidden", "weight")}
    want = gradients(call, leaves, ("hidden", "weight"))
    got = gradients(torch.compile(call, fullgraph=True), leaves, ("hidden", "weight"))
    torch.testing.assert_close(got, want)


def test_a_new_configuration_is_not_the_old_one():
    case = make_case()

    def call(hidden, weight, config):
        given = {"old_logp": case.old_logp, "mask": case.mask, "config": config}
        return linear_policy_loss(hidden, weight, case.ids, case.advantages, **given)[0]

    function, _ = compiled(call)
    for config in (None, LossConfig(epsilon=0.01), LossConfig(loss_type="sapo"), LossConfig()):
        got = function(case.hidden, case.weight, config)
        assert torch.equal(got, call(case.hidden, case.weight, config))


def test_bad_values_and_shapes_are_named():
    case = make_case()

    def call(ids, mask, inplace=False, **more):
        logits = torch.zeros(4, 9, 77) + 0.0
        return policy_loss(logits, ids, case.advantages, mask=mask, inplace=inplace, **more)[0]

    function, _ = compiled(call)
    with pytest.raises(ValueError, match=r"ids: expected token ids in \[0, 77\), got values from"):
        function(case.ids, None)
    with pytest.raises(ValueError, match="denominator: expected None or a finite number > 0, got"):
        function(case.ids, case.mask, denominator=-2)
    with pytest.raises(Exception, match=r"mask: expected tensor \(4, 9\)"):
        function(case.ids, case.mask[:, 1:])
    with pytest.raises(Exception, match="inplace: expected False under torch.compile, got True"):
        function(case.ids, case.mask, inplace=True)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", 0.7),
        ("mask", [[1, 0, 0], [1, 1, 0]]),
        ("old_logp", [[0.0] * 3] * 2),
        ("softcap", torch.tensor(2.0)),
        ("logit_scale", torch.tensor(2.0)),
        ("bias", 0.5),
        ("max_rows", torch.tensor(4)),
        ("skip_inactive_forward", 1),
        ("per_token", True),
        ("main_grad", torch.zeros(11, 8)),
        ("tp_group", object()),
    ],
)
def test_nothing_is_dropped_in_silence(name, value):
    """What the op has no place for is refused by name: a list is no tensor, nor a tensor a
    number."""
    hidden, weight, ids = torch.randn(2, 3, 8), torch.randn(11, 8), torch.zeros(2, 3).long()

    def call():
        return linear_policy_loss(hidden, weight, ids, torch.ones(2), **{name: value})[0]

    with pytest.raises(Exception, match=f"{name}: expected .* under torch.compile, got"):
        compiled(call)[0]()


def test_autocast_is_that_of_the_traced_region():
    case = make_case()

    def call(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16):
            args = (case.ids, case.advantages)
            return linear_policy_loss(hidden, weight, *args, mask=case.mask)

    leaves = {k: leaves_of(case)[k] for k in ("hidden", "weight")}
    # a layer under autocast gives bf16 beside an fp32 weight
    leaves["hidden"] = leaves["hidden"].bfloat16()
    want = gradients(call, leaves, ("hidden", "weight"))
    check_equal(gradients(compiled(call)[0], leaves, ("hidden", "weight")), want)


def op_arguments(name: str, half=torch.float32):
    """Arguments with which the op is checked, every optional tensor given."""
    case = make_case()
    t = {k: v.requires_grad_() for k, v in leaves_of(case, half).items()}
    config = LossConfig(beta=0.1, top_entropy_quantile=0.5)
    head = {"hidden": t["hidden"], "weight": t["weight"], "bias": t["bias"]}
    head |= {"lora_A": t["A"], "lora_B": t["B"]}
    logits = {"logits": torch.randn(4, 9, 77).to(half).requires_grad_()}
    tokens = {"ids": case.ids, "mask": case.mask, "temperature": torch.ones(4, 9)}
    loss = {"advantages": case.advantages, "old_logp": case.old_logp, "ref_logp": case.ref_logp}
    loss |= {"rollout_logp": case.old_logp, "entropy_threshold": torch.tensor(1.0)}
    tensors = (head if name.startswith("linear") else logits) | tokens
    if name.endswith("loss"):
        tensors |= loss
    leaves = [x.requires_grad for x in tensors.values() if x.is_floating_point()]
    # lora_scale, softcap, logit_scale, temperature, threshold, denominator, max_rows, bytes
    numbers = (0.5, 8.0, 1.0, None, None, 12, None, None)
    text = "0" + config.text if name.endswith("loss") else ""
    wanted = [True] * sum(leaves)
    return (list(tensors.values()), name, " ".join(tensors), text, wanted, None, *numbers)


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear_policy_loss", "policy_loss", "linear_logprob", "logprob"])
def test_opcheck(name, half):
    torch.library.opcheck(torch.ops.grpo_fast.opaque.default, op_arguments(name, half))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("rollout", [False, True])
def test_names_of_the_metrics_are_known_beforehand(old, ref, rollout):
    case = make_case()
    logp = {"old_logp": old, "ref_logp": ref, "rollout_logp": rollout}
    given = {name: getattr(case, name, case.old_logp) for name, here in logp.items() if here}
    for level in ("token", "sequence"):
        config = LossConfig(importance_sampling_level=level, top_entropy_quantile=0.5)
        args = (case.ids, case.advantages)
        given |= {"mask": case.mask, "config": config}
        _, found = linear_policy_loss(case.hidden, case.weight, *args, **given)
        assert tuple(found) == metrics.names(ref, rollout)
        whole = {name for name, value in found.items() if not value.is_floating_point()}
        assert whole == set(metrics.COUNTS) & set(found)
