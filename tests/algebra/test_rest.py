"""Every rest, by every route and layout, against the equations token by token in fp64."""

import pytest
import torch

from dit_accel import Context, Geometry, InputError, Partial, merge
from dit_accel.attend import attend, direct, report
from dit_accel.layout import Cyclic, Gilbert, Raster, Tile3D
from dit_accel.rest import Centroid, Drop, Moment, Taylor
from dit_accel.route import Everything, PooledScore
from dit_accel.types import DROP, EXACT, REST, Plan

RESTS = {
    "drop": Drop(),
    "centroid": Centroid(),
    "taylor-global": Taylor("global"),
    "taylor-rest": Taylor("rest"),
    "taylor-none": Taylor(None),
    "second-global": Moment("second", "global"),
    "second-rest": Moment("second", "rest"),
    "second-none": Moment("second", None),
    "gaussian-global": Moment("gaussian", "global"),
    "gaussian-rest": Moment("gaussian", "rest"),
    "gaussian-none": Moment("gaussian", None),
}
ROUTES = {
    "topk": PooledScore("topk", density=0.3),
    "topk-unbiased": PooledScore("topk", density=0.6, bias=False),
    "topp": PooledScore("topp", p=0.5),
}
LAYOUTS = {
    "raster": Raster(7),
    "gilbert": Gilbert(6, query_block_size=9),
    "tile3d": Tile3D((2, 2, 3)),
    "cyclic": Cyclic(frames=2, window=(2, 3), box=(2, 3, 2)),
}
# fp64: sums of under a hundred terms of order 1, in two orders
EXACTLY = {"rtol": 0, "atol": 1e-12}


def problem(padded, seed=0, batch=2, heads=2, depth=5):
    generator = torch.Generator().manual_seed(seed)
    grid, text = (3, 4, 4), slice(0, 5) if seed % 2 else slice(48, 53)
    q, k, v = (
        torch.randn(batch, heads, 53, depth, generator=generator, dtype=torch.float64)
        for _ in range(3)
    )
    k = k + torch.randn(depth, generator=generator, dtype=torch.float64)  # means that matter
    valid = None
    if padded:
        valid = torch.ones(batch, 53, dtype=torch.bool)
        valid[0, text.start + 2 : text.stop] = False
        valid[-1, 10:22] = False
    return q, k, v, Context(Geometry(grid, text, valid), layer=1)


def against_oracle(oracle, made, plan, rest, name, got):
    kind, _, taylor = name.partition("-")
    weight = kind if kind in ("second", "gaussian") else "second"
    kind = "moment" if kind in ("second", "gaussian") else kind
    batch, heads, length = made.q.shape[:3]
    valid = made.geometry.key_valid
    for b in range(batch):
        keep = [True] * length if valid is None else valid[b].tolist()
        keys = oracle.only_valid(oracle.lists(made.keys, b), keep)
        for h in range(heads):
            code = plan.code.expand(batch, heads, -1, -1)[b, h].tolist()
            out, lse = oracle.attend(
                made.q[b, h],
                made.k[b, h],
                made.v[b, h],
                oracle.lists(made.queries, b),
                keys,
                code,
                made.scale,
                rest=kind,
                taylor=None if taylor in ("", "none") else taylor,
                weight=weight,
                video=made.keys.num_video,
            )
            torch.testing.assert_close(got.out[b, h], out, **EXACTLY)
            torch.testing.assert_close(got.lse[b, h], lse, **EXACTLY)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rest", RESTS)
def test_rest_and_route_follow_the_equations(oracle, rest, route, padded):
    # the layout changes with the pair, so that all are met without trying every combination
    which = list(LAYOUTS)[(list(RESTS).index(rest) + list(ROUTES).index(route)) % len(LAYOUTS)]
    q, k, v, ctx = problem(padded, seed=len(rest) + padded)
    made = LAYOUTS[which](q, k, v, ctx, 0.6)
    plan = ROUTES[route](made, RESTS[rest], ctx)
    got = attend(made, plan, RESTS[rest], ctx)
    against_oracle(oracle, made, plan, RESTS[rest], rest, got)


