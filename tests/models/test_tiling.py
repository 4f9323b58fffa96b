"""MLPs computed a part of the tokens at a time: the same numbers, fewer bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import lora, tiny

from grpo_fast.models.tiling import tile_mlp

T = 64


def gradients(model):
    ids = torch.arange(T).remainder(90)[None]
    model.zero_grad()
    hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
    named = model.named_parameters()
    return hidden.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def kept(model):
    """Bytes that backward needs, storages counted once, parameters apart."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.arange(T).remainder(90)[None]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(size for _, size in seen.values())


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Phi"])
@pytest.mark.parametrize("tile", [1, 24, 63, 64, 1000])
def test_the_same_outputs_and_gradients(family, tile):
    whole = tiny(family)
    tiled = copy.deepcopy(whole)
    assert tile_mlp(tiled, tile) == 2
    expected, got = gradients(whole), gradients(tiled)
    # products of another number of rows round another way
    assert (got[0] - expected[0]).abs().max() <= 1e-6 * expected[0].abs().max()
    if tile >= T:
        assert torch.equal(got[0], expected[0])
    for name, grad in expected[1].items():
        scale = max(grad.abs().max(), 1e-3 * max(g.abs().max() for g in expected[1].values()))
        assert (got[1][name] - grad).abs().max() <= 2e-6 * scale, name


def test_bytes_that_are_not_kept():
    """act(gate), gate, up and their product: 16 I bytes a token and layer in fp32."""
    model = tiny("Qwen3")
    before = kept(model)
    tile_mlp(model, 16)
    width, layers = model.config.intermediate_size, model.config.num_hidden_layers
    assert before - kept(model) == 16 * width * T * layers


def test_an_adapter_dropout_and_a_second_number():
    model = lora(tiny("Llama"), target_modules="all-linear", lora_dropout=0.5).train()
    tile_mlp(model, 16)
    torch.manual_seed(0)
    first = gradients(model)[1]
    torch.manual_seed(0)
    again = gradients(model)[1]
    # the part that runs again draws the dropout it drew
    assert all(torch.equal(first[name], again[name]) for name in first)
    # tiling again sets the number and does not nest
    tile_mlp(model, 8)
    mlp = next(m.mlp for m in model.modules() if hasattr(m, "mlp"))
    assert mlp._grpo_fast_tile == 8 and mlp._grpo_fast_whole is None


def test_a_copy_runs_its_own_weights():
    model = tiny("Llama")
    tile_mlp(model, 16)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    expected = copy.deepcopy(other)
    for module in expected.modules():
        module.__dict__.pop("forward", None)
    assert torch.allclose(gradients(other)[0], gradients(expected)[0], atol=1e-6)


@pytest.mark.parametrize("tile", [0, -1, True, 2.0])
def test_refuses_a_number(tile):
    with pytest.raises(ValueError, match="mlp_tile: expected None or an integer >= 1"):
        tile_mlp(tiny(), tile)


def test_refuses_a_model_without_an_mlp():
    with pytest.raises(ValueError, match="mlp_tile: expected a model whose layers have a module"):
        tile_mlp(torch.nn.Linear(2, 2), 4)
