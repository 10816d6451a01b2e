"""SVG-EAR against its equations: clusters, error probe, greedy budget, centroid compensation."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import dit_accel
from dit_accel import InputError, State, presets
from dit_accel.cluster import KMeans
from dit_accel.error_route import ErrorAware
from dit_accel.kernels.error_probe import error_probe
from dit_accel.kernels.kmeans import bisected, kmeans, reference
from dit_accel.rest import Centroid, Drop, Moment, Taylor
from dit_accel.types import Context, Geometry

GRID = (3, 5, 7)


def inputs(seed=0, batch=2, heads=2, length=105, depth=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, depth, generator=generator, dtype=torch.float64)


def blobs(seed=0, batch=2, heads=3, length=60, depth=4, centres=5):
    """Tokens around a few centres, far from each other."""
    generator = torch.Generator().manual_seed(seed)
    middle = 10 * torch.randn(batch, heads, centres, depth, generator=generator)
    member = torch.randint(0, centres, (batch, heads, length), generator=generator)
    where = middle.gather(2, member.unsqueeze(-1).expand(-1, -1, -1, depth))
    return where + 0.1 * torch.randn(where.shape, generator=generator)


def inertia(x, labels, centroids):
    return (x - centroids.gather(2, labels.unsqueeze(-1).expand_as(x))).square().sum()


def test_kmeans_is_lloyds(monkeypatch):
    """One iteration, by hand, from given centroids; with chunks of one token too."""
    x = inputs(1)[0]
    start = x[:, :, :4].clone()
    for chunk in (reference.WORKSPACE_BYTES, 1):
        monkeypatch.setattr(reference, "WORKSPACE_BYTES", chunk)
        labels, centroids = kmeans(x, 4, iterations=1, start=start)
        for b in range(2):
            for h in range(2):
                first = torch.cdist(x[b, h], start[b, h]).argmin(-1)
                means = torch.stack([x[b, h][first == c].mean(0) for c in range(4)])
                torch.testing.assert_close(centroids[b, h], means, rtol=0, atol=1e-12)
                assert torch.equal(labels[b, h], torch.cdist(x[b, h], means).argmin(-1))


def test_kmeans_goes_downhill_and_ends():
    x = blobs()
    values = [
        inertia(x, *kmeans(x, 5, iterations=i, seed=3)).item() for i in (0, 1, 2, 3, 5, 50, 51)
    ]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(values))
    assert values[-1] == values[-2]


def test_kmeans_is_deterministic_and_every_head_is_alone():
    x = blobs()
    labels, centroids = kmeans(x, 5, iterations=10, seed=1)
    again = kmeans(x, 5, iterations=10, seed=1)
    assert torch.equal(labels, again[0])
    assert torch.equal(centroids, again[1])
    alone = kmeans(x[1:, 2:], 5, iterations=10, seed=1)
    assert torch.equal(labels[1:, 2:], alone[0])
    assert not torch.equal(kmeans(x, 5, iterations=0, seed=2)[1], kmeans(x, 5, iterations=0)[1])


def test_what_is_not_valid_moves_no_centroid():
    x = blobs(length=40)
    valid = torch.arange(40) < torch.tensor([[40], [25]])
    wanted = kmeans(x[1:, :, :25], 4, iterations=8, start=x[1:, :, :4])
    holes = x.masked_fill(~valid[:, None, :, None], torch.nan)
    labels, centroids = kmeans(holes, 4, iterations=8, start=x[:, :, :4], valid=valid)
    assert torch.equal(labels[1:, :, :25], wanted[0])
    torch.testing.assert_close(centroids[1:], wanted[1], rtol=0, atol=1e-5)
    assert centroids.isfinite().all()
    _, drawn = kmeans(holes, 25, iterations=0, valid=valid)
    assert (drawn[1][:, :, None] == x[1][:, None, :25]).all(-1).any(2).all()


def test_an_empty_cluster_stays_where_it_was():
    x = torch.zeros(1, 1, 6, 2)
    start = torch.tensor([[[[0.0, 0.0], [9.0, 9.0]]]])
    labels, centroids = kmeans(x, 2, iterations=3, start=start)
    assert (labels == 0).all()
    assert torch.equal(centroids, start)


@pytest.mark.parametrize("rest", [Drop(), Centroid(), Taylor(), Moment(), Moment("gaussian")])
@pytest.mark.parametrize("padded", [False, True])
def test_the_probe_follows_its_equation(oracle, rest, padded):
    q, k, v = inputs(2)
    valid = None
    if padded:
        valid = torch.rand(2, 105, generator=torch.Generator().manual_seed(0)) < 0.7
    ctx = Context(Geometry(GRID, key_valid=valid))
    layout = KMeans(q_clusters=4, k_clusters=6)
    blocked = layout(q, k, v, ctx, 0.4)
    queries = blocked.query_mean()
    error = error_probe(
        queries,
        k,
        rest.log_weight(blocked, queries),
        perm=blocked.keys.perm,
        offsets=blocked.keys.offsets,
        num_blocks=6,
        scale=0.4,
        key_valid=valid,
    )
    for b in range(2):
        keep = [True] * 105 if valid is None else valid[b].tolist()
        for h in range(2):
            rows = oracle.lists(blocked.queries, b, h)
            columns = oracle.only_valid(oracle.lists(blocked.keys, b, h), keep)
            kind = {Drop: "drop", Moment: "moment"}.get(type(rest), "centroid")
            weight = getattr(rest, "weight", "second")
            wanted = oracle.probe(q[b, h], k[b, h], rows, columns, 0.4, kind, weight)
            wanted = torch.tensor(wanted, dtype=torch.float64)
            torch.testing.assert_close(error[b, h], wanted, rtol=0, atol=1e-12)


def test_the_probe_does_not_overflow():
    q, k, v = inputs(3) * 60
    ctx = Context(Geometry(GRID))
    blocked = KMeans(q_clusters=4, k_clusters=6)(q, k, v, ctx, 1.0)
    plan = ErrorAware(0.3)(blocked, Moment("gaussian"), ctx)
    assert set(plan.code.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize("density", [0.01, 0.22, 0.6, 1.0])
def test_the_budget_is_greedy(oracle, density):
    from dit_accel.kernels.error_probe import choose_within

    generator = torch.Generator().manual_seed(4)
    error = torch.rand(1, 2, 5, 9, generator=generator, dtype=torch.float64)
    count = torch.randint(0, 20, (1, 2, 9), generator=generator)
    count[0, 0, 3] = 0
    chosen = choose_within(error, count, density)
    for h in range(2):
        blocks = [list(range(size)) for size in count[0, h].tolist()]
        wanted = oracle.within(error[0, h].tolist(), blocks, density)
        assert torch.where(chosen[0, h], 1, -1).tolist() == wanted


@pytest.mark.parametrize("text", [None, slice(0, 9), slice(105, 114)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_whole_method_follows_the_equations(oracle, text, padded):
    q, k, v = inputs(5, length=105 + (9 if text else 0))
    length = q.shape[2]
    valid = None
    if padded:
        valid = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.8
    ctx = Context(Geometry(GRID, text, valid))
    method = presets.svg_ear(density=0.4, q_clusters=4, k_clusters=9)
    out, report = method(q, k, v, ctx, scale=0.5)
    blocked = method.layout(q, k, v, ctx, 0.5)
    code = method.route(blocked, method.rest, ctx).code
    assert 0 < report.density <= 0.4 + (0.25 if text else 0)
    for b in range(2):
        keep = [True] * length if valid is None else valid[b].tolist()
        for h in range(2):
            wanted, _ = oracle.attend(
                q[b, h],
                k[b, h],
                v[b, h],
                oracle.lists(blocked.queries, b, h),
                oracle.only_valid(oracle.lists(blocked.keys, b, h), keep),
                code[b, h].tolist(),
                0.5,
                rest="taylor",
                taylor=None,
            )
            torch.testing.assert_close(out[b, h], wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", ["kmeans", "raster", "gilbert", "tile3d", "cyclic"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), GRID])
def test_full_density_is_dense(layout, grid):
    length = math.prod(grid) + 3
    q, k, v = inputs(6, length=length)
    text = slice(length - 3, length)
    method = presets.svg_ear(density=1.0, layout=layout, block_size=16)
    out, report = dit_accel.attention(q, k, v, method, grid=grid, text=text, return_report=True)
    wanted = torch.softmax(q @ k.mT * 6**-0.5, -1) @ v
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    assert report.density == 1.0


def test_warm_starts_belong_to_a_layer_and_a_branch(monkeypatch):
    calls = []
    real = reference.kmeans

    def spy(x, clusters, iterations, start, valid, seed):
        calls.append((iterations, start is not None))
        return real(x, clusters, iterations, start, valid, seed)

    monkeypatch.setattr(reference, "kmeans", spy)
    q, k, v = inputs(7)
    state, method = State(), presets.svg_ear(q_clusters=3, k_clusters=5)

    def call(**where):
        calls.clear()
        dit_accel.attention(q, k, v, method, grid=GRID, state=state, **where)
        return calls[0]

    assert call(branch="cond") == (49, False)
    assert call(branch="uncond") == (49, False)
    assert call(branch="cond", layer=1) == (49, False)
    assert call(branch="cond", step=1) == (0, True)
    state.clear()
    assert call(branch="cond", step=2) == (49, False)
    assert len(calls) == 2, "queries and keys have partitions of their own"
    method = presets.svg_ear(q_clusters=3, k_clusters=5, share_branches=True)
    call(branch="cond", layer=2)
    assert call(branch="uncond", layer=2) == (0, True)
    method = replace(method, layout=replace(method.layout, next_iterations=2))
    assert call(branch="cond", layer=2) == (1, True)


@pytest.mark.parametrize("padded", [False, True])
def test_an_iteration_ends_with_means(padded):
    """Tokens go to the nearest centroid, and then the centroids to the middle of their tokens."""
    q, k, v = inputs(9)
    valid = None
    if padded:
        valid = torch.rand(2, 105, generator=torch.Generator().manual_seed(4)) < 0.7
        q, k, v = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (q, k, v))
    state, layout = State(), KMeans(3, 5, first_iterations=1, next_iterations=2)
    ctx = Context(Geometry(GRID, key_valid=valid), state=state)
    for iterations in (1, 2):
        before = {name: x.clone() for name, x in ctx.memory.items()}
        blocked = layout(q, k, v, ctx)
        for name, x, blocks in (("queries", q, blocked.queries), ("keys", k, blocked.keys)):
            slot, clusters = f"kmeans {name}", blocks.num_video
            start = before.get(slot)
            labels, nearest = kmeans(
                x, clusters, iterations=iterations - 1, start=start, valid=valid
            )
            keep = torch.ones_like(labels) if valid is None else valid[:, None].expand_as(labels)
            for b, h in ((0, 0), (1, 1)):
                middle = []
                for c in range(clusters):
                    some = x[b, h][(labels[b, h] == c) & keep[b, h].bool()]
                    middle.append(some.mean(0) if len(some) else nearest[b, h, c])
                made = ctx.memory[slot][b, h]
                apart = torch.cdist(made, torch.stack(middle)).sort(0).values[0]
                assert (apart < 1e-12).all(), "in whatever order"
                of = blocks.perm[b, h].tensor_split(blocks.offsets[b, h, 1:-1].tolist())
                wanted = {
                    frozenset((labels[b, h] == c).nonzero().flatten().tolist())
                    for c in range(clusters)
                }
                assert {frozenset(some.tolist()) for some in of} == wanted


def test_neighbours_are_alike():
    """Points of a line come in its order, from either end; every centroid has one place."""
    place = torch.rand(2, 3, 37, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = bisected(place * torch.tensor([3.0, -1.0, 0.5]))
    steps = place.squeeze(-1).gather(-1, order).diff(dim=-1).sign()
    assert (steps == steps[..., :1]).all()
    blob = torch.randn(2, 3, 37, 8, generator=torch.Generator().manual_seed(1))
    assert (bisected(blob).sort(-1).values == torch.arange(37)).all()
    assert bisected(torch.zeros(1, 1, 5, 2)).flatten().tolist() == [0, 1, 2, 3, 4]
    assert bisected(blob[:, :, :1]).shape == (2, 3, 1)


def test_another_batch_starts_afresh():
    state, method = State(), presets.svg_ear(q_clusters=3, k_clusters=5)
    for batch in (2, 1):
        q, k, v = inputs(8, batch=batch)
        out = dit_accel.attention(q, k, v, method, grid=GRID, state=state)
    assert torch.equal(out, dit_accel.attention(q, k, v, method, grid=GRID))


def test_clusters_scale_with_the_sequence():
    q = torch.zeros(1, 1, 75_600, 1)
    layout = KMeans(first_iterations=0)
    blocked = layout(q, q, q, Context(Geometry((21, 45, 80))))
    assert (blocked.queries.num_video, blocked.keys.num_video) == (300, 1000)
    q = q[:, :, :7]
    layout = KMeans(q_clusters=99, k_clusters=99)
    blocked = layout(q, q, q, Context(Geometry((1, 1, 7))))
    assert (blocked.queries.num_video, blocked.keys.num_video) == (7, 7)


def test_bad_options_are_told():
    for options, message in (
        ({"density": 0}, "density: expected float > 0"),
        ({"q_clusters": 0}, "q_clusters: expected"),
        ({"layout": "means"}, "did you mean 'kmeans'"),
        ({"seed": -1}, "seed: expected int >= 0"),
    ):
        with pytest.raises(InputError, match=message):
            presets.svg_ear(**options)
    with pytest.raises(InputError, match="k_clusters: expected a positive integer, got 0"):
        KMeans(k_clusters=0)
    with pytest.raises(ValueError, match="clusters: expected 1 to 4, got 5"):
        kmeans(torch.zeros(1, 1, 4, 2), 5, iterations=1)