@pytest.mark.parametrize("rest", RESTS)
def test_plans_by_hand_with_left_out_blocks_and_empty_rows(oracle, rest):
    """Codes 0 and -1 side by side, rows with nothing exact, and rows with nothing at all."""
    q, k, v, ctx = problem(False, batch=1, heads=1)
    made = Raster(7)(q, k, v, ctx, None)
    code = torch.full((1, 1, 8, 8), REST, dtype=torch.int8)
    generator = torch.Generator().manual_seed(3)
    code[0, 0] = torch.randint(-1, 2, (8, 8), generator=generator)
    code[0, 0, 1] = REST
    code[0, 0, 2] = DROP
    code[0, 0, 3] = EXACT
    code[0, 0, 4, :7], code[0, 0, 4, 7] = EXACT, DROP
    code[..., 7][code[..., 7] == REST] = DROP  # text is never left to a rest
    plan = Plan(code)
    got = attend(made, plan, RESTS[rest], ctx)
    assert (got.out[0, 0, 14:21] == 0).all()
    assert (got.lse[0, 0, 14:21] == -torch.inf).all()
    if rest == "drop":
        assert (got.lse[0, 0, 7:14] == -torch.inf).all()
    against_oracle(oracle, made, plan, RESTS[rest], rest, got)


@pytest.mark.parametrize("rest", RESTS)
def test_attend_is_the_merge_of_exact_and_rest(rest):
    q, k, v, ctx = problem(True)
    made = Gilbert(6)(q, k, v, ctx, None)
    plan = PooledScore(density=0.3)(made, RESTS[rest], ctx)
    fused = attend(made, plan, RESTS[rest], ctx)
    only_rest = Plan(torch.where(plan.code == EXACT, DROP, plan.code))
    alone = attend(made, only_rest, RESTS[rest], ctx)
    if rest.endswith("-rest"):
        # its C_i is over the blocks of code -1, which are the same ones
        assert (plan.code == REST).equal(only_rest.code == REST)
    both = merge(direct(made, plan, ctx), alone)
    torch.testing.assert_close(fused.out, both.out, **EXACTLY)
    torch.testing.assert_close(fused.lse, both.lse, **EXACTLY)


def test_complementary_plans_merge_to_dense():
    q, k, v, ctx = problem(True)
    made = Tile3D((2, 2, 2))(q, k, v, ctx, None)
    code = PooledScore(density=0.4)(made, Drop(), ctx).code
    other = Plan(torch.where(code == EXACT, DROP, EXACT).to(torch.int8))
    whole = direct(made, Everything()(made, Drop(), ctx), ctx)
    parts = merge(direct(made, Plan(code), ctx), direct(made, other, ctx))
    torch.testing.assert_close(parts.out, whole.out, **EXACTLY)
    torch.testing.assert_close(parts.lse, whole.lse, **EXACTLY)


def test_report_counts_pairs_one_by_one(oracle):
    q, k, v, ctx = problem(True)
    made = Gilbert(6, query_block_size=9)(q, k, v, ctx, None)
    plan = PooledScore("topp", p=0.4)(made, Drop(), ctx)
    got = report(made, plan)
    valid = ctx.geometry.key_valid
    for b in range(2):
        queries = oracle.lists(made.queries)
        keys = oracle.only_valid(oracle.lists(made.keys), valid[b])
        for h in range(2):
            exact = sum(
                len(rows) * len(columns)
                for i, rows in enumerate(queries)
                for j, columns in enumerate(keys)
                if plan.code[b, h, i, j] == EXACT
            )
            assert got.exact_pairs[b, h] == exact
            assert got.all_pairs[b, h] == 53 * int(valid[b].sum())
    assert got.density == int(got.exact_pairs.sum()) / int(got.all_pairs.sum())
    torch.testing.assert_close(got.head_density, got.exact_pairs / got.all_pairs.double())


def test_summary_is_computed_once_and_only_what_is_asked_for(monkeypatch):
    import dit_accel.layout as layout

    calls = []
    real = layout.block_summary
    monkeypatch.setattr(
        layout, "block_summary", lambda *a, **kw: calls.append(kw) or real(*a, **kw)
    )
    q, k, v, ctx = problem(False)
    made = Raster(8)(q, k, v, ctx, None)
    assert made.summary().k_var is None
    assert made.summary().cov_sum is None
    assert made.summary() is made.summary()
    assert len(calls) == 1
    full = made.summary("k_var", "cov")
    assert full.k_var is not None
    assert full.cov_norm is not None
    assert made.summary("cov") is full
    assert len(calls) == 2


def test_options_outside_are_named():
    with pytest.raises(InputError, match="taylor: expected 'global', 'rest' or None, got 'first'"):
        Taylor("first")
    with pytest.raises(InputError, match="weight: expected 'second' or 'gaussian', got 'third'"):
        Moment("third")


def test_partial_type():
    q, k, v, ctx = problem(False)
    made = Raster(8)(q, k, v, ctx, None)
    assert isinstance(direct(made, Everything()(made, Drop(), ctx), ctx), Partial)
