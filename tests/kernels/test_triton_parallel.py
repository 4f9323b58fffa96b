"""What a rank of a vocabulary-parallel head asks of the Triton kernels, in Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import vocabulary_checks

from grpo_fast.kernels import logprob


@pytest.mark.parametrize("with_entropy", (False, True))
def test_gradients_of_slices(with_entropy):
    vocabulary_checks.check_slices(logprob, torch.float32, with_entropy)
