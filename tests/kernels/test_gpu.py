"""On a CUDA device: what `auto` chooses there, against fp64 on the CPU."""

import pytest
import torch

import dit_accel
from dit_accel import presets

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
