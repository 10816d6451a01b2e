"""The table of presets: options, messages, and what a listing needs."""

from typing import Annotated

import pytest
from pydantic import Field

from dit_accel import InputError, Method, Schedule, presets, registry
from dit_accel.layout import Cyclic, Gilbert, Raster, Tile3D
from dit_accel.options import Opt
from dit_accel.rest import Centroid, Drop, Moment, Taylor
from dit_accel.route import Everything, PooledScore


def test_pisas_defaults_are_the_papers_but_for_the_query_blocks():
    method = presets.pisa()
    assert method.layout == Gilbert(64, 128)
    assert presets.pisa(block_q=64).layout == Gilbert(64, 64)
    assert method.route == PooledScore("topk", 0.15, bias=True)
    assert method.rest == Taylor("global")
    assert method.schedule == Schedule()
    assert method.name == "pisa"
    assert method.options["density"] == 0.15


@pytest.mark.parametrize(
    ("options", "attribute", "value"),
    [
        ({"layout": "raster", "block_size": 32}, "layout", Raster(32, 64)),
        ({"layout": "tile3d"}, "layout", Tile3D((4, 4, 4))),
        ({"layout": "tile3d", "block_size": 128}, "layout", Tile3D((4, 4, 8))),
        ({"layout": "cyclic"}, "layout", Cyclic()),
        ({"layout": Cyclic(frames=3)}, "layout", Cyclic(frames=3)),
        ({"rest": "drop"}, "rest", Drop()),
        ({"rest": "centroid"}, "rest", Centroid()),
        ({"rest": "taylor", "taylor": "rest"}, "rest", Taylor("rest")),
        (
            {"rest": "moment", "weight": "gaussian", "taylor": None},
            "rest",
            Moment("gaussian", None),
        ),
        ({"rest": Moment()}, "rest", Moment("second", "global")),
        (
            {"route": "topp", "p": 0.5, "bias": False},
            "route",
            PooledScore("topp", 0.15, 0.5, False),
        ),
        ({"route": "everything"}, "route", Everything()),
        ({"route": Everything()}, "route", Everything()),
        ({"dense_steps": 0.2, "dense_layers": [0, -1]}, "schedule", Schedule(0.2, (0, -1))),
        ({"density": 1}, "route", PooledScore("topk", 1.0)),
    ],
)
def test_every_component_is_exchangeable(options, attribute, value):
    assert getattr(presets.pisa(**options), attribute) == value
    assert presets.build("pisa", **options) == presets.pisa(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"densty": 0.1}, r"pisa: expected an option among density, .*got 'densty' \(did you mean"),
        ({"density": 0.0}, "pisa: density: expected float > 0, <= 1, got 0.0"),
        ({"density": 1.5}, "pisa: density: expected float > 0, <= 1, got 1.5"),
        ({"density": float("nan")}, "pisa: density: expected float > 0, <= 1, got nan"),
        ({"density": "0.1"}, "pisa: density: expected float > 0, <= 1, got '0.1'"),
        ({"density": True}, "pisa: density: expected float > 0, <= 1, got True"),
        ({"block_size": 0}, "pisa: block_size: expected int >= 1, got 0"),
        ({"block_size": 64.0}, "pisa: block_size: expected int >= 1, got 64.0"),
        ({"bias": 1}, "pisa: bias: expected bool, got 1"),
        (
            {"rest": "taylr"},
            r"pisa: rest: expected drop \| .* or a Rest, got 'taylr' \(did you mean",
        ),
        ({"rest": Drop}, "pisa: rest: expected drop"),
        ({"layout": 3}, "pisa: layout: expected raster .* or a Layout, got 3"),
        ({"taylor": "all"}, r"pisa: taylor: expected global \| rest \| none, got 'all'"),
        ({"weight": "secnd"}, r"weight: expected second \| gaussian, got 'secnd' \(did you mean"),
        ({"dense_steps": -1}, "pisa: dense_steps: expected int >= 0"),
        ({"dense_steps": 1.0}, "pisa: dense_steps: expected int >= 0"),
        ({"dense_layers": (0.5,)}, "pisa: dense_layers: expected tuple of int"),
        ({"dense_layers": 3}, "pisa: dense_layers: expected tuple of int, got 3"),
    ],
)
def test_bad_options_are_told_in_one_line(options, message):
    for make in (presets.pisa, lambda **options: presets.build("pisa", **options)):
        with pytest.raises(InputError, match=message) as caught:
            make(**options)
        assert "\n" not in str(caught.value)


