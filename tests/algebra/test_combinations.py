"""Any layout with any route that makes sense with any rest, against the equations in fp64."""

import pytest
import torch

from dit_accel import Context, Geometry, Method
from dit_accel.cluster import KMeans
from dit_accel.combinations import LAYOUTS, RESTS, ROUTES, table
from dit_accel.error_route import ErrorAware
from dit_accel.layout import Cyclic, Gilbert, Raster, Tile3D
from dit_accel.pyramid import CAPS, Pyramid
from dit_accel.rest import Drop, Moment
from dit_accel.route import PooledScore
from dit_accel.token_route import Gate

GRID, TEXT = (3, 4, 5), slice(60, 67)
SCALE = 5**-0.5
EVERY = list(table())
TRIPLES = [(one.layout, one.route, one.rest) for one in EVERY if one.reason is None]
MADE = {
    "raster": Raster(8),
    "gilbert": Gilbert(8, query_block_size=12),
    "tile3d": Tile3D((2, 2, 2)),
    "cyclic": Cyclic(2, (3, 4), (2, 2, 3)),
    "kmeans": KMeans(4, 6),
}


def test_every_layout_is_tried():
    assert set(MADE) == set(LAYOUTS)


class Seen:
    """A route that keeps what it was given and what it answered."""

    def __init__(self, route):
        self.route, self.needs = route, route.needs

    def __call__(self, blocked, rest, ctx):
        self.blocked, self.plan = blocked, self.route(blocked, rest, ctx)
        return self.plan


def names_of(rest):
    """How the oracle calls a rest: its kind, weight and first-order term."""
    kind = {Drop: "drop", Moment: "moment"}.get(type(rest), "taylor")
    taylor = getattr(rest, "taylor", None)
    return {"rest": kind, "weight": getattr(rest, "weight", "second"), "taylor": taylor}


def wanted_plan(oracle, route, rest, q, k, v, blocked, queries, every, keep):
    """Query blocks and the code of every pair, straight from the equations."""
    rows, columns = blocked.queries.num_video, blocked.keys.num_video
    keys = oracle.only_valid(every, keep)
    video = keys[:columns]
    if isinstance(route, Gate):
        chosen = oracle.selection(
            q, k, range(60), every[:columns], keep, route.threshold, route.scope, route.mode
        )
        code = [[1 if taken else -1 for taken in row] for row in chosen]
        return [[n] for n in range(67)], oracle.with_text(code, 67, len(keys))
    if isinstance(route, PooledScore):
        scores = oracle.scores(q, k, v, queries[:rows], video, SCALE, route.bias)
        code = (
            oracle.topk(scores, route.density)
            if route.select == "topk"
            else oracle.topp(scores, video, route.p)
        )
    elif isinstance(route, ErrorAware):
        names = names_of(rest)
        errors = oracle.probe(q, k, queries[:rows], video, SCALE, names["rest"], names["weight"])
        code = oracle.within(errors, video, route.density)
    elif isinstance(route, Pyramid):
        caps = CAPS if route.similarity_cap else None
        code = oracle.levels(q, k, queries[:rows], video, SCALE, route.ratios, route.mode, caps)
    else:
        code = [[1] * columns for _ in range(rows)]
    return queries, oracle.with_text(code, len(queries), len(keys))


@pytest.mark.parametrize(("layout", "route", "rest"), TRIPLES)
def test_whatever_is_not_refused_follows_the_equations(oracle, layout, route, rest):
    """Plan and output, on a shape that nothing divides, with text and with padding in both."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 67, 5, generator=generator, dtype=torch.float64)
    q = 2 * q  # attention that is neither flat nor one-hot
    valid = torch.rand(2, 67, generator=generator) < 0.9
    seen = Seen(ROUTES[route])
    method = Method(MADE[layout], seen, RESTS[rest])
    out, report = method(q, k, v, Context(Geometry(GRID, TEXT, valid), layer=2))
    blocked = seen.blocked
    # head by head the oracle takes its time: one batch element and head, another for every case
    for b, h in [divmod(TRIPLES.index((layout, route, rest)) % 4, 2)]:
        keep = valid[b].tolist()
        queries, every = oracle.lists(blocked.queries, b, h), oracle.lists(blocked.keys, b, h)
        keys = oracle.only_valid(every, keep)
        one = q[b, h], k[b, h], v[b, h]
        queries, code = wanted_plan(
            oracle, ROUTES[route], RESTS[rest], *one, blocked, queries, every, keep
        )
        names = names_of(RESTS[rest])
        wanted, _ = oracle.attend(
            *one, queries, keys, code, SCALE, video=blocked.keys.num_video, **names
        )
        torch.testing.assert_close(out[b, h], wanted, rtol=0, atol=1e-12)
        exact = sum(
            len(rows) * len(columns)
            for i, rows in enumerate(queries)
            for j, columns in enumerate(keys)
            if code[i][j] == 1
        )
        assert report.exact_pairs[b, h] == exact
        assert report.all_pairs[b, h] == 67 * sum(keep)


def test_what_is_refused_has_a_reason():
    refused = {(one.layout, one.route, one.rest): one.reason for one in EVERY if one.reason}
    assert set(refused) == {
        (layout, route, rest)
        for layout in LAYOUTS
        for route, rest in (
            ("gate", "taylor, rest"),
            ("gate", "moment, rest"),
            *(("pyramid", rest) for rest in RESTS if rest != "drop"),
        )
    }
    assert all(len(reason) > 20 for reason in refused.values())
    assert len(EVERY) == len(LAYOUTS) * len(ROUTES) * len(RESTS)
