"""Methods as configuration, there and back."""

import json

import pytest
import yaml

from dit_accel import InputError, Method, Schedule, components, presets
from dit_accel.cluster import KMeans
from dit_accel.density import ByLayer, ByStep
from dit_accel.error_route import ErrorAware
from dit_accel.layout import Cyclic, Gilbert, Raster, Tile3D
from dit_accel.pyramid import Pyramid
from dit_accel.rest import Centroid, Drop, Moment, Taylor
from dit_accel.route import Everything, PooledScore
from dit_accel.token_route import Gate

YAML = """
method: pisa
options:
  density: {0: 1.0, 0.2: 0.15}
  layout: {name: tile3d, tile: [4, 4, 8]}
  rest: {name: moment, weight: gaussian}
  dense_layers: [0, -1]
generate:
  prompt: a cat
  seed: 3
"""

PARTS = [
    Raster(8),
    Gilbert(64, 128),
    Tile3D((2, 4, 8)),
    Cyclic(3, (2, 2), (1, 2, 3)),
    KMeans(4, 6, first_iterations=3, share_branches=True, seed=5),
    PooledScore("topk", 0.2, bias=False),
    PooledScore("topp", p=0.7),
    PooledScore("topk", [0.2, 0.3]),
    PooledScore("topk", {0: 1.0, 4: 0.2}),
    ErrorAware({0: 1.0, 0.5: 0.2}),
    Gate(0.3, "token", "topk"),
    Pyramid((0.1, 0.2, 0.3, 0.4), "topk", "random", True, 7),
    Everything(),
    Drop(),
    Centroid(),
    Taylor("rest"),
    Taylor(None),
    Moment("gaussian", None),
]

METHODS = [
    presets.dense(),
    presets.dense(backend="sdpa"),
    presets.pisa(),
    presets.pisa(density=[0.1, 0.2], dense_steps=0.1, dense_layers=(0, -1)),
    presets.pisa(density={0: 1.0, 0.2: 0.3}, route="topp", p={0: 0.9, 5: 0.5}),
    presets.pisa(layout={"name": "tile3d", "tile": (4, 4, 8)}, rest={"name": "moment"}),
    presets.pisa(layout=Cyclic(3), rest=Taylor("rest"), route=Everything()),
    presets.svg_ear(q_clusters=7, layout={"name": "kmeans", "next_iterations": 3}),
    presets.vmoba(threshold=[0.2, 0.4], rest="centroid"),
    presets.psa(ratios=(0.1, 0.2, 0.3, 0.4), mode="topk"),
    presets.flashblock(inner="svg_ear", density=0.3, refresh=3, layers=(0, -1)),
    presets.flashblock(inner=presets.pisa(density=0.3)),
    presets.custom(layout="raster", route="gate", rest="drop", dense_backend="flash"),
]


def kind_of(part):
    return next(
        kind
        for kind, rows in components.COMPONENTS.items()
        if any(type(part) is row.make for row in rows.values())
    )


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_every_part_has_a_spelling(part):
    kind = kind_of(part)
    spelled = json.loads(json.dumps(components.describe(kind, part)))
    assert components.make(kind, spelled) == part


def test_every_component_is_covered():
    made = {type(part) for part in PARTS}
    assert made == {row.make for rows in components.COMPONENTS.values() for row in rows.values()}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("dialect", ["mapping", "yaml", "json"])
def test_round_trip(method, dialect, tmp_path):
    config = method.to_config()
    if dialect == "yaml":
        path = tmp_path / "method.yaml"
        path.write_text(yaml.safe_dump(config))
        config = path
    if dialect == "json":
        path = tmp_path / "method.json"
        path.write_text(json.dumps(config))
        config = str(path)
    found = Method.from_config(config)
    for part in ("layout", "route", "rest", "schedule", "backend", "name"):
        assert getattr(found, part) == getattr(method, part), part
    assert found.to_config() == method.to_config()


def test_methods_made_by_hand_are_spelled_by_their_parts():
    made = Method(Gilbert(8, 16), ErrorAware(0.4), Taylor(None), Schedule(2, (1,)), backend="flash")
    found = Method.from_config(made.to_config())
    assert made.to_config()["method"] == "custom"
    for part in ("layout", "route", "rest", "schedule", "backend"):
        assert getattr(found, part) == getattr(made, part)


def test_what_was_replaced_in_a_preset_is_not_forgotten():
    from dataclasses import replace

    made = replace(presets.pisa(density=0.3), layout=Raster(9))
    assert made.options["layout"] == "gilbert"
    assert Method.from_config(made.to_config()).layout == Raster(9)
    assert Method.from_config(made.to_config()).route == made.route


def test_parts_of_others_have_no_name():
    class Mine(Drop):
        pass

    with pytest.raises(InputError, match=r"to_config: rest: expected drop or .*, got "):
        presets.pisa(rest=Mine()).to_config()