def test_unknown_presets_and_positional_options_are_named():
    with pytest.raises(InputError, match=r"expected one of custom, dense, .*got 'sparse'"):
        presets.build("sparse")
    with pytest.raises(InputError, match=r"expected one of custom, dense, .*got 3"):
        presets.build(3)
    with pytest.raises(InputError, match=r"pisa: expected options by keyword only, got \(0.2,\)"):
        presets.pisa(0.2)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("density", "0.2", 0.2),
        ("density", ".2", 0.2),
        ("density", "1", 1.0),
        ("block_size", "128", 128),
        ("bias", "False", False),
        ("taylor", "none", None),
        ("taylor", "rest", "rest"),
        ("rest", "moment", "moment"),
        ("dense_steps", "12", 12),
        ("dense_steps", "0.25", 0.25),
        ("dense_layers", "0,1,-1", (0, 1, -1)),
        ("dense_layers", "(2,)", (2,)),
        ("dense_layers", "", ()),
    ],
)
def test_options_are_read_from_text(key, text, value):
    got = presets.parse_option("pisa", key, text)
    assert got == value
    assert type(got) is type(value)
    presets.build("pisa", **{key: got})


@pytest.mark.parametrize(
    ("key", "text"),
    [("density", "lots"), ("bias", "maybe"), ("dense_layers", "0,x"), ("nope", "1")],
)
def test_text_that_is_no_value_is_named(key, text):
    with pytest.raises(InputError, match=r"pisa: .*expected .*, got "):
        presets.parse_option("pisa", key, text)


def test_the_catalogue_tells_what_a_listing_needs():
    rows = {row.name: row for row in presets.catalogue()}
    assert {"dense", "pisa"} <= set(rows)
    assert list(rows) == sorted(rows)
    for row in rows.values():
        assert row.summary
        assert "\n" not in row.summary
        for option in row.options.values():
            assert option.help
            assert option.type
            assert "\n" not in option.help
        # every default passes its own check, and makes a method
        defaults = {name: option.default for name, option in row.options.items()}
        assert isinstance(presets.build(row.name, **defaults), Method)
        options = presets.build(row.name).options
        assert {name: options[name] for name in defaults} == defaults
        assert options.keys() == row.accepts({}).keys()
    assert rows["pisa"].paper.arxiv == "2602.01077"
    assert rows["pisa"].deviations
    for row in rows.values():
        if row.name != "dense":
            assert {"dense_steps", "dense_layers"} <= set(row.options)


SIGNATURES = {
    "svg_ear": {
        "density": 0.22,
        "q_clusters": None,
        "k_clusters": None,
        "layout": "kmeans",
        "block_size": 64,
        "rest": "centroid",
    },
    "psa": {
        "ratios": None,
        "mode": "threshold",
        "block_q": 128,
        "block_k": 64,
        "layout": "gilbert",
        "sample": "stride",
        "similarity_cap": False,
    },
    "vmoba": {"threshold": 0.25, "scope": "head", "mode": "threshold", "rest": "drop"},
    "flashblock": {"inner": "pisa", "refresh": 5, "layers": None, "budget_gib": None},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_options_and_defaults_that_others_rely_on(name):
    options = presets.get(name).options
    assert {key: options[key].default for key in SIGNATURES[name]} == SIGNATURES[name]


def test_a_new_method_is_one_function_and_one_row(monkeypatch):
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))

    @registry.preset("as an example")
    def example(width: Annotated[int, Opt("of the window"), Field(ge=1, le=9)] = 3) -> Method:
        return Method(Raster(width), Everything(), Drop())

    assert presets.build("example", width=4).layout == Raster(4)
    assert presets.get("example").options["width"].type == "int >= 1, <= 9"
    with pytest.raises(InputError, match="example: width: expected int >= 1, <= 9, got 10"):
        example(width=10)
    with pytest.raises(TypeError, match="needs a default and one Opt"):

        @registry.preset("wrong")
        def wrong(width: int = 3) -> Method:
            return Method(None, None, None)
