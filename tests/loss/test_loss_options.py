"""What a call of `linear_policy_loss` may be given beside a plain head: adapters, a frozen head,
temperatures, a reference from hidden states, a fixed capacity, rows left out; against float64
autograd or the plain call. And the routes that it takes."""

from __future__ import annotations

import pytest
import torch
from correction_cases import CORRECTIONS, correction_case, make_extras, packed
from loss_cases import BOUND, preset_config, relative

from grpo_fast import PRESETS, linear_policy_loss, policy_loss, reference
from grpo_fast.engine import chunks
from grpo_fast.engine.chunks import FIXED_BYTES
from grpo_fast.plan.route import ROUTES

pytestmark = pytest.mark.usefixtures("backend")
HEAD = {"softcap": 8.0, "logit_scale": 0.9}
CHUNK = 16
# the longest does not fit a chunk
LONG = (20, 1, 0, 18, 5, 7)
LEVELS = [(name, level) for name, p in PRESETS.items() for level in p.levels or (None,)]
TRAINED = [
    ("A", "B"),
    ("hidden", "A", "B"),
    ("hidden", "weight", "bias", "A", "B"),
    ("A",),
    ("hidden", "B"),
    ("hidden",),
    ("weight",),
]
SKIPPED = ("off_policy", "token_mask_both", "sequence_truncate_high", "geometric_mask_both")


def small_workspace(V: int, H: int, rows: int = CHUNK, itemsize: int = 4) -> int:
    """workspace_bytes that hold so many rows."""
    return FIXED_BYTES + rows * itemsize * (V + 3 * H)


def make_head(case, rank: int = 3) -> dict[str, torch.Tensor]:
    """Weight, bias and an adapter whose product is as large as the weight."""
    g = torch.Generator().manual_seed(17)
    V, H = case.weight.shape
    return {
        "hidden": torch.nan_to_num(case.hidden),
        "weight": case.weight,
        "bias": 0.5 * torch.randn(V, generator=g),
        "A": torch.randn(rank, H, generator=g) / H**0.5,
        "B": 0.3 * torch.randn(V, rank, generator=g),
    }


def call_of(case, extras, use: set[str], loss_type: str, **options) -> dict:
    """Arguments of a call: those of old, ref, rollout, temperature that are in use."""
    return {
        "ids": case.ids,
        "advantages": case.advantages,
        "config": preset_config(loss_type, **options),
        "mask": case.mask,
        "old_logp": case.old_logp if "old" in use else None,
        "ref_logp": case.ref_logp if "ref" in use else None,
        "rollout_logp": extras.rollout_logp if "rollout" in use else None,
        "temperature": extras.temperature["token"] if "temperature" in use else None,
    }


def exact(given: dict, head: dict, trained: tuple[str, ...], **transform):
    """Loss and gradients of the trained tensors of a head, by autograd in float64."""
    wide = {k: v.double().clone().requires_grad_(k in trained) for k, v in head.items()}
    weight = wide["weight"]
    if "A" in wide:
        weight = weight + 0.7 * wide["B"] @ wide["A"]
    logits = reference.head_logits(wide["hidden"], weight, wide.get("bias"), **transform)
    more = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in given.items()
        if k not in ("ids", "advantages")
    }
    loss = reference.policy_loss(logits, given["ids"], given["advantages"].double(), **more)
    loss.backward()
    return loss.detach(), {k: wide[k].grad for k in trained}


def ours(given: dict, head: dict, trained: tuple[str, ...], **more):
    """The same of `linear_policy_loss`, with its metrics."""
    leaves = {k: v.clone().requires_grad_(k in trained) for k, v in head.items()}
    lora = (leaves["A"], leaves["B"], 0.7) if "A" in leaves else None
    loss, metrics = linear_policy_loss(
        leaves["hidden"], leaves["weight"], bias=leaves.get("bias"), lora=lora, **given, **more
    )
    loss.backward()
    assert all(leaves[k].grad is None for k in leaves if k not in trained)
    return loss.detach(), {k: leaves[k].grad for k in trained}, metrics


def route_of(given: dict, head: dict, trained: tuple[str, ...], **more) -> str:
    """The route that such a call takes."""
    leaves = {k: v.clone().requires_grad_(k in trained) for k, v in head.items()}
    lora = (leaves["A"], leaves["B"], 0.7) if "A" in leaves else None
    bias = leaves.get("bias")
    args = (leaves["hidden"], leaves["weight"])
    return linear_policy_loss(*args, bias=bias, lora=lora, **given, explain=True, **more).route


