"""The probe's kernel, interpreted, against the plain implementation in fp64."""

import pytest
import torch

from dit_accel.kernels.error_probe import error_probe

pytest.importorskip("triton")


def problem(dtype, seed=0, length=150, depth=64, rows=70):
    generator = torch.Generator().manual_seed(seed)
    k = (3 * torch.randn(2, 2, length, depth, generator=generator)).to(dtype)
    queries = 3 * torch.randn(2, 2, rows, depth, generator=generator)
    perm = torch.stack([torch.randperm(length, generator=generator) for _ in range(4)])
    offsets = torch.tensor([0, 0, 7, 80, 80, 82, 140, 141, 150], dtype=torch.int32).view(1, 1, -1)
    weight = 4 * torch.randn(2, 2, rows, 7, generator=generator)
    weight[0, 0, :, 1] = -torch.inf
    return queries, k, weight, perm.view(2, 2, length), offsets


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_agrees_with_fp64(dtype, padded):
    queries, k, weight, perm, offsets = problem(dtype)
    valid = None
    if padded:
        valid = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) < 0.8
        valid[0, perm[0, 0, 80:82]] = False  # a block of padding alone
        k = k.masked_fill(~valid[:, None, :, None], torch.nan)
    arguments = {"perm": perm, "offsets": offsets, "num_blocks": 7, "key_valid": valid}
    arguments["scale"] = 0.25
    # a view with other strides, and only some of the blocks
    weight_view = torch.cat([weight, weight], -1)[..., :7]
    got = error_probe(queries, k.mT.contiguous().mT, weight_view, backend="triton", **arguments)
    wanted = error_probe(queries.double(), k.double(), weight.double(), **arguments)
    plain = error_probe(queries, k.float(), weight, **arguments)
    bound = 2 * (plain - wanted).abs().max() + 8 * torch.finfo(torch.float32).eps
    assert (got - wanted).abs().max() <= bound
    assert (got[:, :, :, 0] == 0).all()
    assert (got[:, :, :, 3] == 0).all()


def test_nothing_overflows():
    queries, k, weight, perm, offsets = problem(torch.float16, length=150, rows=5)
    got = error_probe(
        queries * 100,
        k,
        weight * 1000,
        perm=perm,
        offsets=offsets,
        num_blocks=7,
        scale=1.0,
        backend="triton",
    )
    assert got.isfinite().all()
    assert (got.amax(-1) > 0).any()


def test_rows_and_keys_may_be_missing():
    queries, k, weight, perm, offsets = problem(torch.float16, rows=3)
    arguments = {"perm": perm, "offsets": offsets, "scale": 1.0, "backend": "triton"}
    assert error_probe(queries[:, :, :0], k, weight[:, :, :0], num_blocks=7, **arguments).shape == (
        (2, 2, 0, 7)
    )
    nothing = torch.zeros(2, 150, dtype=torch.bool)
    assert (
        error_probe(queries, k, weight, num_blocks=7, key_valid=nothing, **arguments) == 0
    ).all()


def test_what_the_kernel_cannot_take_is_told():
    queries, k, weight, perm, offsets = problem(torch.float32, rows=3)
    arguments = {"perm": perm, "offsets": offsets, "scale": 1.0, "num_blocks": 7}
    with pytest.raises(ValueError, match="fp32, not fp64"):
        error_probe(queries.double(), k, weight, backend="triton", **arguments)
    with pytest.raises(ValueError, match="expected one of auto, reference, triton, got 'batched'"):
        error_probe(queries, k, weight, backend="batched", **arguments)
