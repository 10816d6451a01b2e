"""Budgets by layer and by step."""

import itertools

import pytest
import torch

import dit_accel
from dit_accel import Context, Geometry, InputError, Method, Schedule, State, presets
from dit_accel.density import ByLayer, ByStep, budget, in_words, plain, read_budget, share_at
from dit_accel.layout import Raster
from dit_accel.rest import Drop
from dit_accel.route import PooledScore

GRID = (4, 4, 6)


def at(given, step=0, num_steps=None, layer=0, num_layers=None):
    where = Geometry(GRID)
    ctx = Context(where, step=step, num_steps=num_steps, layer=layer, num_layers=num_layers)
    return share_at("density", budget("density", given), ctx)


@pytest.fixture
def qkv():
    return torch.randn(3, 1, 2, 96, 8, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    ("given", "means"),
    [
        (0.2, 0.2),
        (1, 1.0),
        ([0.3, 0.2], ByLayer((0.3, 0.2))),
        ((1, 0.5), ByLayer((1.0, 0.5))),
        ({0: 1.0, 0.2: 0.3}, ByStep(((0, 1.0), (0.2, 0.3)))),
        ({0: 1, 12: 0.3}, ByStep(((0, 1.0), (12, 0.3)))),
        ({"0": 1.0, "0.2": 0.3}, ByStep(((0, 1.0), (0.2, 0.3)))),
        ({"0": 1.0, "1e-1": 0.3, "0.5": 0.1}, ByStep(((0, 1.0), (0.1, 0.3), (0.5, 0.1)))),
        ({0.0: 0.4}, ByStep(((0, 0.4),))),
        (ByLayer((0.5,)), ByLayer((0.5,))),
    ],
)
def test_what_a_budget_may_be(given, means):
    found = budget("density", given)
    assert found == means
    assert budget("density", plain(found)) == found
    assert hash(found) == hash(means)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "density: expected float > 0, <= 1, got 0"),
        ("0.2", "density: expected float > 0, <= 1, got '0.2'"),
        (None, "density: expected float > 0, <= 1, got None"),
        ([0.2, 1.5], r"density\[1\]: expected float > 0, <= 1, got 1.5"),
        ([], "density: expected one share by layer, got none"),
        ({}, "density: expected a schedule that begins at step 0, got none"),
        ({5: 0.2}, "begins at step 0, got a first one at 5"),
        ({0: 1.0, 0.2: "x"}, r"density\[0.2\]: expected float > 0, <= 1, got 'x'"),
        ({0: 1.0, 8: 0.2, 4: 0.1}, r"expected steps that rise, got \[0, 8, 4\]"),
        ({0: 1.0, 0.2: 0.3, 12: 0.2}, "expected either counts of steps or fractions"),
        ({0: 1.0, 1.5: 0.3}, "fractions .0 <= fraction < 1., got 1.5"),
        ({0: 1.0, -1: 0.3}, "got -1"),
        ({True: 1.0}, "got True"),
        ({"first": 1.0}, "got 'first'"),
    ],
)
def test_bad_budgets_are_told_in_one_line(given, message):
    with pytest.raises(InputError, match=message) as caught:
        budget("density", given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("0.2", 0.2),
        ("1", 1.0),
        ("0.3,0.2,0.1", [0.3, 0.2, 0.1]),
        ("[0.3]", [0.3]),
        ("0:1.0,0.2:0.15", {"0": 1.0, "0.2": 0.15}),
        ("{0: 1, 12: .15}", {"0": 1.0, "12": 0.15}),
    ],
)
def test_budgets_from_a_command_line(text, means):
    assert read_budget(text) == means
    assert presets.parse_option("pisa", "density", text) == budget("density", means)


def test_words():
    assert in_words(0.15) == "0.15"
    assert in_words([0.3, 0.2]) == "0.3,0.2 by layer"
    assert in_words({0: 1.0, 0.2: 0.15}) == "0:1,0.2:0.15 by step"


def test_steps_count_from_the_first_of_a_stage():
    counts = {0: 1.0, 2: 0.5, 3: 0.25}
    assert [at(counts, step) for step in range(5)] == [1.0, 1.0, 0.5, 0.25, 0.25]
    shares = [at({0: 1.0, 0.2: 0.5, 0.5: 0.25}, step, 10) for step in range(10)]
    assert shares == [1.0] * 2 + [0.5] * 3 + [0.25] * 5
    # of two stages that begin at one step the later holds
    assert [at({0: 1.0, 0.01: 0.5, 0.02: 0.25}, step, 10) for step in range(2)] == [0.25, 0.25]
    with pytest.raises(InputError, match=r"density: a fraction .0.2. needs num_steps"):
        at({0: 1.0, 0.2: 0.5}, 0)


@pytest.mark.parametrize("num_steps", [1, 3, 4, 5, 25, 50])
@pytest.mark.parametrize("fraction", [0.1, 0.125, 0.24, 0.5, 0.9])
def test_fractions_round_as_dense_steps_do(num_steps, fraction):
    schedule = Schedule(dense_steps=fraction)
    for step in range(num_steps):
        ctx = Context(Geometry(GRID), step=step, num_steps=num_steps)
        assert (at({0: 1.0, fraction: 0.5}, step, num_steps) == 1.0) == schedule.is_dense(ctx)


