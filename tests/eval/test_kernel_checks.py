"""The checks that come before any timing, on a CUDA device."""

import pytest
import torch

from dit_accel.eval.kernel_checks import CHECKS


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", CHECKS)
def test_kernels_are_right(operation, dtype, depth):
    CHECKS[operation](dtype, depth, "cuda")