def agree(got, want, bound: float = BOUND) -> None:
    """Losses and gradients by name."""
    assert abs(got[0].item() - want[0].item()) <= bound * max(abs(want[0].item()), 1e-2)
    for name, grad in want[1].items():
        assert relative(got[1][name], grad) < bound, name


def check_lora(trained: tuple[str, ...], loss_type: str, use: set[str], bonus: bool) -> None:
    """An adapter of the lm_head is the merged weight; every gradient that is asked for."""
    case = correction_case()
    head = make_head(case)
    if "bias" not in trained:
        del head["bias"]
    beta = {"beta": 0.2} if "ref" in use else {}
    options = {**beta, "entropy_coef": 0.03 if bonus else 0.0}
    given = call_of(case, make_extras(case), use, loss_type, **options)
    want = exact(given, head, trained, **HEAD)
    V, H = case.weight.shape
    for bytes_ in (None, small_workspace(V, H + 3)):
        agree(ours(given, head, trained, workspace_bytes=bytes_, **HEAD), want)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "cispo"])
@pytest.mark.parametrize("trained", TRAINED, ids="-".join)
def test_lora(trained, loss_type):
    check_lora(trained, loss_type, {"old"}, bonus=False)
    check_lora(trained, loss_type, set(), bonus=True)
    check_lora(trained, loss_type, {"old", "ref", "temperature", "rollout"}, bonus=True)


def check_frozen_head(loss_type: str, level: str | None, use: set[str]) -> None:
    """dhidden of a head that is not trained, in one chunk and where a sequence does not fit one."""
    case = correction_case(lengths=LONG)
    head = {"hidden": torch.nan_to_num(case.hidden), "weight": case.weight}
    beta = {"beta": 0.2} if "ref" in use else {}
    given = call_of(
        case, make_extras(case), use, loss_type, importance_sampling_level=level, **beta
    )
    trained = ("hidden",)
    want = exact(given, head, trained, **HEAD)
    small = {"workspace_bytes": small_workspace(*case.weight.shape)}
    kept = route_of(given, head, trained, **small) == "frozen_head"
    # with old log-probs the factor of a sequence is known before the pass
    assert kept == bool(use and (given["config"].level != "token" or use == {"rollout"}))
    for bytes_ in ({}, small):
        agree(ours(given, head, trained, **bytes_, **HEAD), want)


@pytest.mark.parametrize("loss_type, level", LEVELS)
def test_frozen_head(loss_type, level):
    for use in (set(), {"old"}, {"rollout"}, {"old", "ref", "temperature", "rollout"}):
        check_frozen_head(loss_type, level, use)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_reference_from_hidden(beta):
    """A reference given as hidden states: the same loss as with its log-probs; KL exactly 0 when it
    is the policy."""
    case = correction_case()
    extras = make_extras(case)
    g = torch.Generator().manual_seed(23)
    ref_hidden = torch.randn(*case.hidden.shape[:2], 10, generator=g)
    ref_hidden[~case.mask] = float("nan")
    ref_weight = torch.randn(case.weight.shape[0], 10, generator=g) / 3
    head = make_head(case)
    for kind in (None, "token"):
        given = call_of(case, extras, {"old"}, "dapo", beta=beta)
        given["temperature"] = heat = extras.temperature[kind]
        logits = reference.head_logits(
            ref_hidden.double(), ref_weight.double(), head["bias"], **HEAD
        )
        heat = torch.tensor(0.9) if heat is None else heat[..., None]
        ref = reference.logprob(logits / heat.double(), case.ids.clamp(min=0))[0]
        trained = ("hidden", "weight", "bias", "A", "B")
        want = exact({**given, "ref_logp": ref}, head, trained, **HEAD)
        del given["ref_logp"]
        theirs = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
        agree(ours(given, head, trained, **theirs, **HEAD), want)
        plain = {k: head[k] for k in ("hidden", "weight", "bias")}
        for weight in (None, case.weight):
            same = {"ref_hidden": case.hidden, "ref_weight": weight}
            small = small_workspace(*case.weight.shape)
            got = ours(given, plain, ("hidden", "weight"), workspace_bytes=small, **same, **HEAD)
            assert got[2]["kl"] == 0.0
            assert ours(given, head, ("A", "B"), **same, **HEAD)[2]["kl"] > 0.01


