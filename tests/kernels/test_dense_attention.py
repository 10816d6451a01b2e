"""Dense attention over some of the keys."""

import pytest
import torch

from dit_accel.kernels.dense_attention import api, dense_attention, dense_partial
from dit_accel.partial import Partial, merge


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2**26])
def test_partials_of_the_keys_merge_into_attention_over_all(dtype, chunk, monkeypatch):
    monkeypatch.setattr(api, "_CHUNK_BYTES", chunk)
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 11, 8, generator=draw).to(dtype)
    k, v = torch.randn(2, 2, 3, 17, 8, generator=draw).to(dtype)
    parts = [
        Partial(*dense_partial(q, k[:, :, some], v[:, :, some], scale=0.7))
        for some in (slice(0, 5), slice(5, 6), slice(6, None))
    ]
    assert parts[0].out.dtype == dtype
    assert parts[0].lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = dense_attention(q.double(), k.double(), v.double(), scale=0.7)
    error = (merge(*parts).out.double() - wanted).abs().max()
    # 17 products are summed for every value, in fp64 where the oracle is no better
    low = (dense_attention(q, k, v, scale=0.7).double() - wanted).abs().max()
    assert error <= 2 * low + 17 * torch.finfo(torch.float64).eps


def test_what_does_not_fit():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"with k and v \[B, H, M, D\]"):
        dense_partial(q, k, k[:, :1])
    with pytest.raises(ValueError, match=r"M > 0"):
        dense_partial(q, k[:, :, :0], k[:, :, :0])
    with pytest.raises(ValueError, match="one dtype"):
        dense_partial(q, k.double(), k.double())
