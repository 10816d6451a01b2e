"""Dense attention as a partial: against fp64, whole and in pieces."""

import pytest
import torch

from dit_accel import Partial, merge
from dit_accel.kernels.dense_attention import chunked, dense_attention, partial_attention

BACKENDS = pytest.mark.parametrize("backend", ["chunked", "flash"])


def inputs(lq=37, lk=53, depth=8, dtype=torch.float64, batch=2, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, length, depth, generator=generator, dtype=torch.float64).to(dtype)
        for length in (lq, lk, lk)
    ]


def exact(q, k, v, valid=None, scale=None):
    q, k, v = q.double(), k.double(), v.double()
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return weights @ v, lse


def bounds(q, k, v, scale=None):
    """Twice the errors of the same mathematics in the low precision; a few roundings in fp64.

    An error of the lse is a relative error of a weight in a merge. The flash attention of torch's
    CPU has a faster exponential for halves, so that the rounding of ``out`` is the yardstick there.
    """
    wanted, norm = exact(q, k, v, scale=scale)
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    rounding = 32 * torch.finfo(torch.float64).eps
    out = 2 * (logits.softmax(-1) @ v - wanted).abs().max() + rounding
    if q.dtype.itemsize == 2:
        return out, torch.finfo(q.dtype).eps / 2
    return out, 2 * (logits.logsumexp(-1) - norm).abs().max() + rounding


@BACKENDS
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("lengths", [(37, 53), (130, 7), (1, 300), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_fp64(backend, scale, lengths, dtype):
    q, k, v = inputs(*lengths, dtype=dtype)
    out, lse = partial_attention(q, k, v, scale=scale, backend=backend)
    assert out.dtype == dtype
    assert out.shape == q.shape
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    wanted, norm = exact(q, k, v, scale=scale)
    most, most_of_lse = bounds(q, k, v, scale)
    assert (out.double() - wanted).abs().max() <= most
    assert (lse.double() - norm).abs().max() <= most_of_lse


@pytest.mark.parametrize("workspace", [1, 4000, 8 * 2**20])
def test_masks_and_chunks(monkeypatch, workspace):
    monkeypatch.setattr("dit_accel.kernels.ragged.WORKSPACE_BYTES", workspace)
    q, k, v = inputs(batch=3)
    valid = torch.rand(3, 53, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[2] = False
    poisoned = [x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (k, v)]
    out, lse = partial_attention(q, *poisoned, key_valid=valid)
    wanted, norm = exact(q, k, v, valid)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, norm, rtol=0, atol=1e-13)
    assert not out[2].any()
    assert (lse[2] == -torch.inf).all()


def test_no_chunk_is_larger_than_the_workspace(monkeypatch):
    seen = []

    class Workspace(chunked.Workspace):
        def take(self, name, *shape):
            seen.append(torch.Size(shape).numel() * 8)
            return super().take(name, *shape)

    monkeypatch.setattr(chunked, "Workspace", Workspace)
    monkeypatch.setattr("dit_accel.kernels.ragged.WORKSPACE_BYTES", 2000)
    partial_attention(*inputs(), backend="chunked")
    assert max(seen) <= 2000


@BACKENDS
def test_pieces_merge_to_the_whole(backend):
    q, k, v = inputs()
    pieces = [
        Partial(*partial_attention(q, k[:, :, a:b], v[:, :, a:b], backend=backend))
        for a, b in ((0, 10), (10, 10), (10, 53))
    ]
    whole = merge(*pieces)
    torch.testing.assert_close(whole.out, dense_attention(q, k, v), rtol=0, atol=1e-13)
    torch.testing.assert_close(whole.lse, exact(q, k, v)[1], rtol=0, atol=1e-13)


@BACKENDS
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[:, :, ::2],
        lambda x: x.mT.contiguous().mT,
        lambda x: x[..., ::2],
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
        lambda x: x.flip(2),
    ],
)
def test_any_strides(backend, change):
    q, k, v = (change(x) for x in inputs())
    out, lse = partial_attention(q, k, v, backend=backend)
    wanted, norm = exact(q, k, v)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, norm, rtol=0, atol=1e-13)


@pytest.mark.parametrize("lengths", [(4, 0), (0, 4)])
def test_nothing_to_attend_to(lengths):
    q, k, v = inputs(*lengths, dtype=torch.bfloat16)
    out, lse = partial_attention(q, k, v)
    assert out.shape == q.shape
    assert not out.any()
    assert lse.dtype == torch.float32
    assert (lse == -torch.inf).all()


def test_auto_takes_flash_where_it_can(monkeypatch):
    q, k, v = inputs()
    valid = torch.ones(2, 53, dtype=torch.bool)
    monkeypatch.setattr(chunked, "partial_attention", lambda *a: "chunked")
    assert partial_attention(q, k, v) != "chunked"
    assert partial_attention(q, k, v, key_valid=valid) == "chunked"
    assert partial_attention(q, k, v, backend="chunked") == "chunked"
    with pytest.raises(ValueError, match="can run here, got 'flash': it takes no key mask"):
        partial_attention(q, k, v, key_valid=valid, backend="flash")


def test_what_does_not_fit():
    q, k, v = inputs()
    for given, message in (
        ((q, k, v[:, :, :-1]), "expected .B, H, Lq, D. and twice"),
        ((q[..., :4], k, v), "expected .B, H, Lq, D. and twice"),
        ((q[:, :1], k, v), "expected .B, H, Lq, D. and twice"),
        ((q.float(), k, v), "expected one dtype"),
        ((q.int(), k.int(), v.int()), "expected fp16, bf16"),
        ((q.requires_grad_(), k, v), "expected no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            partial_attention(*given)
    q = q.detach()
    with pytest.raises(ValueError, match=r"key_valid: expected bool .2, 53."):
        partial_attention(q, k, v, key_valid=torch.ones(2, 37, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"backend: expected one of auto, flash3, .*, got 'x'"):
        partial_attention(q, k, v, backend="x")


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [8, 20, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype, depth):
    q, k, v = inputs(130, 300, depth, dtype)
    wanted, norm = exact(q, k, v)
    most, most_of_lse = bounds(q, k, v)
    for backend in ("auto", "chunked"):
        out, lse = partial_attention(q.cuda(), k.cuda(), v.cuda(), backend=backend)
        assert out.dtype == dtype
        assert lse.shape == norm.shape
        assert lse.dtype == torch.promote_types(dtype, torch.float32)
        assert (out.cpu().double() - wanted).abs().max() <= most
        assert (lse.cpu().double() - norm).abs().max() <= most_of_lse
