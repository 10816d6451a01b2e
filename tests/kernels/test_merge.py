"""The merge: each implementation against fp64, empty rows, and on top of block attention."""

import pytest
import torch

from dit_accel.kernels.merge import merge


def parts(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        out = torch.randn(2, 3, 37, 16, generator=generator)
        lse = torch.randn(2, 3, 37, generator=generator) * 4
        made.append((out.to(dtype), lse))
    empty = torch.zeros(2, 3, 37, dtype=torch.bool)
    empty[:, :, 5:9] = True
    made[0][0][empty], made[0][1][empty] = 0.0, -torch.inf
    empty[:, :, 7:12] = True
    made[1][0][:, :, 7:12], made[1][1][:, :, 7:12] = 0.0, -torch.inf
    return made


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_against_fp64(backend, dtype):
    (a, a_lse), (b, b_lse) = parts(dtype)
    out, lse = merge(a, a_lse, b, b_lse, backend=backend)
    peak = torch.maximum(a_lse, b_lse).double()
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = [(x.double() - peak).exp().unsqueeze(-1) for x in (a_lse, b_lse)]
    total = (weights[0] + weights[1]).clamp(min=1e-300)
    exact = (weights[0] * a.double() + weights[1] * b.double()) / total
    # one rounding of the result, and of a few sums in fp32
    bound = torch.finfo(dtype).eps * exact.abs().max() + 1e-6
    assert (out.double() - exact).abs().max() <= bound
    wanted = torch.logaddexp(a_lse.double(), b_lse.double())
    assert torch.equal(lse == -torch.inf, wanted == -torch.inf)
    finite = wanted > -torch.inf
    assert (lse.double() - wanted)[finite].abs().max() <= 1e-5
    assert torch.equal(out[:, :, 7:9], torch.zeros_like(out[:, :, 7:9]))
    assert torch.equal(out[:, :, 5:7], b[:, :, 5:7])
    assert torch.equal(lse[:, :, 5:7], b_lse[:, :, 5:7])


def test_guards():
    (a, a_lse), (b, b_lse) = parts(torch.float32)
    with pytest.raises(ValueError, match="expected out"):
        merge(a, a_lse, b[:, :, 1:], b_lse)
    with pytest.raises(ValueError, match="one dtype"):
        merge(a, a_lse, b.half(), b_lse)
