"""``dit-accel generate --config``, and settings by model."""

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from dit_accel import InputError, Method, presets
from dit_accel.cli.generate import generate
from dit_accel.density import ByStep

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.yaml"))
PROMPT = "a red circle moves right over a blue background"
QUICK = {"steps": 2, "frames": 5, "height": 64, "width": 64}
CONFIG = {
    "method": "pisa",
    "options": {"density": {0: 1.0, 0.5: 0.25}, "layout": {"name": "tile3d", "tile": [2, 4, 4]}},
    "generate": {"prompt": PROMPT, "seed": 3, "out": "a.gif", "guidance": 4, **QUICK},
}


@pytest.fixture
def write(tmp_path):
    def write(config, name="run.yaml"):
        (tmp_path / name).write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return name

    return write


def record(path):
    return json.loads(Path(path).read_text())


def test_a_file_says_everything(cli, write):
    code, out, _ = cli("generate", "--config", write(CONFIG))
    assert code == 0
    told = record("a.json")
    assert told["prompt"] == PROMPT
    assert told["seed"] == 3
    assert told["guidance"] == 4.0
    assert told["options"]["layout"] == {"name": "tile3d", "tile": [2, 4, 4]}
    assert told["options"]["block_size"] == 16, "what the embedded model suggests"
    assert told["density_asked"] == {"0": 1.0, "0.5": 0.25}
    assert told["density_by_step"]["0"] == 1.0 > told["density_by_step"]["1"]
    assert "0:1,0.5:0.25 by step asked" in out


def test_the_record_of_a_run_repeats_it(cli, write):
    cli("generate", "--config", write(CONFIG))
    assert cli("generate", "--config", "a.json", "--out", "b.gif")[0] == 0
    assert Path("a.gif").read_bytes() == Path("b.gif").read_bytes()
    for key in ("method", "options", "density", "density_asked", "density_by_layer"):
        assert record("a.json")[key] == record("b.json")[key]
    assert Method.from_config("a.json").to_config()["options"] == {
        **record("a.json")["options"],
        "density": {0: 1.0, 0.5: 0.25},
    }
    code, _, err = cli("generate", "--config", "a.json")
    assert code == 2
    assert "which exists" in err


def test_the_command_line_comes_first(cli, write):
    file = write(CONFIG)
    words = ["--density", "0.5,0.5,0.5,0.5,0.5,0.25", "--seed", "0", "--set", "layout.tile=2,2,4"]
    code, out, _ = cli("generate", "two blue stars", "--config", file, *words)
    assert code == 0
    told = record("a.json")
    assert told["prompt"] == "two blue stars"
    assert told["seed"] == 0
    assert told["options"]["layout"] == {"name": "tile3d", "tile": [2, 2, 4]}
    assert told["density_asked"] == [0.5] * 5 + [0.25]
    assert told["density_by_layer"]["0"] > told["density_by_layer"]["5"]
    assert "0.5,0.5,0.5,0.5,0.5,0.25 by layer asked" in out


def test_options_belong_to_their_method(cli, write):
    code, _, _ = cli("generate", "--config", write(CONFIG), "--method", "dense")
    assert code == 0
    assert record("a.json")["method"] == "dense"
    assert record("a.json")["density_asked"] is None


