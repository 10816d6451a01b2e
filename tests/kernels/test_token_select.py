"""Selection by gates: the kernels, interpreted, against sorting in fp64."""

import pytest
import torch

from dit_accel.kernels import token_select as operation

pytest.importorskip("triton")


def token_select(*given, **options):
    return operation.token_select(*given, **options).select()


def problem(dtype, whole, length=150, blocks=40, depth=16):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, length, depth, generator=generator)
    k_mean = torch.randn(2, 2, blocks, depth, generator=generator)
    if whole:  # a few values, and many pairs that are equal
        q, k_mean = q.round(), k_mean.round()
    own = torch.randint(0, blocks - 3, (2, 2, length), generator=generator)
    full = torch.rand(2, 1, blocks, generator=generator) < 0.8
    return q.to(dtype), k_mean, own, full


@pytest.mark.parametrize("text_span", [(0, 0), (0, 20), (130, 150)])
@pytest.mark.parametrize(("mode", "threshold"), [("threshold", 0.31), ("topk", 0.13)])
def test_ties_go_to_the_first(mode, threshold, text_span):
    q, k_mean, own, full = problem(torch.float16, whole=True)
    full[1] = False  # nothing but own blocks and text
    options = {"num_video": 37, "text_span": text_span, "threshold": threshold, "mode": mode}
    got = token_select(q, k_mean, own, full, backend="triton", **options)
    wanted = token_select(q.double(), k_mean.double(), own, full, **options)
    assert got.dtype == torch.bool
    assert torch.equal(got, wanted)
    assert 0.05 < got[0, :, 30:120].double().mean() < 0.6


@pytest.mark.parametrize("blocks", [75, 96])
@pytest.mark.parametrize("text_span", [(0, 0), (280, 300)])
@pytest.mark.parametrize(("mode", "threshold"), [("threshold", 0.31), ("topk", 0.13)])
def test_tiles_whose_own_blocks_are_elsewhere(mode, threshold, text_span, blocks):
    q, k_mean, _, full = problem(torch.float16, whole=True, length=300, blocks=blocks)
    full |= True
    full[1, 0, -9] = False
    own = (torch.arange(300) * (blocks - 4) // 300).view(1, 1, -1)
    options = {"num_video": blocks - 3, "text_span": text_span, "threshold": threshold}
    options["mode"] = mode
    got = token_select(q, k_mean, own, full, backend="triton", **options)
    wanted = token_select(q.double(), k_mean.double(), own, full, **options)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("dtype", "threshold"),
    [
        (torch.float16, 0.001),
        (torch.float16, 0.25),
        (torch.float32, 0.25),
        (torch.float16, 0.9999),
    ],
)
def test_the_cut_is_found(dtype, threshold):
    q, k_mean, own, full = problem(dtype, whole=False, length=90)
    options = {"num_video": 40, "text_span": (0, 0), "threshold": threshold}
    got = token_select(q, k_mean, own, full, backend="triton", **options)
    wanted = token_select(q.double(), k_mean.double(), own, full, **options)
    gate = q.double() @ k_mean.double().mT
    for b in range(2):
        for h in range(2):
            some = gate[b, h][:, full[b, 0]]
            differs = got[b, h] != wanted[b, h]
            assert differs.sum() <= 2
            # gates are told apart by a few units of fp32
            assert (gate[b, h][differs].diff().abs() <= 4e-7 * (some.max() - some.min())).all()


def test_equal_gates_and_full_thresholds():
    q = torch.ones(1, 1, 70, 16)
    own = torch.zeros(1, 1, 70, dtype=torch.int64)
    full = torch.ones(1, 1, 5, dtype=torch.bool)
    options = {"num_video": 5, "text_span": (0, 0)}
    for mode, share in (("threshold", 0.5), ("topk", 0.5), ("topk", 0.999)):
        both = [
            token_select(
                q, q[:, :, :5], own, full, mode=mode, threshold=share, backend=name, **options
            )
            for name in ("triton", "reference")
        ]
        assert torch.equal(*both)
        assert both[0].sum() == (70 if mode == "threshold" else int(350 * share))


def test_what_does_not_fit_is_told():
    q, k_mean, own, full = problem(torch.float32, whole=False)
    options = {"num_video": 40, "text_span": (0, 0), "threshold": 0.5}
    with pytest.raises(ValueError, match="among all pairs of a head"):
        token_select(q, k_mean, own, full, scope="token", backend="triton", **options)
    with pytest.raises(ValueError, match=r"own: expected torch.int64 \[2\|1, 2\|1, 150\]"):
        token_select(q, k_mean, own[..., :3], full, **options)
    with pytest.raises(ValueError, match="num_video: expected 0 to 40, got 41"):
        token_select(q, k_mean, own, full, **{**options, "num_video": 41})


@pytest.mark.parametrize("mode", ["threshold", "topk"])
@pytest.mark.parametrize("misled", [1.0, 0.01, 4.0])
def test_a_guess_of_some_tokens_decides_nothing(monkeypatch, mode, misled):
    monkeypatch.setattr("dit_accel.kernels.token_select.triton._SAMPLES", ((7, 0),))
    q, k_mean, own, full = problem(torch.float32, whole=False, length=210)
    q[:, :, ::7] *= misled  # those that are looked at have gates like no others
    options = {"num_video": 40, "text_span": (0, 0), "threshold": 0.25, "mode": mode}
    got = token_select(q, k_mean, own, full, backend="triton", **options)
    wanted = token_select(q.double(), k_mean.double(), own, full, **options)
    assert (got != wanted).sum() <= 4
