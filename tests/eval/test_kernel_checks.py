"""The checks that come before any timing, on a CUDA device."""

import pytest
import torch

from dit_accel.eval.bench_kernels import ALL_CHECKS as CHECKS
from dit_accel.eval.method_cases import check_methods


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", CHECKS)
def test_kernels_are_right(operation, dtype, depth):
    CHECKS[operation](dtype, depth, "cuda")


def test_methods_are_dense_at_full_density():
    check_methods(torch.float32, 16, "cpu")
