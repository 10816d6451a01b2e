"""The command line, as a user meets it."""

import json
import subprocess
import sys

import imageio.v2 as imageio
import pytest

from dit_accel import presets
from dit_accel.cli import main

PROMPT = "a red circle moves right over a blue background"
QUICK = ["--steps", "2", "--frames", "5", "--height", "64", "--width", "64"]


def test_generate_writes_a_clip_and_its_record(cli, tmp_path):
    code, out, _ = cli("generate", PROMPT, "--method", "pisa", "--seed", "3", *QUICK)
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]
    with imageio.get_reader("clip.mp4") as reader:
        assert sum(1 for _ in reader) == 5
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["prompt"] == PROMPT
    assert record["options"]["block_size"] == 16, "what the embedded model suggests"
    assert record["density_asked"] == 0.15
    assert record["density"] == 1 / 12, "192 tokens are 12 blocks, and 0.15 of them is one"
    assert len(record["seconds"]["steps"]) == 2
    assert record["versions"]["torch"]
    assert record["norm_rotary"] == "auto"
    ((who, calls),) = record["norm_rotary_calls"].items()
    assert who.startswith("diffusers: it is for")
    assert calls == 2 * 2 * len(record["density_by_layer"]), "steps, branches, layers"
    assert record["command"][:2] == ["dit-accel", "generate"]
    for word in (
        "pisa",
        "0.15 asked",
        f"{record['density']:.3f} measured",
        "s per step",
        "clip.mp4",
    ):
        assert word in out


def test_a_record_is_enough_to_repeat_a_run(cli, tmp_path):
    cli("generate", PROMPT, "--out", "a", "--set", "rest=moment", "--dense-steps", "1", *QUICK)
    record = json.loads((tmp_path / "a.json").read_text())
    words = record["command"][1:]
    words[words.index("a", 2)] = "b"
    cli(*words)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert record["options"]["rest"] == "moment"
    assert record["density_by_step"]["0"] == 1.0 > record["density_by_step"]["1"]


def test_compare(cli, tmp_path):
    code, out, _ = cli(
        "generate", PROMPT, "--compare", "--density", "0.5", "--out", "c.gif", *QUICK
    )
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "c-compare.gif", "c.gif", "c.json",
    ]  # fmt: skip
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["compared"]["psnr"] > 15
    assert 0 < record["compared"]["ssim"] < 1
    assert record["compared"]["step_time_ratio"] > 0
    frames = imageio.mimread("c-compare.gif")
    assert frames[0].shape[:2] == (64, 64 + 4 + 64)
    for word in ("PSNR", "SSIM", "its time per step", "c-compare.gif"):
        assert word in out


def test_comparing_dense_with_itself_finds_no_difference(cli, tmp_path):
    cli("generate", PROMPT, "--compare", "--method", "dense", "--out", "d", *QUICK)
    record = json.loads((tmp_path / "d.json").read_text())
    assert record["compared"]["psnr"] == "inf"
    assert record["density"] == 1.0
    assert record["density_asked"] is None


