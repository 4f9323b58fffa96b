"""The gradient of the weight added straight into a buffer of the caller, and backward by slices of
the vocabulary."""

import pytest
import torch
from loss_cases import make_case, preset_config, relative, truth
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from grpo_fast import linear_logprob, linear_policy_loss
from grpo_fast.engine import chunks
from grpo_fast.engine.chunks import FIXED_BYTES
from grpo_fast.engine.gradients import HeadGradients


def call(case, loss_type="dapo", **more):
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    if more.pop("frozen_hidden", False):
        hidden.requires_grad_(False)
    if "main_grad" in more and more["main_grad"] is None:
        more["main_grad"] = torch.ones_like(weight)
    loss, metrics = linear_policy_loss(
        hidden,
        weight,
        case.ids,
        case.advantages,
        mask=case.mask,
        old_logp=case.old_logp,
        config=preset_config(loss_type),
        **more,
    )
    return hidden, weight, loss, metrics, more.get("main_grad")


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "cispo"])
@pytest.mark.parametrize("frozen_hidden", [False, True])
def test_main_grad_receives_the_gradient(loss_type, frozen_hidden):
    case = make_case()
    want = truth(case, preset_config(loss_type), use_old=True, use_ref=False)
    hidden, weight, loss, metrics, buffer = call(
        case, loss_type, main_grad=None, grad_scale=0.25, frozen_hidden=frozen_hidden
    )
    # before any backward, on top of what was there
    assert relative(buffer - 1.0, 0.25 * want[2]) < 1e-4
    (loss * 0.25).backward()
    assert weight.grad is None
    if not frozen_hidden:
        assert relative(hidden.grad, 0.25 * want[1]) < 2e-5
    assert relative(loss.detach(), want[0]) < 2e-5 and metrics["loss"] == loss.detach()


def test_another_factor_is_refused():
    case = make_case()
    *_, loss, _, _ = call(case, main_grad=None)
    with pytest.raises(RuntimeError, match=r"grad_scale = 1, .* factor of 0.5"):
        (loss * 0.5).backward()


def test_no_grad_and_explain_add_nothing():
    case = make_case()
    with torch.no_grad():
        assert (call(case, main_grad=None)[-1] == 1).all()
    buffer = torch.ones_like(case.weight)
    linear_policy_loss(
        case.hidden,
        case.weight.clone().requires_grad_(),
        case.ids,
        case.advantages,
        mask=case.mask,
        main_grad=buffer,
        explain=True,
    )
    assert (buffer == 1).all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_a_checkpoint_adds_once(loss_type, early_stop, reentrant):
    """torch.utils.checkpoint runs a forward twice, and main_grad is filled in the forward."""
    case, half = make_case(), torch.tensor(0.5)
    results = []
    for wrapped in (False, True):
        leaf, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        buffer = torch.zeros_like(case.weight)

        def tail(x, weight=weight, buffer=buffer):
            loss, _ = linear_policy_loss(
                x.clone(),
                weight,
                case.ids,
                case.advantages,
                mask=case.mask,
                old_logp=case.old_logp,
                config=preset_config(loss_type),
                main_grad=buffer,
                grad_scale=0.5,
            )
            # a tensor saved behind the loss makes the second forward go through it
            return loss * half

        with set_checkpoint_early_stop(early_stop):
            loss = checkpoint(tail, leaf, use_reentrant=reentrant) if wrapped else tail(leaf)
        loss.backward()
        results.append((buffer, leaf.grad))
    (plain, dplain), (buffer, dhidden) = results
    assert plain.any() and relative(buffer, plain) < 1e-6 and relative(dhidden, dplain) < 1e-6


def test_hooks_that_hide_a_second_forward_are_refused():
    case, half = make_case(), torch.tensor(0.5)
    weight, buffer = case.weight.clone().requires_grad_(), torch.zeros_like(case.weight)

    def tail(x):
        with torch.autograd.graph.save_on_cpu():
            given = (x, weight, case.ids, case.advantages)
            loss, _ = linear_policy_loss(*given, mask=case.mask, main_grad=buffer)
        return loss * half

    loss = checkpoint(tail, case.hidden.clone().requires_grad_(), use_reentrant=False)
    with pytest.raises(ValueError, match="main_grad: expected None where saved-tensor hooks"):
        (loss * 2).backward()


