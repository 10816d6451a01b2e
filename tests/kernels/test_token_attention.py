"""The kernels of token attention, interpreted, against the plain implementation in fp64."""

import pytest
import torch

from dit_accel.kernels.token_attention import runs, token_attention
from dit_accel.kernels.token_attention.triton import group_size

pytest.importorskip("triton")
OFFSETS = {
    1: [0, 70, 70, 160],
    2: [0, 5, 40, 40, 105, 160],
    4: [0, 3, 9, 20, 20, 31, 60, 77, 78, 99, 110, 140, 160],
}


def problem(dtype, size, seed=0, length=160, depth=32):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 2, length, depth, generator=generator).to(dtype)
    perm = torch.stack([torch.randperm(length, generator=generator) for _ in range(4)])
    offsets = torch.tensor(OFFSETS[size], dtype=torch.int32).view(1, 1, -1)
    select = torch.rand(2, 2, length, len(OFFSETS[size]) - 1, generator=generator) < 0.3
    select[0, 0, 3] = False
    select[0, 1, :, 1:] = False
    select[1, 0] = True
    return q, k, v, select, {"k_perm": perm.view(2, 2, length), "k_offsets": offsets, "scale": 0.3}


@pytest.mark.parametrize("budget", [2**30, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_kernels_agree_with_fp64(monkeypatch, size, dtype, budget):
    name = "dit_accel.kernels.token_attention.triton"
    monkeypatch.setattr(f"{name}.KEPT_BYTES", budget)
    monkeypatch.setattr(f"{name}.group_size", lambda length, blocks: size)
    q, k, v, select, order = problem(dtype, size)
    valid = None
    if size > 1:
        valid = torch.rand(2, 160, generator=torch.Generator().manual_seed(3)) < 0.8
        hole = ~valid[:, None, :, None]
        k, v = k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.nan)
    out, lse = token_attention(q, k, v, select, key_valid=valid, backend="triton", **order)
    exact = token_attention(q.double(), k.double(), v.double(), select, key_valid=valid, **order)
    plain = token_attention(q, k, v, select, key_valid=valid, **order)
    eps = torch.finfo(dtype).eps
    # the kernel rounds the weights, and every partial of a token once
    bound = 2 * (plain[0] - exact[0]).abs().max() + eps * v.nan_to_num().abs().max()
    assert (out - exact[0]).abs().max() <= bound
    nothing = exact[1] == -torch.inf
    assert nothing.any()
    assert torch.equal(lse == -torch.inf, nothing)
    assert (lse - exact[1])[~nothing].abs().max() <= 1e-4
    assert (out[nothing] == 0).all()


def test_strides_and_selections_of_all_heads():
    q, k, v, select, order = problem(torch.float32, 2)
    plain = token_attention(q, k, v, select[:1, :1], **order)
    flat = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    wide = torch.cat([select, select], -1)[:1, :1, :, : select.shape[3]]
    out, lse = token_attention(*flat, wide, backend="triton", **order)
    torch.testing.assert_close(out, plain[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, plain[1], rtol=0, atol=1e-5)


def test_small_blocks_go_together():
    assert [group_size(75_600, n) for n in (11, 147, 148, 300, 960)] == [1, 1, 2, 4, 4]


def test_what_the_kernel_cannot_take_is_told():
    q, k, v, select, order = problem(torch.float32, 1)
    with pytest.raises(ValueError, match="not torch"):
        token_attention(q.double(), k, v, select, backend="triton", **order)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [None, 1])
def test_on_hopper_whole_heads_or_parts_of_them(monkeypatch, budget, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel in Gluon is for Hopper")
    from dit_accel.eval.kernel_checks import check_token_attention
    from dit_accel.kernels.token_attention import hopper

    rooms = []

    def spied(*given, **sizes):
        rooms.append(runs.room_for(*given, **sizes))
        return rooms[-1]

    monkeypatch.setattr(hopper, "room_for", spied)
    monkeypatch.setattr(hopper, "KEPT_BYTES", budget)
    # a program then takes many items, one after another
    monkeypatch.setattr(hopper, "_processors", lambda device: 3)
    check_token_attention(dtype, 128, "cuda")
    assert rooms
    assert all((room.runs > 1) == (budget is not None) for room in rooms)
