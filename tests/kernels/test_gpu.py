"""On a CUDA device: what `auto` chooses there, against fp64 on the CPU."""

import pytest
import torch

import dit_accel
from dit_accel import presets
from dit_accel.kernels.block_attention import RestTerms, block_attention
from dit_accel.kernels.block_summary import block_summary

pytestmark = pytest.mark.gpu
GRID = (5, 9, 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"rest": "moment", "taylor": "rest"}, {"rest": "drop"}])
def test_full_density_is_dense(dtype, options):
    q, k, v = torch.randn(3, 2, 3, 585, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = torch.softmax(q.double() @ k.double().mT * 64**-0.5, -1) @ v.double()
    low = torch.nn.functional.scaled_dot_product_attention(q.cuda(), k.cuda(), v.cuda())
    bound = 2 * (low.cpu().double() - exact).abs().max() + torch.finfo(torch.float32).eps * 8
    method = presets.pisa(density=1.0, **options)
    out = dit_accel.attention(q.cuda(), k.cuda(), v.cuda(), method, grid=GRID)
    assert (out.cpu().double() - exact).abs().max() <= bound


@pytest.mark.parametrize("rest", ["drop", "centroid", "taylor", "moment"])
def test_the_gpu_agrees_with_the_cpu(rest):
    q, k, v = torch.randn(
        3, 2, 3, 585, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    valid = torch.ones(2, 585, dtype=torch.bool)
    valid[1, 500:] = False
    method = presets.pisa(density=0.3, block_size=16, rest=rest)
    wanted = dit_accel.attention(q, k, v, method, grid=GRID, key_valid=valid)
    out = dit_accel.attention(
        q.cuda(), k.cuda(), v.cuda(), method, grid=GRID, key_valid=valid.cuda()
    )
    torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [None, "plain", "second"])
def test_ragged_blocks(kind, masked, depth, dtype):
    """Tiles of every length, and those that two groups of warps share: the same bits every time,
    at most twice the error of plain torch in the same precision."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 1, 2, 1500, depth, generator=generator).to(dtype).cuda()
    perm = torch.rand(2, 1, 2, 1500, generator=generator).argsort(-1).cuda()
    cuts = [0, 1, 64, 130, 130, 200, 392, 400, 640, 704, 1000, 1500]
    offsets = torch.tensor(cuts, dtype=torch.int32).cuda().view(1, 1, -1)
    code = torch.randint(-1, 2, (1, 2, 11, 11), generator=generator, dtype=torch.int8).cuda()
    valid = (torch.rand(1, 1500, generator=generator) < 0.8).cuda() if masked else None

    def run(backend, *parts):
        rest = None
        if kind is not None:
            found = block_summary(
                *parts[1:],
                perm=perm[1],
                offsets=offsets,
                num_video=11,
                key_valid=valid,
                k_var=True,
                backend="reference",
            )
            rest = RestTerms(found.k_mean, found.v_mean, found.count, found.k_var, kind)
        return block_attention(
            *parts,
            code,
            q_perm=perm[0],
            q_offsets=offsets,
            k_perm=perm[1],
            k_offsets=offsets,
            key_valid=valid,
            rest=rest,
            backend=backend,
        )

    exact = run("reference", *(x.double() for x in (q, k, v)))
    low, got, again = (run(name, q, k, v) for name in ("reference", "triton", "triton"))
    for mine, same, plain, wanted in zip(got, again, low, exact, strict=True):
        assert torch.equal(mine, same)
        some = wanted.isfinite()
        assert torch.equal(mine.isfinite(), some)
        most = wanted[some].abs().max()
        bound = 2 * (plain - wanted)[some].abs().max() + 2 * torch.finfo(dtype).eps * most
        assert (mine - wanted)[some].abs().max() <= bound