def test_tied_embedding():
    """weight.grad is the sum of the head's gradient and the embedding's, as with autograd."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (2, 6), generator=g)
    grads = []
    for main in (False, True):
        weight = (torch.randn(20, 8, generator=torch.Generator().manual_seed(1))).requires_grad_()
        hidden = torch.nn.functional.embedding(ids[:, :-1], weight).tanh()
        more = {}
        if main:
            weight.grad = torch.zeros_like(weight)
            more = {"main_grad": weight.grad, "grad_scale": 1.0}
        loss, _ = linear_policy_loss(
            hidden, weight, ids[:, 1:].contiguous(), torch.tensor([1.0, -0.5]), **more
        )
        loss.backward()
        grads.append(weight.grad)
    assert relative(grads[1], grads[0]) < 1e-6


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"main_grad": torch.zeros(3)}, "main_grad: expected floating-point tensor"),
        ({"main_grad": torch.zeros(77, 24).half()}, "main_grad: expected a contiguous torch.float"),
        ({"main_grad": torch.zeros(24, 77).t()}, "main_grad: expected a contiguous"),
        ({"grad_scale": 2.0}, "grad_scale: expected 1.0 without main_grad, got 2.0"),
        ({"main_grad": None, "grad_scale": 0.0}, "grad_scale: expected a finite number other"),
    ],
)
def test_bad_calls(more, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(make_case(), **more)


def test_main_grad_of_a_frozen_weight_is_refused():
    case = make_case()
    with pytest.raises(ValueError, match="main_grad: expected None for a frozen weight"):
        linear_policy_loss(
            case.hidden,
            case.weight,
            case.ids,
            case.advantages,
            mask=case.mask,
            main_grad=torch.zeros_like(case.weight),
        )


@pytest.fixture
def slices(monkeypatch):
    """Backward goes through the vocabulary, 64 KiB of logits at a time; the slices it made."""
    made = []
    add = HeadGradients.add_columns

    def counted(self, hidden, dlogits, part):
        made.append(part)
        return add(self, hidden, dlogits, part)

    monkeypatch.setitem(chunks.COLUMNS_FIRST, "cpu", 10**6)
    monkeypatch.setattr(HeadGradients, "add_columns", counted)
    budget = property(lambda _: 64 * 1024, lambda _, __: None)
    monkeypatch.setattr(chunks.LinearHead, "budget", budget, raising=False)
    return made


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("main", [False, True])
def test_backward_by_slices_of_the_vocabulary(loss_type, main, slices):
    """What a CUDA device does with chunks of under 1,024 rows: the same gradients."""
    case = make_case(V=1500, lengths=(30, 25, 20, 25))
    want = truth(case, preset_config(loss_type), use_old=True, use_ref=False)
    # 16 rows of a chunk, so that those with a gradient are more
    budget = FIXED_BYTES + 16 * 4 * (1500 + 3 * 24)
    more = {"workspace_bytes": budget, **({"main_grad": None} if main else {})}
    hidden, weight, loss, _, buffer = call(case, loss_type, **more)
    loss.backward()
    assert relative(hidden.grad, want[1]) < 2e-5
    assert relative(buffer - 1.0 if main else weight.grad, want[2]) < (1e-4 if main else 2e-5)
    assert [part.start for part in slices] == [*range(0, 1500, slices[0].stop)] != [0]


def test_slices_of_the_vocabulary_with_everything(slices, monkeypatch):
    """Bias, softcap, entropy and an adapter through `linear_logprob`: equal to chunks of rows."""
    g = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(*s, generator=g) for s in ((40, 16), (900, 16), (900,), (3, 16), (900, 3))
    ]
    ids = torch.randint(900, (40,), generator=g)
    upstream = torch.randn(3, 40, generator=g)
    results = []
    for columns in (False, True):
        monkeypatch.setitem(chunks.COLUMNS_FIRST, "cpu", 10**6 if columns else 0)
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = linear_logprob(
            *leaves[:2],
            ids,
            bias=leaves[2],
            lora=(*leaves[3:], 0.5),
            softcap=7.0,
            temperature=1.2,
            entropy=True,
            workspace_bytes=FIXED_BYTES + 16 * 4 * (900 + 3 * 19),
        )
        sum((u * o).sum() for u, o in zip(upstream, out, strict=True)).backward()
        results.append([leaf.grad for leaf in leaves])
        assert (len(slices) > 1) == columns
    for got, want in zip(results[1], results[0], strict=True):
        assert relative(got, want) < 2e-6