def check_max_rows(loss_type: str, name: str, old: bool, trained: tuple[str, ...]) -> None:
    """Values, gradients and metrics of a fixed capacity are those of the plain call."""
    case = correction_case()
    correction, extras = CORRECTIONS[name], make_extras(case)
    use = {"old"} if old else set()
    use |= {"rollout"} if correction.rollout else set()
    options = dict(correction.options)
    use |= {"ref"} if options.get("beta") else set()
    given = call_of(case, extras, use, loss_type, **options)
    given["temperature"] = extras.temperature[correction.temperature]
    given["entropy_threshold"] = correction.threshold
    head = make_head(case)
    # a token of a masked place may be banned too
    head["bias"][0] = -torch.inf
    given["ids"] = torch.where(case.ids == 0, 1, case.ids)
    head["hidden"] = case.hidden
    plain = ours(given, head, trained)
    n = int(case.mask.sum())
    small = small_workspace(case.weight.shape[0], case.weight.shape[1] + 3)
    for rows in (n, n + 3, case.ids.numel()):
        fixed = ours(given, head, trained, max_rows=rows, workspace_bytes=small)
        agree(fixed, plain, 1e-5)
        assert fixed[2].keys() == plain[2].keys()
        for key, value in plain[2].items():
            assert abs(fixed[2][key] - value) <= 1e-5 * max(1.0, abs(value)), key
    empty = {**given, "mask": torch.zeros_like(case.mask)}
    assert ours(empty, head, trained, max_rows=n)[2] == ours(empty, head, trained)[2]
    for poisoned in ({"max_rows": n - 1}, {"max_rows": n, "bad": 77}, {"max_rows": n, "bad": -1}):
        ids = given["ids"].clone()
        bad = poisoned.pop("bad", None)
        if bad is not None:
            ids[0, 2] = bad
        loss, _, metrics = ours({**given, "ids": ids}, head, trained, **poisoned)
        assert torch.isnan(loss) and torch.isnan(metrics["loss"])


def check_max_rows_of_logits(loss_type: str, old: bool) -> None:
    """`policy_loss` with a capacity: the plain call, bit for bit, and NaN where it overflows."""
    case = correction_case()
    given = call_of(case, make_extras(case), {"old"} if old else set(), loss_type)
    logits = reference.head_logits(case.hidden, case.weight)
    results = []
    for rows in (None, int(case.mask.sum()), case.ids.numel(), 3):
        leaf = logits.clone().requires_grad_()
        loss, metrics = policy_loss(leaf, **given, max_rows=rows)
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics))
    for loss, grad, metrics in results[1:3]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])
        assert metrics == results[0][2]
    assert torch.isnan(results[3][0])


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "gmpo", "vespo", "reinforce", "cispo"])
def test_max_rows(loss_type, old):
    for name in ("off_policy", "top_entropy", "together", "together_without_top"):
        check_max_rows(loss_type, name, old, ("hidden", "weight", "bias", "A", "B"))
        check_max_rows(loss_type, name, old, ("hidden",))
    check_max_rows_of_logits(loss_type, old)


def check_skip(loss_type: str, name: str, old: bool) -> None:
    """Rows of advantage 0 left out, of whole sequences and of single tokens, whatever else is on:
    the same loss and gradients, and what they hold is not read."""
    case = correction_case()
    correction, extras = CORRECTIONS[name], make_extras(case)
    use = ({"old"} if old else set()) | ({"rollout"} if correction.rollout else set())
    given = call_of(case, extras, use, loss_type, **correction.options)
    given["temperature"] = extras.temperature[correction.temperature]
    given["advantages"] = extras.advantages.clone()
    given["advantages"][[0, 4]] = 0.0
    head = {"hidden": case.hidden, "weight": case.weight}
    plain = ours(given, head, ("hidden", "weight"))
    spoiled = {**head, "hidden": case.hidden.clone()}
    spoiled["hidden"][[0, 4]] = float("nan")
    fewer = ours(given, spoiled, ("hidden", "weight"), skip_inactive_forward=True)
    agree(fewer, plain, 1e-5)
    assert fewer[2]["tokens"] == plain[2]["tokens"] == case.mask.sum()
    assert fewer[2]["active_rows"] == plain[2]["active_rows"]
    assert not fewer[1]["hidden"][[0, 4]].any()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", PRESETS)
def test_skipped_rows(loss_type, old):
    for name in (*SKIPPED, "temperature_token"):
        check_skip(loss_type, name, old)


