"""``dit-accel generate`` with a checkpoint of every family."""

import json

import imageio.v2 as imageio
import pytest
from specimens import EVERY, picture

PROMPT = "a red circle moves right"
# from text alone, or with an image where the pipeline needs one
NAMES = [
    name
    for name in EVERY
    if name not in ("flux2_image", "klein_image", "klein_kv_image", "wan_i2v_5b")
]


@pytest.mark.parametrize("name", NAMES)
def test_generate(cli, saved_family, tmp_path, name):
    specimen = EVERY[name]
    words = ["generate", PROMPT, "--model", str(saved_family(specimen)), "--steps", "2"]
    words += ["--set", "block_size=4", "--density", "0.25"]
    compare = name in ("hunyuan", "flux_dev")
    words += ["--compare"] * compare
    if name != "hunyuan15_i2v":
        words += ["--height", "64", "--width", "64"]
    if specimen.video:
        words += ["--frames", "5"]
    if specimen.image and name != "kontext":  # which takes references at a million pixels
        picture(80, 64).save("from.png")
        words += ["--image", "from.png"]
    code, out, err = cli(*words)
    assert code == 0, err
    stem = "clip" if specimen.video else "image"
    suffix = "mp4" if specimen.video else "png"
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    assert record["out"] == f"{stem}.{suffix}"
    size = (None, None) if name == "hunyuan15_i2v" else (64, 64)
    assert (record["height"], record["width"]) == size
    assert 0 < record["density"] < 1
    assert not compare or 5 < record["compared"]["psnr"] < 100
    assert len(record["seconds"]["steps"]) == 2
    assert (tmp_path / record["out"]).is_file()
    assert not compare or (tmp_path / record["compare_out"]).is_file()
    if specimen.video:
        assert record["frames"] == 5
        assert "5 frames of 64x64" in out
    else:
        assert record["frames"] is record["fps"] is None
        assert imageio.imread("image.png").shape == (64, 64, 3)
        assert "image" in out


@pytest.mark.parametrize("name", ["hunyuan15_i2v", "klein_image"])
def test_a_record_is_enough_to_repeat_a_run(cli, saved_family, tmp_path, name):
    specimen = EVERY[name]
    picture(80, 64).save("from.png")
    words = ["--model", str(saved_family(specimen)), "--steps", "1", "--image", "from.png"]
    words += ["--out", "a" if specimen.video else "a.png", "--guidance", "2"]
    words += ["--frames", "5"] if specimen.video else ["--height", "96"]
    assert cli("generate", PROMPT, *words)[0] == 0
    again = "b" if specimen.video else "b.png"
    code, _, err = cli("generate", "--config", "a.json", "--out", again)
    assert code == 0, err
    names = [path.name for path in (tmp_path / "a").iterdir()] if specimen.video else [""]
    for path in names:
        one, two = (tmp_path / stem for stem in (("a", "b") if path else ("a.png", "b.png")))
        assert (one / path).read_bytes() == (two / path).read_bytes()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("flux_dev", ["--frames", "5"], "frames: expected none for a FluxPipeline, since it makes"),
        ("flux_dev", ["--fps", "5"], "fps: expected none for a FluxPipeline, since it makes one"),
        ("flux_dev", ["--out", "a.mp4"], "a name that ends in .png for an image, got 'a.mp4'"),
        ("flux_dev", ["--image", "from.png"], "since it starts from text alone"),
        ("wan", ["--out", "a.png"], "expected .mp4, .gif, a folder of png (no suffix), got"),
        ("wan", ["--steps", "0"], "steps: expected a positive integer, got 0"),
        ("wan_i2v", [], "image: expected one, which a WanImageToVideoPipeline starts from"),
        ("wan_i2v", ["--image", "none.png"], "got 'none.png': No such file or directory"),
        ("wan_i2v", ["--image", "bad.png"], "got 'bad.png': it cannot be read as one"),
        ("klein_kv", ["--guidance", "3"], "guidance: expected none for a Flux2KleinKVPipeline"),
        ("flux2", ["--negative-prompt", "x"], "negative_prompt: expected none for a Flux2Pipeline"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_anything_is_loaded(
    cli, saved_family, tmp_path, monkeypatch, name, words, message
):
    from diffusers import DiffusionPipeline

    model = str(saved_family(EVERY[name]))
    picture(64, 64).save("from.png")
    (tmp_path / "bad.png").write_text("no picture")
    loaded = lambda *a, **kw: pytest.fail("loaded")  # noqa: E731
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", loaded)
    code, out, err = cli("generate", PROMPT, "--model", model, *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1, err
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "from.png"]
