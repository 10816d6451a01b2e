"""Claims of the papers that can be tested without weights: structured attention, several seeds."""

import pytest
import torch

import dit_accel
from dit_accel import Method, State, presets
from dit_accel.cluster import KMeans
from dit_accel.error_route import ErrorAware
from dit_accel.kernels.error_probe import choose_within
from dit_accel.layout import Cyclic, Gilbert, Raster, Tile3D
from dit_accel.rest import Centroid, Drop, Moment, Taylor
from dit_accel.route import PooledScore
from dit_accel.types import EXACT, REST, Plan

GRID = (4, 16, 16)
SEEDS = range(5)


def errors(qkv, methods, **where):
    """Relative error to dense and measured density, by name."""
    dense = dit_accel.attention(*qkv, "dense", grid=GRID)
    found = {}
    for name, method in methods.items():
        out, report = dit_accel.attention(*qkv, method, grid=GRID, return_report=True, **where)
        found[name] = (float((out - dense).norm() / dense.norm()), report.density)
    return found


def test_the_fields_attend_as_video_does(fields):
    """Neither flat nor one-hot: 15% of the keys hold most of the attention, and not all of it."""
    for seed in SEEDS:
        q, k, _ = fields.make(GRID, seed=seed)
        share = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).sort(-1, descending=True).values
        top = share[..., : share.shape[-1] * 15 // 100].sum(-1).mean(-1)
        assert ((top > 0.5) & (top < 0.98)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "layout",
    [Raster(32), Gilbert(32), Tile3D((2, 4, 4)), Cyclic(1, (2, 4), (2, 4, 4)), KMeans(16, 32)],
    ids=lambda layout: type(layout).__name__.lower(),
)
def test_a_rest_beats_leaving_out(fields, layout, seed):
    """PISA and SVG-EAR, *approximate, do not drop*: one plan, and all that differs is the rest."""
    rests = {"drop": Drop(), "centroid": Centroid(), "taylor": Taylor(), "moment": Moment()}
    found = errors(
        fields.make(GRID, seed=seed),
        {
            name: Method(layout, PooledScore(density=0.15, bias=False), rest)
            for name, rest in rests.items()
        },
        layer=2,
    )
    assert len({density for _, density in found.values()}) == 1
    error = {name: value for name, (value, _) in found.items()}
    assert error["centroid"] < 0.85 * error["drop"]
    assert error["taylor"] < 1.01 * error["centroid"]
    assert error["moment"] < 0.9 * error["centroid"]


class ByScore:
    """The same greedy choice under the same budget as `ErrorAware`, by attention to the centroid.

    ``n_j exp(s q̄_i·k̄_j)`` in place of the error, so that the densities are equal too.
    """

    needs = ()

    def __init__(self, density):
        self.density = density

    def __call__(self, blocked, rest, ctx):
        summary = blocked.summary()
        score = (blocked.query_mean() * blocked.scale) @ summary.k_mean.mT
        mass = (score - score.amax(-1, keepdim=True)).exp() * summary.count.unsqueeze(-2)
        chosen = choose_within(mass, summary.count, self.density)
        return Plan(torch.where(chosen, EXACT, REST).to(torch.int8))


@pytest.mark.parametrize(("queries", "keys"), [(32, 64), (32, 128)])
def test_routing_by_error_beats_routing_by_score(fields, queries, keys):
    """SVG-EAR: what has no good stand-in should be computed, not what weighs most."""
    ratios = []
    for seed in SEEDS:
        found = errors(
            fields.make(GRID, seed=seed),
            {
                name: Method(KMeans(queries, keys), route, Centroid())
                for name, route in (("error", ErrorAware(0.2)), ("score", ByScore(0.2)))
            },
        )
        assert found["error"][1] == pytest.approx(found["score"][1], rel=0.03)
        ratios.append(found["error"][0] / found["score"][0])
    assert max(ratios) < 1, ratios
    assert sum(ratios) / len(ratios) < 0.93, ratios


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pyramid_beats_keep_or_drop(fields, seed):
    """PSA: at equal cost, coarse keys for many blocks beat exact ones for a few."""
    # keys a row computes: 10% + 20%/2 + 20%/4 + 50%/8 of them, or 31% and nothing else
    found = errors(
        fields.make(GRID, seed=seed),
        {
            name: presets.psa(ratios=ratios, mode="topk", block_q=64, block_k=32)
            for name, ratios in (
                ("pyramid", (0.1, 0.3, 0.5, 1.0)),
                ("keep", (0.3125, 0.3125, 0.3125, 0.3125)),
            )
        },
    )
    assert found["pyramid"][0] < 0.85 * found["keep"][0]


INNERS = {
    "pisa": {"density": 0.15, "block_size": 32},
    "svg_ear": {"density": 0.15, "q_clusters": 16, "k_clusters": 32},
    "vmoba": {"threshold": 0.2},
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", INNERS)
def test_a_kept_outside_beats_dropping_it(fields, name, seed):
    """FlashBlock, for inputs that drift slowly: the same plan's pairs, with and without it."""
    methods = {
        "kept": presets.flashblock(inner=name, **INNERS[name]),
        "dropped": presets.build(name, rest="drop", **INNERS[name]),
    }
    states = {kind: State() for kind in methods}
    total = dict.fromkeys(methods, 0.0)
    for step in range(4):
        qkv = fields.make(GRID, seed=seed, drift=0.04 * step)
        for kind, method in methods.items():
            found = errors(qkv, {kind: method}, step=step, state=states[kind])
            total[kind] += found[kind][0] if step else 0.0  # the first step is a refresh
    assert total["kept"] < 0.5 * total["dropped"]
