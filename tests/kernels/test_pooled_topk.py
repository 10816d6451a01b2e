"""A plan of the best blocks, and the pairs that it computes, by plain torch and by kernels."""

import pytest
import torch

from dit_accel.kernels.pair_count import pair_count
from dit_accel.kernels.pooled_topk import pooled_topk, share_of

pytest.importorskip("triton")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def means(rows, columns, depth=16, heads=2, device="cpu"):
    """Means of whole numbers, whose products are exact in fp32, so that plans must be the same."""
    generator = torch.Generator().manual_seed(rows * columns)
    made = [
        torch.randint(-3, 4, (1, heads, n, depth), generator=generator).float()
        for n in (rows, columns)
    ]
    count = torch.randint(0, 4, (1, heads, columns), generator=generator)
    return *(x.to(device) for x in made), count.to(device)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("density", [1e-9, 0.15, 0.3, 1.0])
@pytest.mark.parametrize(
    ("rows", "columns", "q_blocks", "k_blocks"),
    [
        *((5, 9, 7, 11), (17, 70, 17, 70), (3, 0, 3, 2), (0, 4, 2, 4), (16, 64, 16, 64)),
        # scores by a library
        *((5, 300, 7, 303), (9, 512, 9, 512), (3, 0, 3, 260), (0, 270, 2, 270), (1, 600, 2, 1025)),
    ],
)
def test_the_kernel_plans_what_plain_torch_does(rows, columns, q_blocks, k_blocks, density, device):
    query, key, count = means(q_blocks, k_blocks, device=device)
    options = {"rows": rows, "columns": columns, "scale": 0.25, "density": density}
    plans = [
        pooled_topk(query, key, count, None, backend=backend, **options)
        for backend in ("reference", "triton")
    ]
    assert torch.equal(*plans)
    plan = plans[0]
    assert bool((plan[:, :, rows:] == 1).all())
    assert bool((plan[..., columns:] == 1).all())
    wanted = share_of((count[..., :columns] > 0).sum(-1), density)
    some = (count[..., :columns] > 0).any(-1)
    taken = (plan[:, :, :rows, :columns] == 1).sum(-1)
    assert torch.equal(taken, (wanted * some)[..., None].expand_as(taken))


@pytest.mark.parametrize("columns", [40, 400])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_norm_of_a_covariance_counts(device, columns):
    query, key, count = means(20, columns, device=device)
    norm = torch.rand(1, 2, columns, generator=torch.Generator().manual_seed(1)).to(device) * 50
    options = {"rows": 20, "columns": columns, "scale": 0.25, "density": 0.3}
    got = pooled_topk(query, key, count, norm, backend="triton", **options)
    exact = pooled_topk(
        query.double(), key.double(), count, norm.double(), backend="reference", **options
    )
    plain = pooled_topk(query, key, count, None, backend="triton", **options)
    assert torch.equal(got, exact)
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_some_heads_at_a_time(monkeypatch, pairs):
    """Of two elements of a batch; counts that heads share, and those that elements share."""
    monkeypatch.setattr("dit_accel.kernels.pooled_topk.triton._SCORE_BYTES", pairs * 4 * 5 * 290)
    query, key, count = means(6, 300, heads=6)
    query, key = query.view(2, 3, 6, 16), key.view(2, 3, 300, 16)
    options = {"rows": 5, "columns": 290, "scale": 0.25, "density": 0.2}
    for counts in (count[:, :1], count.view(2, 3, 300), count.view(2, 3, 300)[:, :1]):
        plans = [
            pooled_topk(query, key, counts, None, backend=backend, **options)
            for backend in ("reference", "triton")
        ]
        assert torch.equal(*plans)


def test_the_share_is_that_of_double_precision():
    # 0.29 * 100 is 28.999999999999996 in fp64, and 29 in fp32
    query, key, _ = means(1, 100)
    count = torch.ones(1, 1, 100, dtype=torch.int32)
    options = {"rows": 1, "columns": 100, "scale": 1.0, "density": 0.29}
    plan = pooled_topk(query, key, count, None, backend="triton", **options)
    assert (plan == 1).sum(-1).unique().tolist() == [28]


def test_a_plan_refuses_what_does_not_fit():
    query, key, count = means(3, 5)
    options = {"rows": 3, "columns": 5, "scale": 1.0, "density": 0.5}
    with pytest.raises(ValueError, match="rows, columns: expected at most 3 and 5, got 4, 5"):
        pooled_topk(query, key, count, None, **{**options, "rows": 4})
    with pytest.raises(ValueError, match="count: expected"):
        pooled_topk(query, key, count[..., 1:], None, **options)
    with pytest.raises(ValueError, match="expected fp32 or fp64"):
        pooled_topk(query.half(), key.half(), count, None, **options)
    with pytest.raises(ValueError, match="it takes fp32, not"):
        pooled_topk(query.double(), key.double(), count, None, backend="triton", **options)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 300), (70, 5)])
def test_pairs_are_counted(rows, columns, device):
    generator = torch.Generator().manual_seed(rows)
    code = torch.randint(-1, 3, (2, 3, rows, columns), generator=generator).to(torch.int8)
    keys = torch.randint(0, 10**6, (2, 1, columns), generator=generator)
    queries = torch.randint(0, 10**4, (1, 3, rows), dtype=torch.int32, generator=generator)
    exact = ((code == 1) * keys.unsqueeze(-2)).sum(-1)
    for weights, wanted in ((queries, (exact * queries).sum(-1)), (None, exact.sum(-1))):
        given = [code, keys, weights]
        given = [None if x is None else x.to(device) for x in given]
        for backend in ("reference", "triton"):
            assert torch.equal(pair_count(*given, backend=backend).cpu(), wanted)
    chosen = (code == 1).to(device)
    assert torch.equal(pair_count(chosen, keys.to(device), backend="triton").cpu(), exact.sum(-1))
    apart = torch.nn.functional.pad(chosen, (0, 5), value=True)[..., :columns]
    assert torch.equal(pair_count(apart, keys.to(device), backend="triton").cpu(), exact.sum(-1))


def test_a_count_refuses_what_does_not_fit():
    code = torch.ones(1, 1, 2, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"keys: expected integers \[B\|1, H\|1, 3\]"):
        pair_count(code, torch.ones(1, 1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"queries: expected integers \[B\|1, H\|1, 2\]"):
        pair_count(code, torch.ones(1, 1, 3, dtype=torch.int64), torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match="code: expected int8 or bool"):
        pair_count(code.float(), torch.ones(1, 1, 3, dtype=torch.int64))
