"""What a method computes beside its exact pairs, against counts by hand."""

from dataclasses import replace

import pytest
import torch

from dit_accel import Context, Geometry, Method, presets
from dit_accel.cluster import KMeans
from dit_accel.error_route import ErrorAware
from dit_accel.eval.operations import Tally, counted
from dit_accel.layout import Cyclic, Raster
from dit_accel.pyramid import Pyramid
from dit_accel.rest import Centroid, Drop, Moment, Taylor
from dit_accel.route import Everything, PooledScore
from dit_accel.state import State
from dit_accel.token_route import Gate
from dit_accel.types import DROP, EXACT, REST, Plan

# 48 tokens, of which 8-token blocks are 6; 2 heads of 12 channels
GRID, TOKENS, HEADS, DEPTH = (3, 4, 4), 48, 2, 12


def tensors(batch=1, text=0):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, batch, HEADS, TOKENS + text, DEPTH, generator=generator)


def count(method, *, ctx=None, given=None):
    """Operations of one call, by part."""
    tally = Tally()
    q, k, v = tensors() if given is None else given
    made = counted(method, tally)
    out, _ = made(q, k, v, ctx or Context(Geometry(GRID)))
    plain, _ = method(q, k, v, replace(ctx, state=State()) if ctx else Context(Geometry(GRID)))
    if ctx is None:
        assert torch.equal(out, plain), "counting changes nothing"
    return tally.total()


class ByHand:
    """A plan that is given, of 6 by 6 blocks."""

    needs = ()
    refuses = None

    def __init__(self, code, levels=()):
        self.code, self.levels = torch.tensor(code, dtype=torch.int8).view(1, 1, 6, 6), levels

    def __call__(self, blocked, rest, ctx):
        return Plan(self.code, self.levels)


def test_everything_exact_adds_nothing():
    assert count(Method(Raster(8), Everything(), Drop())) == dict.fromkeys(
        ("layout", "route", "rest"), 0
    )


@pytest.mark.parametrize(
    ("rest", "layout", "rest_of"),
    [
        # a third of 6 blocks is 2 exact and 4 left: a logit and a value of 12 channels for each
        # of 48 queries and 4 blocks
        (Drop(), 0, 0),
        (Centroid(), 0, 4 * 12 * 48 * 4),
        # C of 48 keys, and q C of 48 queries
        (Taylor(), 2 * 48 * 12 * 12, 4 * 12 * 48 * 4 + 2 * 48 * 12 * 12),
        (Moment(taylor=None), 0, 6 * 12 * 48 * 4),
        # 6 rows take the C of their own 2 blocks of 8 keys out
        (
            Taylor("rest"),
            2 * 48 * 12 * 12,
            4 * 12 * 48 * 4 + 2 * 48 * 12 * 12 + 6 * 2 * 8 * 2 * 12 * 12,
        ),
    ],
)
def test_rests_beside_a_pooled_score(rest, layout, rest_of):
    found = count(Method(Raster(8), PooledScore("topk", 0.34, bias=False), rest))
    assert found == {
        "layout": HEADS * layout,
        "route": HEADS * 2 * 6 * 6 * 12,
        "rest": HEADS * rest_of,
    }


def test_the_bias_of_the_score_needs_the_covariances():
    found = count(Method(Raster(8), PooledScore("topk", 0.34, bias=True), Drop()))
    assert found["layout"] == HEADS * 2 * 48 * 12 * 12


def test_pooled_levels():
    code = [[EXACT, 2, 4, 8, DROP, DROP]] * 6
    found = count(Method(Raster(8), ByHand(code, (2, 4, 8)), Drop()))
    # of 8 keys 4, 2 and 1 pooled ones
    assert found["rest"] == HEADS * 4 * 12 * 48 * (4 + 2 + 1)


def test_a_ragged_row_counts_its_own_queries():
    code = [[EXACT] * 6] * 5 + [[REST] * 6]
    q, k, v = tensors()
    method = Method(Raster(9), ByHand(code), Centroid())
    # five blocks of 9 and one of 3
    assert count(method, given=(q, k, v))["rest"] == HEADS * 4 * 12 * 3 * 6


def test_routing_by_error_and_by_importance():
    probe = count(Method(Raster(8), ErrorAware(0.3), Centroid()))["route"]
    # 6 mean queries with 48 keys, and with 6 mean keys
    assert probe == HEADS * 2 * 6 * (48 + 6) * 12
    found = count(Method(Raster(8, query_block_size=16), Pyramid(), Drop()))["route"]
    # 3 blocks of 4 sampled queries, 6 of 2 sampled keys
    assert found == HEADS * 2 * 12 * 12 * 12


def test_tokens_that_choose():
    layout = Cyclic(1, (2, 2), (1, 2, 2))
    given = tensors()
    dropped, stood = (
        count(Method(layout, Gate(0.5, "token", "topk"), rest), given=given)
        for rest in (Drop(), Centroid())
    )
    # three chunks of a frame, of which a token takes one, its own
    assert dropped == {"layout": 0, "route": HEADS * 2 * 48 * 3 * 12, "rest": 0}
    assert stood["rest"] == HEADS * 4 * 12 * 48 * 2


def test_clusters_are_counted_by_rounds():
    layout = KMeans(q_clusters=3, k_clusters=5, first_iterations=7, next_iterations=2)
    method, tally, state = Method(layout, ErrorAware(0.3), Centroid()), Tally(), State()
    q, k, v = tensors()
    for step, rounds in ((0, 7), (1, 2)):
        tally.clear()
        counted(method, tally)(q, k, v, Context(Geometry(GRID), step=step, state=state))
        assert tally.total()["layout"] == HEADS * 2 * 48 * (3 + 5) * 12 * rounds


def test_what_is_kept_is_not_computed():
    inner = Method(Raster(8), PooledScore("topk", 0.34, bias=False), Taylor())
    method, tally, state = presets.flashblock(inner=inner, refresh=2), Tally(), State()
    q, k, v = tensors()
    made = []
    for step in range(3):
        tally.clear()
        counted(method, tally)(q, k, v, Context(Geometry(GRID), step=step, state=state))
        made.append(tally.total())
    # a refresh computes every pair, which is in the density
    refresh = {"layout": HEADS * 2 * 48 * 12 * 12, "route": HEADS * 2 * 6 * 6 * 12, "rest": 0}
    assert made == [refresh, dict.fromkeys(refresh, 0), refresh]


def test_text_and_batches():
    q, k, v = tensors(batch=2, text=5)
    method = Method(Raster(8), PooledScore("topk", 0.34, bias=False), Centroid())
    ctx = Context(Geometry(GRID, slice(48, 53)))
    found = count(method, ctx=ctx, given=(q, k, v))
    assert found["route"] == 2 * HEADS * 2 * 6 * 6 * 12
    assert found["rest"] == 2 * HEADS * 4 * 12 * 48 * 4, "text is exact"


def test_a_route_that_nobody_knows_is_told():
    tally = Tally()
    q, k, v = tensors()
    method = Method(Raster(8), ByHand([[EXACT] * 6] * 6), Drop())
    counted(method, tally)(q, k, v, Context(Geometry(GRID)))
    assert tally.unknown == "nobody knows what the route ByHand computes"
