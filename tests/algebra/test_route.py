"""Plans, by hand and against the equations."""

import math

import pytest
import torch

from dit_accel import Context, Geometry, InputError
from dit_accel.layout import Blocked, Gilbert, Raster
from dit_accel.rest import Drop
from dit_accel.route import Everything, PooledScore, choose_topk, choose_topp
from dit_accel.types import EXACT, REST, Blocks


def inputs(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(3))


def test_topk_by_hand():
    """Two tokens a block; q̄ and k̄ are plain to see, and so is the best block."""
    k = torch.tensor([1.0, 1, 5, 5, -2, -2, 3, 3]).view(1, 1, 8, 1)
    q = torch.tensor([1.0, 1, -1, -1, 1, 1, 0, 2]).view(1, 1, 8, 1)
    made = Raster(2)(q, k, torch.ones_like(k), Context(Geometry((1, 1, 8))), 1.0)
    plan = PooledScore(density=0.5, bias=False)(made, Drop(), Context(Geometry((1, 1, 8))))
    assert (plan.code[0, 0] == EXACT).int().tolist() == [
        [0, 1, 0, 1],
        [1, 0, 1, 0],
        [0, 1, 0, 1],
        [0, 1, 0, 1],
    ]
    assert set(plan.code.unique().tolist()) == {EXACT, REST}
    assert plan.code.dtype == torch.int8


@pytest.mark.parametrize(
    ("density", "blocks", "count"),
    [(0.15, 256, 38), (0.15, 6, 1), (0.001, 9, 1), (0.5, 5, 2), (1.0, 7, 7), (0.29, 100, 28)],
)
def test_the_budget_is_the_floor_and_at_least_one(density, blocks, count):
    assert max(1, math.floor(density * blocks)) == count
    score = torch.randn(1, 2, 3, blocks)
    chosen = choose_topk(score, torch.full((1, 2), blocks), density)
    assert (chosen.sum(-1) == count).all()
    worst = score.masked_fill(~chosen, torch.inf).amin(-1)
    assert (score.masked_fill(chosen, -torch.inf).amax(-1) <= worst).all()


def test_topp_by_hand():
    logit = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().view(1, 1, 1, 4)
    for p, chosen in (
        (0.4, [1]),
        (0.5, [1]),
        (0.51, [1, 3]),
        (0.76, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        assert choose_topp(logit.double(), p).flatten().nonzero().flatten().tolist() == chosen, p


def test_topp_weighs_a_block_by_its_tokens():
    """Equal scores, but the second block is nine times as long."""
    x = torch.zeros(1, 1, 10, 1)
    perm = torch.arange(10).view(1, 1, -1)
    keys = Blocks(perm, torch.tensor([0, 1, 10], dtype=torch.int32).view(1, 1, -1), 2)
    ctx = Context(Geometry((1, 1, 10)))
    made = Blocked(x, x, x, keys, keys, ctx.geometry, 1.0)
    code = PooledScore("topp", p=0.8, bias=False)(made, Drop(), ctx).code
    assert code[0, 0].tolist() == [[REST, EXACT], [REST, EXACT]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("select", ["topk", "topp"])
@pytest.mark.parametrize("padded", [False, True])
def test_plans_follow_the_equations(oracle, select, bias, padded):
    geometry = Geometry((2, 5, 6), slice(3, 10))
    q, k, v = inputs(2, 2, 67, 4)
    valid = torch.ones(2, 67, dtype=torch.bool)
    if padded:
        valid[0, 5:10] = False  # text
    ctx = Context(Geometry(geometry.grid, geometry.text, valid if padded else None))
    made = Gilbert(8, query_block_size=11)(q, k, v, ctx, 0.7)
    if padded:
        valid[1, made.keys.perm[0, 0, 6:35]] = False  # video: whole blocks, and a part of one
    code = PooledScore(select, density=0.4, p=0.6, bias=bias)(made, Drop(), ctx).code
    for b in range(2):
        queries = oracle.lists(made.queries)
        keys = oracle.only_valid(oracle.lists(made.keys), valid[b])
        nq, nk = made.queries.num_video, made.keys.num_video
        assert padded is False or b == 0 or any(not tokens for tokens in keys[:nk])
        for h in range(2):
            table = oracle.scores(q[b, h], k[b, h], v[b, h], queries[:nq], keys[:nk], 0.7, bias)
            wanted = oracle.topk(table, 0.4) if select == "topk" else oracle.topp(table, keys, 0.6)
            assert code[b, h].tolist() == oracle.with_text(wanted, len(queries), len(keys))


def test_everything_is_exact():
    q, k, v = inputs(1, 2, 30, 4)
    ctx = Context(Geometry((1, 5, 6)))
    made = Raster(4)(q, k, v, ctx, 1.0)
    assert (Everything()(made, Drop(), ctx).code == EXACT).all()


def test_heads_are_routed_alike_in_small_groups(monkeypatch):
    """The scores are computed for a few heads at a time, which changes nothing."""
    q, k, v = inputs(2, 5, 60, 4)
    ctx = Context(Geometry((1, 6, 10)))
    route = PooledScore(density=0.3)
    whole = route(Raster(8)(q, k, v, ctx, 1.0), Drop(), ctx).code
    monkeypatch.setattr("dit_accel.route._CHUNK_BYTES", 1)
    assert torch.equal(whole, route(Raster(8)(q, k, v, ctx, 1.0), Drop(), ctx).code)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_densities_outside_are_named(density):
    with pytest.raises(InputError, match=r"density: expected float > 0, <= 1, got"):
        PooledScore(density=density)
    with pytest.raises(InputError, match=r"p: expected float > 0, <= 1, got"):
        PooledScore(p=density)
    with pytest.raises(InputError, match="select: expected 'topk' or 'topp', got 'best'"):
        PooledScore("best")
