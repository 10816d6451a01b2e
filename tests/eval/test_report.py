"""The page of a run, without a browser."""

import base64
import io
import json
import math
import re
from dataclasses import replace

import pytest
from PIL import Image

from dit_accel import InputError, Method, presets
from dit_accel.eval import attention_maps, fields, report
from dit_accel.eval.figures import MEASURES, Figure, Summary, VariantSummary
from dit_accel.eval.looks import Choices
from dit_accel.eval.report import answers, pictures, plots, text
from dit_accel.eval.summary import summarise
from dit_accel.layout import Raster
from dit_accel.rest import Drop
from dit_accel.route import Everything


def variant(slug, psnr, speedup, density=0.2, role="method"):
    figures = {
        "psnr": Figure(psnr, psnr - 1, psnr + 1, 6),
        "speedup": Figure(speedup, speedup - 0.01, speedup + 0.01, 6),
        "density": Figure(density, None, None, 6),
    }
    return VariantSummary(slug, slug, role, {}, 6, 0, figures, {}, {}, {}, {}, {})


def summary(*variants):
    return Summary(dict(MEASURES), variants, True)


def test_the_answer_is_the_fastest_that_is_near_enough():
    found = summary(
        variant("dense", math.inf, 1, 1.0, "dense"),
        variant("near", 38, 1.2),
        variant("fast", 27, 1.9),
        variant("worse", 26, 1.5),
        variant("slow", 48, 0.9),
    )
    rows = [(a.least, a.variant and a.variant.slug) for a in answers.answers(found)]
    # slow is near enough for 45 dB, and slower than dense
    assert rows == [(40, None), (35, "near"), (25, "fast")]
    assert answers.gain_of(found) == "speedup"
    assert answers.best_of(answers.methods(found), "speedup", 26.5).slug == "fast"


def test_where_nothing_is_faster_the_sparsest_is_the_answer():
    found = summary(
        variant("a", 33, 0.8, 0.3), variant("b", 31, 0.7, 0.1), variant("c", 52, 1, 0.9)
    )
    assert answers.gain_of(found) == "density"
    rows = [(a.least, a.variant.slug) for a in answers.answers(found)]
    assert rows == [(50, "c"), (30, "b")]


def test_the_frontier_is_what_nothing_beats():
    points = [(1, 5), (2, 4), (1.5, 4.5), (1.5, 4), (3, 1), (2, 4), (0.5, 5)]
    assert [points[i] for i in answers.frontier(points)] == [(1, 5), (1.5, 4.5), (2, 4), (3, 1)]
    assert answers.frontier([]) == []


def test_numbers_are_written_as_wide_as_they_are_known():
    psnr, density = MEASURES["psnr"], MEASURES["density"]
    assert text.number(31.256, psnr) == "31.26"
    assert text.number(math.inf, psnr) == "∞"
    assert text.number(-0.5, MEASURES["latent_error"]) == "−0.5000"
    assert text.number(0.1483, density) == "0.148"
    assert text.number(0.96875, MEASURES["colour"]) == "96.9%"
    assert text.with_unit(1.5, MEASURES["speedup"]) == "1.50×"
    assert text.interval(Figure(1, None, None, 1), psnr) == ""
    assert text.interval(Figure(30, 29, 31, 4), psnr) == "29.00–31.00"
    options = {"density": 0.15, "layers": (), "bias": True, "p": None}
    assert text.setting(options) == "density 0.15, bias on"


def test_better_is_up_and_right():
    points = [
        plots.Point("good", "good", 0, Figure(0.1, None, None, 1), Figure(0.02, 0.01, 0.03, 1)),
        plots.Point("bad", "bad", 1, Figure(0.3, None, None, 1), Figure(0.09, None, None, 1)),
    ]
    svg = plots.pareto(points, MEASURES["density"], MEASURES["latent_error"], None, x_falls=True)
    (good,) = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    (bad,) = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"', svg)
    assert float(good[0]) > float(bad[0])
    assert float(good[1]) < float(bad[1])
    assert "frontier" not in svg, "one point is no line"
    assert plots.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert plots.ticks(19, 36) == [20, 25, 30, 35]


@pytest.fixture(scope="module")
def page(fake, tmp_path_factory):
    """A run of which a sample is missing, with maps of attention; its page, and what is in it."""
    root = tmp_path_factory.mktemp("run") / "first"
    store = fake.fake_run(root, skip={("psa", 2)})
    calls = list(fields.synthetic((2, 4, 6), heads=2, depth=12, steps=2))
    (root / "attention/maps").mkdir(parents=True)
    for name, method in (
        ("pisa-0.15", presets.pisa(block_size=8, block_q=8)),
        ("psa", presets.psa()),
    ):
        made = attention_maps.maps(name, method, calls, {0, 1})
        attention_maps.save(made, root / "attention/maps")
    path = report.write(store, summarise(store, Choices("inception")), clips=2)
    return path, path.read_text(encoding="utf-8")


