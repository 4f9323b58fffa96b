"""The NaN filling of `conftest.py`: on for the library, off for everybody else."""

import types

import pytest
import torch


def call_from(module: str, expression: str) -> torch.Tensor:
    """The value of a torch expression evaluated in a module of that name."""
    namespace = types.ModuleType(module)
    exec(f"import torch\ndef allocate(x):\n    return {expression}", vars(namespace))
    return namespace.allocate(torch.zeros(3, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "expression",
    [
        "torch.empty(5, 2)",
        "torch.empty((5, 2), dtype=torch.float16)",
        "torch.empty(2, requires_grad=True)",
        "torch.empty_like(x)",
        "torch.empty_strided((2, 3), (3, 1))",
        "x.new_empty(7)",
        "torch.nn.Parameter(torch.empty(3))",
    ],
)
def test_memory_that_the_library_did_not_write_is_nan(expression):
    for module in ("grpo_fast.loss", "grpo_fast.kernels.policy"):
        assert call_from(module, expression).isnan().all()


def test_others_get_ordinary_memory():
    zeros = torch.zeros(1 << 16)
    del zeros
    for module in ("transformers.modeling_utils", "grpo_slow"):
        assert not call_from(module, "torch.empty(1 << 16)").isnan().all()


def test_integers_shapes_and_the_meta_device_are_left_alone():
    assert call_from("grpo_fast.loss", "torch.empty(4, dtype=torch.int64)").dtype == torch.int64
    assert call_from("grpo_fast.loss", "torch.empty(4, device='meta')").is_meta
    with torch.device("meta"):
        assert call_from("grpo_fast.loss", "torch.empty(4)").is_meta
        assert call_from("transformers.modeling_utils", "torch.empty(4)").is_meta
        assert torch.nn.Linear(2, 3).weight.is_meta