def test_unknown_words_are_told(cli):
    code, _, err = cli("generate", "a red dragon moves right", "--out", "c.gif", *QUICK)
    assert code == 0
    assert "does not know 'dragon'" in err
    assert "triangle" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "piza"], "got 'piza' (did you mean 'pisa'?)"),
        (["--density", "0"], "density: expected float > 0, <= 1, got 0.0"),
        (["--density", "1.5"], "density: expected float > 0, <= 1, got 1.5"),
        (["--set", "blocksize=3"], "got 'blocksize' (did you mean 'block_size'?)"),
        (["--set", "block_size"], "--set: expected name=value, got 'block_size'"),
        (["--set", "density=0.2", "--density", "0.3"], "expected density once, got it twice"),
        (["--set", "layout=hilbert"], "expected raster | gilbert | tile3d | cyclic"),
        (["--method", "dense", "--density", "0.3"], "dense: expected an option among"),
        (["--model", "tiny-wam"], "got 'tiny-wam' (did you mean 'tiny-wan'?)"),
        (["--dense-steps", "-1"], "dense_steps"),
        (["--dense-layers", "9"], "dense_layers: expected layers from -6 to 5"),
        (["--dtype", "int8"], "dtype: expected one of fp32"),
        (["--device", "tpu"], "device"),
        (["--fps", "0"], "fps: expected an integer from 1 to 240, got 0"),
        (["--steps", "0"], "steps: expected a positive integer, got 0"),
        (["--height", "100"], "height: expected a multiple of 16, got 100"),
        (["--frames", "4"], "frames: expected one more than a multiple of 2, got 4"),
        (["--out", "clip.avi"], "got 'clip.avi'"),
        (["--out", "no/where.mp4"], "expected an existing folder"),
        (["--out", "/proc/clip.mp4"], "expected a folder that can be written to"),
        (["--frobnicate"], "No such option: --frobnicate"),
        (["--steps", "many"], "valid integer, got 'many'"),
        (["--steps=many"], "valid integer, got 'many'"),
    ],
)
def test_bad_input_is_told_in_one_line(cli, tmp_path, words, message):
    code, out, err = cli("generate", PROMPT, *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_it_came_from(cli, monkeypatch):
    from dit_accel import InputError

    monkeypatch.setattr(sys, "argv", ["dit-accel", "generate", PROMPT, "--method", "x", "--debug"])
    with pytest.raises(InputError):
        main()


def test_existing_files_are_kept_without_force(cli, tmp_path):
    (tmp_path / "clip.json").write_text("mine")
    code, _, err = cli("generate", PROMPT, *QUICK)
    assert code == 2
    assert "clip.json', which exists" in err
    assert (tmp_path / "clip.json").read_text() == "mine"
    assert cli("generate", PROMPT, "--force", *QUICK)[0] == 0
    assert json.loads((tmp_path / "clip.json").read_text())["seed"] == 0


def test_methods(cli):
    code, out, _ = cli("methods")
    assert code == 0
    for word in ("dense", "pisa", "density", "0.15", "2602.01077", "gilbert", "differs:"):
        assert word in out
    listed = json.loads(cli("methods", "--json")[1])
    assert [row["name"] for row in listed] == [preset.name for preset in presets.catalogue()]
    assert json.loads(cli("methods", "pisa", "--json")[1])[0]["paper"]["arxiv"] == "2602.01077"
    assert cli("methods", "nothing")[0] == 2
    code, out, _ = cli("methods", "--table")
    assert code == 0
    for word in ("gate", "cyclic", "moment, rest", "none is left to a rest", "for every token"):
        assert word in out


def test_models_and_version(cli):
    code, out, _ = cli("models")
    assert code == 0
    assert "tiny-wan" in out
    assert "WanTransformer3DModel" in out
    code, out, _ = cli("--version")
    assert (code, out.split()[0]) == (0, "dit-accel")


def test_doctor(cli):
    code, out, _ = cli("doctor")
    assert code == 0
    for word in ("torch", "diffusers", "ffmpeg", "CPU", "attention: reference", "dense xformers"):
        assert word in out
    found = {f["name"]: f for f in json.loads(cli("doctor", "--json")[1])["findings"]}
    assert found["attention: reference"]["works"]
    assert all(f["why"] for f in found.values())


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_doctor_knows_whose_settings_of_kernels_count(tmp_path, monkeypatch):
    from dit_accel.cli import doctor
    from dit_accel.kernels.tuning import files

    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    monkeypatch.setattr(files, "shipped", lambda architecture: tmp_path / "none.json")
    assert "defaults everywhere" in doctor._settings(90).why
    (tmp_path / "sm_90.json").write_text("{}")
    assert "Field required" in doctor._settings(90).why
    assert not doctor._settings(90).works


def test_doctor_says_why_not(cli):
    found = {f["name"]: f for f in json.loads(cli("doctor", "--json")[1])["findings"]}
    for name in ("GPU", "attention: batched", "attention: dense cudnn", "triton"):
        assert not found[name]["works"], name
    for name in ("sdpa", "flash"):
        assert found[f"attention: dense {name}"]["works"], name
    assert "there is none" in found["attention: dense cudnn"]["why"]


def test_bench_attention(cli, tmp_path):
    words = ["--tokens", "512", "--heads", "1", "--head-dim", "16", "--repeats", "2"]
    code, out, _ = cli("bench", "attention", *words, "--out", "b.json")
    assert code == 0
    assert "time / dense" in out
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["tokens"] == 512
    assert len(record["dense_ms"]) == 2
    assert record["density"] == pytest.approx(0.125)
    assert cli("bench", "attention", "--tokens", "0")[0] == 2


def test_check(cli, tmp_path):
    words = ["--prompts", "1", "--steps", "2", "--rows", "1"]
    code, out, _ = cli("check", "tiny-wan", *words, "--out", "c.json", "--sheet", "c.png")
    assert code == 0
    assert "PSNR to dense" in out
    record = json.loads((tmp_path / "c.json").read_text())
    assert [check["method"] for check in record["methods"]] == ["dense", "pisa"]
    assert record["methods"][1]["options"]["block_size"] == "16"
    assert imageio.imread("c.png").ndim == 3


def test_train(cli, tmp_path):
    small = {
        "autoencoder_steps": 1, "autoencoder_batch": 1, "autoencoder_frames": 5,
        "autoencoder_crop": 32, "clips": 1, "batch": 1, "steps": 1, "frames": 5,
        "height": 32, "width": 32,
    }  # fmt: skip
    words = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    code, out, _ = cli("train", "tiny-wan", "--out", "run", "--device", "cpu", *words)
    assert code == 0
    assert "loss" in out
    assert (tmp_path / "run" / "weights" / "model_index.json").is_file()
    for bad, message in (
        ("batch=x", "batch: expected int, got 'x'"),
        ("bach=1", "did you mean 'batch'"),
        ("batch=0", "batch: expected a positive integer"),
    ):
        code, _, err = cli("train", "tiny-wan", "--out", "other", "--set", bad)
        assert code == 2
        assert message in err


def test_help_of_everything(cli):
    for words in ([], ["generate"], ["methods"], ["bench", "attention"], ["check", "tiny-wan"]):
        code, out, _ = cli(*words, "--help")
        assert code == 0
        assert "Usage" in out


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "from dit_accel.cli import main; main(['methods', 'pisa'])"],
        ["-m", "dit_accel", "methods", "pisa"],
    ],
)
def test_the_console_script_and_the_module_are_this(words):
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2602.01077" in done.stdout


def test_figure_of_plans(cli, tmp_path):
    from PIL import Image

    words = ["figure", "plans", "--out", "plans.png", "--step", "1", "--earlier", "1", *QUICK]
    code, _, err = cli(*words, "--method", "pisa", "--method", "vmoba")
    assert (code, "written" in err) == (0, True)
    with Image.open("plans.png") as sheet:
        assert sheet.size[0] == 1824
    for more, message in (
        ([], "plans.png"),
        (["--force", "--head", "99"], "head: expected one of 4, from 0, got 99"),
        (["--force", "--method", "piza"], "did you mean 'pisa'"),
        (["--force", "--earlier", "2"], "earlier: expected 1 to 1 steps"),
        (["--force", "--out", "plans.jpg"], "out: expected a name that ends in .png"),
    ):
        code, _, err = cli(*words, *more)
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1