def data_of(html):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found)


def test_it_holds_everything_but_the_clips(page):
    path, html = page
    assert not re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', html)
    assert "://" not in html
    players = data_of(html)["players"]
    assert [len(prompt["clips"]) for prompt in players["prompts"]] == [5, 4]
    assert players["left_out"] == 1
    for prompt in players["prompts"]:
        for clip in prompt["clips"]:
            assert (path.parent / clip["file"]).is_file()
            assert clip["poster"].startswith("data:image/jpeg;base64,")


def test_it_tells_what_is_missing_and_how_to_repeat_it(page):
    _, html = page
    assert "14 of 15 samples are there" in html
    assert "torch-fidelity" in html
    assert "noise floor" in html
    assert "dit-accel eval run --out" in html
    for word in ("torch", "fingerprint", "guidance", "_native_math"):
        assert word in html
    assert "n 3" in html


def test_it_maps_attention(page):
    _, html = page
    maps = data_of(html)["attention"]
    assert maps["candidates"] == ["pisa-0.15", "psa"]
    one = maps["maps"]["pisa-0.15|0|1|1"]
    assert one["blocks"] == [6, 6]
    assert sum(share["share"] for share in one["shares"]) == pytest.approx(1)
    assert {share["kind"] for share in one["shares"]} == {"exact", "approximated"}


def test_no_error_is_drawn_as_none():
    """Only the gap before the rows' strip is transparent; no error is the palest colour."""
    calls = next(fields.synthetic((2, 4, 6), heads=1, depth=12, steps=1))
    method = Method(Raster(8), Everything(), Drop())
    (made,) = attention_maps.maps("everything", method, [calls], {0})
    address = pictures.errors_picture(made, 0, 1.0)
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGBA")
    assert image.size[1] == 6
    assert image.getpixel((0, 0)) == (*pictures.ramp_colour(0), 255)
    assert image.getpixel((6, 0))[3] == 0
    assert image.getpixel((image.size[0] - 1, 0))[3] == 255


def test_texts_of_others_are_no_markup(fake, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    store = fake.fake_run(tmp_path / "run", fake.settings(prompts=(evil,)))
    html = report.render(store, summarise(store, Choices("inception")))
    assert "<img src=x" not in html
    assert data_of(html)["players"]["prompts"][0]["text"] == evil


@pytest.mark.parametrize("sharing", [1, 16])
def test_times_of_a_busy_device_are_told_where_the_answer_is(fake, tmp_path, sharing):
    store = fake.fake_run(tmp_path / "run")
    made = replace(summarise(store, Choices("inception")), sharing=sharing)
    answer = re.search(r'<section id="answer".*?</section>', report.render(store, made), re.S)
    assert ("Up to 16 processes shared a device" in answer[0]) == (sharing > 1)


def test_runs_of_nothing_are_refused(fake, tmp_path):
    chosen = fake.settings()
    every = {(key.variant, key.prompt) for key in chosen.every_key()}
    store = fake.fake_run(tmp_path / "run", chosen, skip=every)
    with pytest.raises(InputError, match="a run with samples"):
        report.render(store, summary())
    with pytest.raises(InputError, match="clips: expected a positive integer"):
        report.render(store, summary(), clips=0)


def test_the_command(fake, tmp_path):
    from typer.testing import CliRunner

    from dit_accel.cli.app import app

    root = tmp_path / "run"
    fake.fake_run(root)
    words = ["eval", "report", str(root), "--clips", "1", "--features", "inception"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    names = {path.name for path in root.iterdir()}
    assert {"report.html", "summary.json", "summary.csv"} <= names
    page = (root / "report.html").read_text(encoding="utf-8")
    assert len(data_of(page)["players"]["prompts"]) == 1
    before = (root / "summary.json").read_bytes()
    CliRunner().invoke(app, words[:3], catch_exceptions=False)
    assert (root / "summary.json").read_bytes() == before, "finished figures are kept"
    with pytest.raises(InputError, match="clips"):
        CliRunner().invoke(app, [*words[:3], "--clips", "0"], catch_exceptions=False)
    with pytest.raises(InputError, match=r"run\.json"):
        CliRunner().invoke(app, ["eval", "report", str(tmp_path)], catch_exceptions=False)
