"""Block importance against its definition, and its kernels, interpreted, against fp64."""

import pytest
import torch

from dit_accel.kernels.block_importance import block_importance

pytest.importorskip("triton")


def problem(dtype=torch.float64, depth=32):
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(2, 2, 3, 200, depth, generator=generator)).to(dtype)
    draws = torch.stack([torch.randperm(200, generator=generator) for _ in range(6)])
    q_tokens, k_tokens = draws[:, :90].view(2, 3, 90), draws[:, 90:].view(2, 3, 110)
    q_bounds = torch.tensor([0, 0, 30, 31, 70, 70, 80], dtype=torch.int32).view(1, 1, -1)
    k_bounds = torch.tensor(
        [[0, 0, 16, 32, 33, 66, 70, 90], [0] * 8, [0, 1, 2, 3, 4, 5, 109, 109]], dtype=torch.int32
    )
    return (
        q,
        k,
        {
            "q_tokens": q_tokens,
            "q_bounds": q_bounds,
            "k_tokens": k_tokens,
            "k_bounds": k_bounds.view(1, 3, -1),
            "scale": 0.1,
        },
    )


def test_the_definition():
    q, k, samples = problem()
    importance = block_importance(q, k, **samples)
    rows, columns = (samples[name][0].tolist() for name in ("q_bounds", "k_bounds"))
    for b in range(2):
        for h in range(3):
            line, sides = rows[0], columns[h]
            keys = k[b, h, samples["k_tokens"][b, h, : sides[-1]]]
            queries = q[b, h, samples["q_tokens"][b, h, : line[-1]]]
            share = (0.1 * queries @ keys.mT).softmax(-1)
            wanted = torch.tensor(
                [
                    [
                        float(share[line[i] : line[i + 1], sides[j] : sides[j + 1]].sum())
                        for j in range(len(sides) - 1)
                    ]
                    for i in range(len(line) - 1)
                ],
                dtype=torch.float64,
            )
            torch.testing.assert_close(importance[b, h], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("longest", [None, 16])
@pytest.mark.parametrize("budget", [2**30, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_agrees_with_fp64(monkeypatch, dtype, budget, longest):
    monkeypatch.setattr("dit_accel.kernels.block_importance.triton.KEPT_BYTES", budget)
    q, k, samples = problem(dtype)
    if longest:
        # a cell each, a turn of empty blocks among them
        sizes = torch.tensor([[16, 0, 7, 16, 1] + [0] * 20 + [5, 16]] * 2 + [[0] * 27])
        ends = sizes.to(torch.int32).cumsum(-1).to(torch.int32).view(1, 3, -1)
        samples["k_bounds"] = torch.nn.functional.pad(ends, (1, 0))
    options = {**samples, "k_longest": longest, "backend": "triton"}
    got = block_importance(q, k.mT.contiguous().mT, **options)
    wanted = block_importance(q.double(), k.double(), **samples)
    plain = block_importance(q.float(), k.float(), **samples)
    bound = 2 * (plain - wanted).abs().max() + 64 * torch.finfo(torch.float32).eps
    if dtype == torch.float16:
        # sums of up to 40 queries are kept in fp16
        bound = bound + wanted * 2**-11 + 40 * 2**-25
    assert ((got - wanted).abs() <= bound).all()


def test_bad_samples_are_told():
    q, k, samples = problem()
    samples["q_bounds"] = samples["q_bounds"].long()
    with pytest.raises(ValueError, match=r"q_bounds: expected torch.int32 \[2\|1, 3\|1, ...\]"):
        block_importance(q, k, **samples)
