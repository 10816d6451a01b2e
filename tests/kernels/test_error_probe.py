"""The probe's kernel, interpreted, against the plain implementation in fp64."""

import pytest
import torch

from dit_accel.kernels.error_probe import error_plan, error_probe

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


def spans(perm, offsets, valid, columns):
    """Valid keys of the first blocks, int64 ``[2, 2, columns]``."""
    keep = torch.ones(2, 150, dtype=torch.bool) if valid is None else valid
    keep = keep[:, None].expand(2, 2, 150).gather(2, perm)
    bounds = torch.nn.functional.pad(keep.cumsum(-1), (1, 0))[..., offsets[0, 0].long()]
    return bounds.diff(dim=-1)[..., :columns]


@pytest.mark.parametrize(
    ("dtype", "padded", "density"),
    [
        (torch.float16, False, 0.01),
        (torch.float32, True, 0.3),
        (torch.float16, True, 0.75),
        (torch.float32, False, 1.0),
    ],
)
def test_a_plan_takes_by_falling_error_while_keys_fit(dtype, padded, density):
    queries, k, weight, perm, offsets = problem(dtype, rows=5)
    valid = None
    if padded:
        valid = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) < 0.8
        valid[0, perm[0, 0, 80:82]] = False
    arguments = {"perm": perm, "offsets": offsets, "num_blocks": 7, "key_valid": valid}
    arguments["scale"] = 0.25
    options = {"density": density, "all_rows": 6}
    code = error_plan(queries, k, weight, backend="triton", **arguments, **options)
    assert code.shape == (2, 2, 6, 8)
    assert (code[:, :, 5:] == 1).all()
    assert (code[..., 7] == 1).all()
    error = error_probe(queries, k, weight, backend="triton", **arguments)
    count = spans(perm, offsets, valid, 7)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, queries.shape[:3])).tolist():
        keys = count[b, h]
        left = int(keys.sum() * density)
        ratio = (error[b, h, row] / keys).tolist()
        wanted = [-1] * 7
        some = [j for j in range(7) if keys[j]]
        ranked = sorted(some, key=lambda j: -ratio[j])
        for place, j in enumerate(ranked):
            if place and left < keys[j]:
                break
            wanted[j], left = 1, left - int(keys[j])
            if left < 0:
                break
        assert code[b, h, row, :7].tolist() == wanted
    plain = error_plan(queries, k, weight, backend="reference", **arguments, **options)
    # rounding may turn two that are nearly equal
    assert (plain == code).float().mean() > 0.99


def test_equal_errors_are_taken_from_the_first():
    """Nothing stands in and all keys are alike: all blocks are off by as much a key."""
    queries, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 12, 16)
    perm = torch.arange(12).view(1, 1, -1)
    offsets = torch.tensor([0, 3, 6, 6, 9, 12], dtype=torch.int32).view(1, 1, -1)
    weight = torch.full((1, 1, 1, 5), -torch.inf)
    for backend in ("reference", "triton"):
        code = error_plan(
            queries,
            k,
            weight,
            perm=perm,
            offsets=offsets,
            num_blocks=5,
            scale=1.0,
            density=0.75,
            all_rows=1,
            backend=backend,
        )
        assert code.flatten().tolist() == [1, 1, -1, 1, -1], backend


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
    options = {"density": 0.5, "all_rows": 4, **arguments}
    none = error_plan(queries[:, :, :0], k, weight[:, :, :0], num_blocks=7, **options)
    assert none.tolist() == torch.ones(2, 2, 4, 8).tolist()
    none = error_plan(queries, k, weight[..., :0], num_blocks=0, **options)
    assert none.tolist() == torch.ones(2, 2, 4, 8).tolist()
    nothing = torch.zeros(2, 150, dtype=torch.bool)
    none = error_plan(queries, k, weight, num_blocks=7, key_valid=nothing, **options)
    assert (none[:, :, :3, :7] == -1).all()
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