def test_a_file(tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text(YAML)
    method = Method.from_config(path)
    assert method.layout == Tile3D((4, 4, 8))
    assert method.rest == Moment("gaussian", "global")
    assert method.route.density == ByStep(((0, 1.0), (0.2, 0.15)))
    assert method.schedule == Schedule(0, (0, -1))
    assert Method.from_config(str(path)) == method


def test_a_part_takes_what_the_preset_says_unless_it_says_itself():
    made = presets.pisa(
        block_size=16,
        density=0.3,
        layout={"name": "gilbert", "query_block_size": 32},
        rest={"name": "moment", "weight": "gaussian"},
        taylor="rest",
        route={"name": "topk", "bias": False},
    )
    assert made.layout == Gilbert(16, 32)
    assert made.rest == Moment("gaussian", "rest")
    assert made.route == PooledScore("topk", 0.3, bias=False)
    assert presets.pisa(layout={"name": "tile3d"}, block_size=128).layout == Tile3D((4, 4, 8))
    assert presets.svg_ear(layout={"name": "kmeans", "k_clusters": 9}, q_clusters=3).layout == (
        KMeans(3, 9)
    )
    assert presets.psa(layout={"name": "raster"}).layout == Raster(64, 128)
    assert presets.pisa(density=[0.1, 0.2]).route.density == ByLayer((0.1, 0.2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layout": {"name": "tiled"}},
            r"pisa: layout.name: expected raster \| .*got 'tiled' \(di",
        ),
        ({"layout": {"tile": [1, 2, 3]}}, "pisa: layout.name: expected raster .*, got nothing"),
        ({"layout": {"name": 3}}, "pisa: layout.name: expected raster .*, got 3"),
        (
            {"layout": {"name": "tile3d", "tiles": 1}},
            r"pisa: layout: expected an option among tile, got 'tiles' \(did you mean 'tile'",
        ),
        (
            {"layout": {"name": "tile3d", "tile": [4, 4]}},
            r"pisa: layout.tile: expected tuple of 3 int, got \(4, 4\)",
        ),
        (
            {"layout": {"name": "tile3d", "tile": [4, 4, 0]}},
            r"layout.tile\[2\]: expected a positive integer, got 0",
        ),
        ({"rest": {"name": "moment", "weight": "third"}}, "pisa: rest.weight: expected second "),
        ({"route": {"name": "topk", "p": 0.2}}, "pisa: route: expected an option among density, b"),
        ({"route": {"name": "topk", "density": 2}}, "pisa: route.density: expected float > 0, <="),
        (
            {"route": {"name": "gate"}, "taylor": "rest"},
            "expected a rest that Gate can be combined with",
        ),
        ({"density": {0: 1.0, 0.2: 7}}, r"pisa: density\[0.2\]: expected float > 0, <= 1, got 7"),
        ({"density": [0.1, "x"]}, r"pisa: density\[1\]: expected float > 0, <= 1, got 'x'"),
        ({"dense_layers": 3}, "pisa: dense_layers: expected tuple of int, got 3"),
        ({"densty": 3}, r"pisa: expected an option among .*got 'densty' \(did you mean 'density'"),
    ],
)
def test_errors_name_the_key(options, message, tmp_path):
    config = {"method": "pisa", "options": options}
    with pytest.raises(InputError, match=message) as caught:
        Method.from_config(config)
    assert "\n" not in str(caught.value)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=rf"bad.yaml: .*{message}"):
        Method.from_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methd: pisa", r"expected keys among method, options, generate, got 'methd' \(did you m"),
        ("method: pisa\ndensity: 0.2", r"got 'density' \(options of the method stand under optio"),
        ("method: pizza", r"method: expected one of .*got 'pizza'"),
        ("method: [pisa]", "method: expected the name of a preset, got \\['pisa'\\]"),
        ("options: {density: 0.2}", "method: expected one of .*, got nothing"),
        ("", "method: expected one of .*, got nothing"),
        ("method: pisa\noptions: 3", "options: expected names with their values, got 3"),
        ("- pisa", "expected names with their values, got list"),
        ("method: pisa\nmethod: psa", "expected 'method' once, got it again in line 2"),
        ("method: {", "expected YAML, got .* in line"),
        (
            "method: flashblock\noptions: {inner: {method: pisa, options: {density: 4}}}",
            "flashblock: inner: pisa: density: expected float > 0, <= 1, got 4",
        ),
    ],
)
def test_files_that_are_wrong_are_told_in_one_line(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        Method.from_config(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_in_place_of_a_name_is_told_where_it_goes():
    with pytest.raises(InputError, match=r"got 'x.yaml' \(a file is read by Method.from_config\)"):
        presets.build("x.yaml")


def test_no_file_at_all(tmp_path):
    with pytest.raises(InputError, match="config: expected a file of YAML or JSON, got "):
        Method.from_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="config: expected a mapping or a path, got int"):
        Method.from_config(3)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(InputError, match=r"broken.json: expected JSON, got .* in line 1"):
        Method.from_config(broken)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ([("layout.tile", "4,4,8")], "layout", {"name": "tile3d", "tile": (4, 4, 8)}),
        ([("layout.tile", "2,2,2")], "layout", {"name": "tile3d", "tile": (2, 2, 2)}),
    ],
)
def test_options_of_parts_on_a_command_line(words, key, value):
    for name, text in words:
        assert presets.parse_option("pisa", name, text, {"layout": "tile3d"}) == value
    with pytest.raises(InputError, match=r"pisa: layout: expected an option among block_size, .*"):
        presets.parse_option("pisa", "layout.tile", "1,1,1")
    with pytest.raises(InputError, match=r"pisa: expected an option without parts, got density.x"):
        presets.parse_option("pisa", "density.x", "1")