def test_layers():
    shares = [0.3, 0.2, 0.1]
    assert [at(shares, layer=layer, num_layers=3) for layer in range(3)] == shares
    assert [at(shares, layer=layer) for layer in range(3)] == shares
    with pytest.raises(InputError, match="density: expected one share for each of the 4 layers"):
        at(shares, layer=1, num_layers=4)
    with pytest.raises(InputError, match="for each of the 4 layers, got 3"):
        at(shares, layer=3)


ROUTES = {
    "topk": lambda given: presets.pisa(density=given, block_size=8),
    "topp": lambda given: presets.pisa(route="topp", p=given, block_size=8),
    "error": lambda given: presets.svg_ear(density=given, q_clusters=6, k_clusters=12),
    "gate": lambda given: presets.vmoba(threshold=given, layout="raster", block_size=8),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_with_a_budget_takes_all_three_kinds(route, qkv):
    make = ROUTES[route]

    def run(given, **where):
        where = {"grid": GRID, "num_steps": 4, "num_layers": 2, **where}
        return dit_accel.attention(*qkv, make(given), return_report=True, **where)

    low, low_report = run(0.2)
    high, high_report = run(0.7)
    assert 0 < low_report.density < high_report.density < 1
    for given, where, wanted in (
        ([0.2, 0.7], {"layer": 0}, low),
        ([0.2, 0.7], {"layer": 1}, high),
        ({0: 0.7, 0.5: 0.2}, {"step": 1}, high),
        ({0: 0.7, 0.5: 0.2}, {"step": 2}, low),
        ({0: 0.7, 3: 0.2}, {"step": 3}, low),
    ):
        if "layer" in where and route == "error":
            where = {**where, "state": State()}
        assert torch.equal(run(given, **where)[0], wanted), (given, where)


@pytest.mark.parametrize("route", ROUTES)
def test_a_share_of_one_in_a_schedule_is_dense_attention(route, qkv, monkeypatch):
    method = ROUTES[route]({0: 1.0, 2: 0.3})
    wanted = torch.nn.functional.scaled_dot_product_attention(*qkv)
    where = Geometry(GRID)
    for step, dense in enumerate([True, True, False]):
        assert method.is_dense(Context(where, step=step)) == dense
    assert [
        ROUTES[route]([0.3, 1.0]).is_dense(Context(where, layer=layer)) for layer in (0, 1)
    ] == [False, True]
    # a plain 1 goes by way of the blocks, which is how they are checked against dense attention
    assert not ROUTES[route](1.0).is_dense(Context(where))
    monkeypatch.setattr("dit_accel.method.attend", None)
    out, report = dit_accel.attention(*qkv, method, grid=GRID, step=1, return_report=True)
    assert torch.equal(out, wanted)
    assert report.density == 1.0


def test_the_density_that_is_asked_for():
    assert presets.pisa(density=0.2).density_asked == 0.2
    assert presets.pisa(density=[0.2, 0.3]).density_asked == ByLayer((0.2, 0.3))
    assert presets.pisa(route={"name": "error", "density": 0.4}).density_asked == 0.4
    assert presets.flashblock(density=0.3).density_asked == 0.3
    for method in (presets.pisa(route="topp"), presets.vmoba(), presets.psa(), presets.dense()):
        assert method.density_asked is None


def test_layers_are_checked_before_a_call():
    method = Method(Raster(8), PooledScore(density=[0.1, 0.2]), Drop())
    method.check_layers(2, "transformer")
    with pytest.raises(
        InputError, match="density: expected one share for each of the 3 layers of transformer"
    ):
        method.check_layers(3, "transformer")
    with pytest.raises(InputError, match="dense_layers: expected layers from -2 to 1 of transform"):
        presets.pisa(dense_layers=(2,)).check_layers(2, "transformer")


def test_flashblock_refreshes_where_the_schedule_changes(qkv):
    """What is kept belongs to a plan, and another share makes another plan."""
    state = State()
    method = presets.flashblock(
        inner="pisa", density={0: 0.5, 2: 0.2}, rest="drop", block_size=8, refresh=10
    )
    densities = [
        dit_accel.attention(*qkv, method, grid=GRID, step=step, state=state, return_report=True)[
            1
        ].density
        for step in range(4)
    ]
    assert densities[0] == densities[2] == 1.0, "refreshes"
    assert densities[1] == pytest.approx(0.5)
    assert densities[3] == pytest.approx(2 / 12)


def test_reports_follow_a_schedule(qkv):
    method = presets.pisa(density={0: 0.75, 1: 0.5, 2: 0.25}, block_size=8)
    reports = [
        dit_accel.attention(*qkv, method, grid=GRID, step=step, return_report=True)[1].density
        for step in range(4)
    ]
    assert reports == [0.75, 0.5, 0.25, 0.25]
    assert all(a >= b for a, b in itertools.pairwise(reports))