def check_nothing(loss_type: str, name: str, old: bool) -> None:
    """A batch that is masked whole and one without tokens: loss 0, gradients 0, finite metrics."""
    case = correction_case()
    correction, extras = CORRECTIONS[name], make_extras(case)
    use = ({"old"} if old else set()) | ({"rollout"} if correction.rollout else set())
    use |= {"ref"} if correction.options.get("beta") else set()
    given = call_of(case, extras, use, loss_type, **correction.options)
    given["temperature"] = extras.temperature[correction.temperature]
    given["mask"] = torch.zeros_like(case.mask)
    empty = {k: v[:0] if torch.is_tensor(v) else v for k, v in given.items()}
    calls = [(given, case.hidden), (empty, case.hidden[:0]), (packed(given), case.hidden[:0, 0])]
    for kwargs, hidden in calls:
        for rows in (None, 1):
            head = {"hidden": hidden, "weight": case.weight}
            loss, grads, metrics = ours(kwargs, head, ("hidden", "weight"), max_rows=rows)
            assert loss == 0 and not any(g.any() for g in grads.values())
            assert all(torch.isfinite(value.float()) for value in metrics.values())
            leaf = torch.full((*hidden.shape[:-1], 77), torch.nan).requires_grad_()
            loss, metrics = policy_loss(leaf, **kwargs, max_rows=rows)
            loss.backward()
            assert loss == 0 and not leaf.grad.any()
            assert all(torch.isfinite(value.float()) for value in metrics.values())


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "gmpo", "vespo", "reinforce", "dr_grpo"])
def test_nothing_to_do(loss_type, old):
    for name in ("off_policy", "top_entropy", "geometric_mask_both", "together"):
        check_nothing(loss_type, name, old)


def check_routes(columns_first: bool = False) -> set[str]:
    """Calls of every route against float64; the routes they took."""
    case = correction_case(lengths=LONG)
    small = {"workspace_bytes": small_workspace(*case.weight.shape)}
    both, top = ("hidden", "weight"), {"top_entropy_quantile": 0.6}
    head = {"hidden": torch.nan_to_num(case.hidden), "weight": case.weight}
    calls = [
        ("one_pass", "dapo", {"old"}, both, {}, {}),
        ("one_pass", "dapo", set(), ("weight",), {}, small),
        ("one_pass", "dapo", {"old", "rollout"}, both, {"entropy_coef": 0.1}, {}),
        ("known_derivative", "gspo", set(), both, {}, {}),
        ("known_derivative", "gmpo", set(), ("hidden",), {"entropy_coef": 0.1}, small),
        ("whole_sequences", "rloo", {"old"}, both, {}, {}),
        ("whole_sequences", "dapo", {"rollout"}, both, {"entropy_coef": 0.1}, {}),
        ("two_passes", "rloo", {"old"}, both, {}, small),
        ("two_passes", "dapo", {"old"}, both, {**top, "entropy_coef": 0.1}, small),
        ("frozen_head", "vespo", {"old"}, ("hidden",), {}, small),
        ("frozen_head", "dapo", set(), ("hidden",), top, {}),
        ("two_passes", "dapo", set(), ("hidden",), {"top_entropy_quantile": 0.4}, {}),
        ("two_passes", "vespo", {"old"}, ("hidden",), {"entropy_coef": 0.1}, small),
    ]
    taken = set()
    for route, loss_type, use, trained, options, more in calls:
        given = call_of(case, make_extras(case), use, loss_type, **options)
        taken.add(found := route_of(given, head, trained, **more))
        if columns_first and more and "weight" in trained:
            route = "two_passes"
        assert found == route, (loss_type, use, trained, options)
        want = exact(given, head, trained)
        agree(ours(given, head, trained, **more), want)
        with torch.no_grad():
            taken.add(route_of(given, head, (), **more))
            loss, _ = linear_policy_loss(case.hidden, case.weight, **given, **more)
        agree((loss, {}), (want[0], {}))
    return taken


def test_every_route_is_reached():
    assert check_routes() == set(ROUTES)


def test_routes_that_go_through_slices_of_the_vocabulary(monkeypatch):
    """Chunks too small for an accelerator: backward by columns, dweight written once."""
    monkeypatch.setitem(chunks.COLUMNS_FIRST, "cpu", 32)
    check_routes(columns_first=True)
    check_lora(("hidden", "weight", "bias", "A", "B"), "gspo", {"old"}, bonus=True)


@pytest.mark.kernels
def test_one_of_each_on_every_backend():
    check_lora(("hidden", "weight", "bias", "A", "B"), "dapo", {"rollout", "temperature"}, True)
    check_frozen_head("gspo", None, {"old", "ref", "temperature", "rollout"})
    check_max_rows("dapo", "together_without_top", True, ("hidden", "weight", "bias", "A", "B"))
    check_routes()
