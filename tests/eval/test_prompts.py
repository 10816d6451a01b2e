"""Where prompts come from, and what variants a run is made of."""

import json

import pytest

from dit_accel import InputError, presets
from dit_accel.eval import records
from dit_accel.eval.prompts import prompts_of, scene_of
from dit_accel.eval.variants import Entry, entries_of, fingerprint, variants_of
from dit_accel.pipelines.tiny_wan import scenes


def test_builtin_prompts_are_those_of_the_models_evaluation():
    found = prompts_of("builtin", "tiny-wan")
    assert [p.text for p in found] == [s.caption() for s in scenes.evaluation_scenes(64)]
    assert [p.number for p in found] == list(range(64))
    assert len(prompts_of("builtin", "tiny-wan", 3)) == 3
    with pytest.raises(InputError, match="expected a file for other/model, got builtin"):
        prompts_of("builtin", "other/model")


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("# two of them\none\n\n  two  \n")
    assert [(p.number, p.text) for p in prompts_of(str(path), "m")] == [(0, "one"), (1, "two")]
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="expected at least one line"):
        prompts_of(str(path), "m")
    with pytest.raises(InputError, match="expected builtin or a file"):
        prompts_of(str(tmp_path / "none.txt"), "m")


def test_prompts_of_vbenchs_suite(tmp_path):
    path = tmp_path / "VBench_full_info.json"
    color = {"color": {"color": "red"}}
    rows = [
        {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": color},
        {"prompt_en": "a calm lake", "dimension": "temporal_flickering"},
    ]
    path.write_text(json.dumps(rows))
    first, second = prompts_of(str(path), "m")
    assert (first.text, first.dimensions, first.auxiliary) == ("a red car", ("color",), color)
    assert second.dimensions == ("temporal_flickering",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{", "expected JSON"),
        ("{}", "expected a list of objects"),
        ('[{"prompt": "x"}]', "expected an object with prompt_en as entry 0"),
        ('[{"prompt_en": "x", "dimension": 3}]', "expected names as dimension of entry 0"),
        ('[{"prompt_en": "x", "auxiliary_info": 3}]', "expected an object as auxiliary_info"),
    ],
)
def test_other_json_is_refused(tmp_path, rows, message):
    path = tmp_path / "suite.json"
    path.write_text(rows)
    with pytest.raises(InputError, match=message):
        prompts_of(str(path), "m")


def test_captions_are_read_back():
    for scene in scenes.evaluation_scenes(64):
        assert scene_of(scene.caption()) == scene
    assert scene_of("A red circle moves right over a blue background.") is not None
    assert scene_of("two red circles move right over a blue background") is None
    assert scene_of("a cat walks on the grass") is None


def slugs(*args, **kwargs):
    return [v.slug for v in variants_of(*args, **kwargs)]


def test_every_method_at_every_density_that_it_takes():
    entries = entries_of("dense, pisa,psa,flashblock")
    assert slugs(entries, (0.1, 0.25), {}, "m", "_native_math") == [
        "dense", "dense-math", "pisa-0.1", "pisa-0.25", "psa", "flashblock-0.1", "flashblock-0.25",
    ]  # fmt: skip
    assert slugs(entries_of("pisa"), (), {}, "m", None) == ["dense", "pisa"]
    assert slugs(entries_of("pisa"), (0.1,), {"pisa": {"density": 0.3}}, "m", None) == [
        "dense", "pisa",
    ]  # fmt: skip


def test_options_of_a_method_of_an_entry_and_of_the_model():
    listed = entries_of(["pisa", {"method": "pisa", "name": "flat", "layout": "raster"}])
    assert listed[1] == Entry("pisa", "flat", {"layout": "raster"})
    _, plain, flat = variants_of(listed, (0.2,), {"pisa": {"rest": "moment"}}, "tiny-wan", None)
    assert plain.options["layout"] == "gilbert"
    assert flat.slug == "flat-0.2"
    assert (flat.options["layout"], flat.options["rest"]) == ("raster", "moment")
    assert flat.options["block_size"] == 16, "what tiny-wan suggests"
    assert flat.density == 0.2


def test_short_sequences_are_measured_too():
    """A pipeline leaves them to dense attention where that was measured to be faster."""
    listed = entries_of("pisa,psa,vmoba,svg_ear,flashblock,custom")
    for made in variants_of(listed, (0.2,), {}, "m", "_native_math")[2:]:
        assert made.options["dense_below"] == made.given["dense_below"] == 0
        assert presets.build(made.method, **made.given).schedule.dense_below == 0
    _, asked = variants_of(entries_of("pisa"), (), {"pisa": {"dense_below": "auto"}}, "m", None)
    assert presets.build("pisa", **asked.given).schedule.dense_below == "auto"
    inner = {"method": "pisa", "options": {"dense_steps": 3}}
    _, kept = variants_of(entries_of([{"method": "flashblock", "inner": inner}]), (), {}, "m", None)
    assert presets.build("flashblock", **kept.given).schedule.dense_steps == 3


def test_options_survive_a_trip_through_json():
    given = {"method": "pisa", "density": {0: 1.0, 0.5: 0.2}, "dense_layers": [0, -1]}
    _, made = variants_of(entries_of([given]), (0.1,), {}, "m", None)
    assert (made.slug, made.density) == ("pisa", None)
    again = json.loads(records.dumps(made))["given"]
    assert presets.build("pisa", **again) == presets.build("pisa", **made.given)
    assert presets.build("pisa", **again).schedule.dense_layers == (0, -1)


@pytest.mark.parametrize(
    ("methods", "shared", "floor", "message"),
    [
        ("piza", {}, None, "did you mean 'pisa'"),
        ("pisa,pisa", {}, None, "expected every variant once, got 'pisa-0.1' twice"),
        ("pisa", {"psa": {"block_q": 1}}, None, "expected options of pisa, got 'psa'"),
        ("pisa", {"pisa": {"blocks": 1}}, None, "expected an option among"),
        ("pisa", {}, "flash_hub", "floor: expected none | _native_math"),
        ([{"name": "x"}], {}, None, "expected a name or a mapping with a method"),
        ([{"method": "pisa", "name": "../x"}], {}, None, "expected names of letters"),
    ],
)
def test_variants_that_do_not_fit(methods, shared, floor, message):
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        variants_of(entries_of(methods), (0.1,), shared, "m", floor)


def test_a_fingerprint_tells_weights_apart(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"0" * 200000)
    first = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == first
    (tmp_path / "a.safetensors").write_bytes(b"0" * 199999 + b"1")
    assert fingerprint(str(tmp_path)) != first
    assert fingerprint("owner/name") is None
    assert len(fingerprint("tiny-wan")) == 64