def test_a_file_without_a_method_has_the_default_one(cli, write):
    assert cli("generate", "--config", write({"generate": CONFIG["generate"]}))[0] == 0
    assert record("a.json")["method"] == "pisa"


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"methods": "pisa"}, (), "run.yaml: expected keys among method, options, generate, got"),
        ({"density": 0.2}, (), "got 'density' (options of the method stand under options)"),
        ({"method": "piza"}, (), "run.yaml: method: expected one of"),
        ({"options": {"densty": 0.2}}, (), "run.yaml: pisa: expected an option among"),
        (
            {"options": {"layout": {"name": "tile3d", "tile": 3}}},
            (),
            "run.yaml: pisa: layout.tile: expected tuple of 3 int, got 3",
        ),
        ({"method": None}, (), "run.yaml: method: expected one beside options, got none"),
        ({"generate": {"prompt": "x", "step": 3}}, (), "got 'step' (did you mean 'steps'?)"),
        (
            {"generate": {"prompt": "x", "steps": "many"}},
            (),
            "run.yaml: generate.steps: expected int | none, got 'many'",
        ),
        ({"generate": {"prompt": "x", "out": 3}}, (), "generate.out: expected str, got 3"),
        ({"generate": {}}, (), "prompt: expected one, or a --config that has one, got none"),
        ({}, ("--set", "layout.tile=3"), "layout.tile: expected tuple of 3 int, got (3,)"),
        ({}, ("--density", "0.5,0.4"), "density: expected one share for each of the 6 layers"),
        ({}, ("--density", "0:0.5,3:x"), "pisa: density[3]: expected float > 0, <= 1, got 'x'"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(cli, write, tmp_path, change, words, message):
    code, out, err = cli("generate", "--config", write({**CONFIG, **change}), *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1, err
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_no_such_file(cli):
    code, _, err = cli("generate", "--config", "none.yaml")
    assert code == 2
    assert err == "error: config: expected a file of YAML or JSON, got 'none.yaml'\n"


def test_every_setting_of_generate_can_stand_in_a_file(cli, write):
    """An option that is added to the command is added here by itself."""
    _, _, err = cli("generate", "--config", write({"generate": {"nothing": 1}}))
    listed = err.partition("among ")[2].partition(", got")[0].split(", ")
    own = {"method", "density", "settings", "dense_steps", "dense_layers", "configured"}
    wanted = [name for name in inspect.signature(generate).parameters if name not in own]
    assert listed == ["out" if name == "target" else name for name in wanted]
    assert "--config" in cli("generate", "--help")[1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(cli, path):
    method = Method.from_config(path)
    assert method.layout is not None
    given = yaml.safe_load(path.read_text())["generate"]
    if given["model"] != "tiny-wan":
        found = presets.for_model(given["model"])[method.name]
        assert method == found.build(), "as published"
        return
    quick = {**QUICK, "steps": 3}
    words = [word for key, value in quick.items() for word in (f"--{key}", str(value))]
    assert cli("generate", "--config", str(path), "--out", "e.gif", *words)[0] == 0
    told = record("e.json")
    assert 0 < told["density"] < 1
    assert told["prompt"] == given["prompt"]


def test_the_documentation_is_right(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES[0].parents[1] / "configuration.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    method = Method.from_config(write(example, "fast.yaml"))
    assert method.density_asked == ByStep(((0, 1.0), (0.2, 0.3), (0.5, 0.15)))
    told = re.findall(r"^error: (.*)", text, flags=re.MULTILINE)
    assert len(told) == 2
    for line, options in zip(
        told,
        ({"layout": {"name": "tile3d", "tiles": 4}}, {"density": {0: 1.0, 0.2: 7}}),
        strict=True,
    ):
        write({"method": "pisa", "options": options}, "fast.yaml")
        with pytest.raises(InputError) as caught:
            Method.from_config("fast.yaml")
        assert str(caught.value) == line


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


def test_settings_by_model(cli, write):
    model = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    code, out, _ = cli("methods", "--model", model)
    assert code == 0
    for word in ("wan_t2v_720p_ear.sh", "2602.01077", "method: psa", "q_clusters: 300"):
        assert word in out
    code, out, _ = cli("methods", "svg_ear", "--model", model)
    found = presets.for_model(model)["svg_ear"]
    assert Method.from_config(write(out, "ear.yaml")) == found.build(), "what it prints is a file"
    rows = json.loads(cli("methods", "--model", model, "--json")[1])
    assert [row["method"] for row in rows] == ["pisa", "svg_ear", "psa"]
    assert all(row["source"] for row in rows)
    for words, message in (
        (["--model", "Wan-AI/Wan2.1-T2V-14B"], "did you mean 'Wan-AI/Wan2.1-T2V-14B-Diffusers'"),
        (["vmoba", "--model", model], "expected one of pisa, svg_ear, psa for Wan-AI/Wan2.1-T2V"),
    ):
        code, _, err = cli("methods", *words)
        assert code == 2
        assert message in err
