"""``dit-accel eval``, as a user meets it."""

import pytest


@pytest.fixture
def evaluate(cli):
    """``dit-accel eval ...``."""
    return lambda *words: cli("eval", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "out: expected the folder of the run, got none"),
        (["--methods", "piza"], "got 'piza' (did you mean 'pisa'?)"),
        (["--density", "0.1,x"], "density: expected numbers with commas, got '0.1,x'"),
        (["--density", "2"], "density: expected float > 0, <= 1, got 2.0"),
        (["--seeds", "a"], "seeds: expected numbers with commas"),
        (["--set", "block_size=3"], "--set: expected method.name=value, got 'block_size=3'"),
        (["--set", "pisa.blocksize=3"], "did you mean 'block_size'"),
        (["--set", "psa.block_q=3"], "set: expected options of pisa, got 'psa'"),
        (["--prompts", "none.txt"], "prompts: expected builtin or a file"),
        (["--limit", "0"], "limit: expected a positive integer, got 0"),
        (["--jobs", "0"], "jobs: expected a positive integer, got 0"),
        (["--features", "none.pt"], "features: expected auto, embedded, inception or a file"),
        (["--dtype", "int8"], "dtype: expected one of fp32"),
        (["--fps", "0"], "fps: expected an integer from 1 to 240"),
        (["--config", "none.yaml"], "config: expected YAML in 'none.yaml'"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(
    evaluate, monkeypatch, tmp_path, words, message
):
    monkeypatch.setattr("dit_accel.pipelines.load", lambda *a, **k: pytest.fail("loaded"))
    out = ["--out", "run"] if words else []
    code, _, err = evaluate("run", *out, *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def asked(monkeypatch):
    """What a run would be asked for."""
    found = {}
    monkeypatch.setattr("dit_accel.cli.eval_run._run", found.update)
    return found


def test_options_in_yaml(evaluate, asked, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "methods: [pisa, {method: pisa, name: flat, layout: raster}]\n"
        "density: [0.1, 0.2]\nset: {pisa: {rest: moment}}\nout: runs/first\nsteps: 7\n"
        "negative-prompt: none of it\n"
    )
    code, _, err = evaluate("run", "--config", "run.yaml", "--steps", "3", "--density", "0.3")
    assert code == 0, err
    assert asked["methods"] == ["pisa", {"method": "pisa", "name": "flat", "layout": "raster"}]
    assert asked["density"] == "0.3", "the command line comes first"
    assert asked["steps"] == 3
    assert asked["settings"] == {"pisa": {"rest": "moment"}}
    assert str(asked["out"]) == "runs/first"
    assert asked["negative_prompt"] == "none of it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- pisa", "config: expected a mapping"),
        ("method: pisa", "expected options among model, methods"),
        ("steps: many", "steps: expected int, got 'many'"),
        ("steps: true", "steps: expected int, got True"),
        ("a: [", "config: expected YAML"),
    ],
)
def test_yaml_that_does_not_fit(evaluate, asked, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    code, _, err = evaluate("run", "--config", "run.yaml", "--out", "x")
    assert code == 2
    assert message in err
    assert not asked


def test_compare(evaluate, tmp_path):
    code, _, err = evaluate("compare", "a", "b")
    assert code == 2
    assert "expected a folder with a run.json, got 'a'" in err
    code, out, _ = evaluate("compare", "--help")
    assert code == 0
    assert "beyond noise" in out
