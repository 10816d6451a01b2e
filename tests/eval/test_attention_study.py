"""A study of attention on a small random model, whole and taken up again."""

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from dit_accel import InputError, presets
from dit_accel.eval import attention_study, attention_summary, attention_tables
from dit_accel.eval.attention_study import Measured, Study
from dit_accel.eval.candidates import Candidate, candidates
from dit_accel.eval.trajectories import Path, compare, with_guidance
from dit_accel.pipelines.tiny_wan import model

SIZE = {"height": 64, "width": 48, "frames": 5}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random Wan pipeline: clips of 5 frames and 64x48 are 3x4x3 tokens."""
    torch.manual_seed(0)
    pipe = model.untrained(
        autoencoder={"base_dim": 8},
        transformer={
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "ffn_dim": 32,
            "patch_size": (1, 2, 2),
        },
    )
    for block in pipe.transformer.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.normal_(norm.weight, mean=2.0, std=0.5)
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


def chosen():
    return [
        *candidates([], ["gilbert/everything/drop"]),
        *candidates([], ["gilbert/topk/centroid"], densities=(0.4,), options={"block_size": 4}),
        Candidate("flash", "preset", None, presets.flashblock(block_size=4, refresh=2)),
    ]


@pytest.fixture(scope="module")
def study(saved):
    return Study(
        str(saved),
        ("a red circle moves right",),
        layers="0,-1",
        at="all",
        steps=3,
        guidance=3.0,
        synthetic=1,
        grid=(2, 4, 4),
        heads=1,
        depth=12,
        synthetic_steps=2,
        **SIZE,
    )


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "one"
    told = []
    found = attention_study.run(study, chosen(), folder, lambda *what: told.append(what))
    return folder, found, told


def test_everything_is_measured(whole):
    folder, found, told = whole
    names = [one.name for one in chosen()]
    sources = [("captured:0", 0), ("captured:0", 2), ("synthetic:0", 0)]
    assert set(found.replays) == {(name, *source) for name in names for source in sources}
    assert set(found.courses) == {(name, 0) for name in names}
    assert ("generations", 3, 3) in told
    assert ("attention", 9, 9) in told
    files = {path.name for path in (folder / "captures/p000").iterdir()}
    assert len(files) == 2 * 3 * 2, "layers, steps, branches"
    assert len(list((folder / "maps").iterdir())) == 3
    calls = found.replays["flash", "captured:0", 2]["calls"]
    assert [call["density"] for call in calls[:2]] == [1, 1], "a refresh"
    assert calls[2]["density"] < 1, "and what was kept"


def test_exact_attention_ends_where_dense_does(whole):
    _, found, _ = whole
    course = found.courses["gilbert/everything/drop", 0]
    assert course["latent"] < 1e-4
    assert course["branch"] < 1e-4
    assert float(course["psnr"]) > 60
    sparse = found.courses["gilbert/topk/centroid@0.4", 0]
    assert sparse["latent"] > 10 * course["latent"]
    # the first step is the same whether the trajectory is put back after it or not
    assert len(sparse["guided_by_step"]) == len(sparse["latent_by_step"]) == 3


def test_finished_pieces_are_not_done_again(whole, study):
    folder, found, _ = whole
    path = folder / "generations.jsonl"
    text = path.read_text()
    # killed in the middle of a line
    path.write_text(text + text.splitlines()[0][:40])
    told = []
    again = attention_study.run(study, chosen(), folder, lambda *what: told.append(what))
    assert told == []
    assert again.courses == found.courses
    path.write_text(text)


def test_what_was_cut_short_is_done_again(whole, study):
    folder, found, _ = whole
    path = folder / "generations.jsonl"
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])
    again = attention_study.run(study, chosen(), folder)
    assert set(again.courses) == set(found.courses)
    assert again.courses["flash", 0]["psnr"] == pytest.approx(found.courses["flash", 0]["psnr"])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 4}, "got steps 4"), ({"prompts": ("a",)}, "got others")],
)
def test_another_study_is_refused(whole, study, change, message):
    folder, _, _ = whole
    with pytest.raises(InputError, match=message):
        attention_study.run(replace(study, **change), chosen(), folder)


def test_a_folder_of_something_else_is_refused(study, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="an empty folder"):
        attention_study.run(study, chosen(), tmp_path)
    with pytest.raises(InputError, match="at least one"):
        attention_study.run(study, [], tmp_path / "new")


def test_the_summary_in_three_forms(whole):
    _, found, _ = whole
    summary = attention_summary.summarise(found)
    assert [row.name for row in summary.rows] == [one.name for one in chosen()]
    assert summary.candidates == 3
    assert set(summary.ranks) >= {"error to branch", "error to psnr"}
    rows = list(csv.DictReader(io.StringIO(attention_tables.to_csv(summary))))
    one = summary.rows[1]
    assert float(rows[1]["captured_error"]) == one.captured["error"]
    assert rows[0]["captured_term_size"] == ""
    text = attention_tables.markdown(summary)
    assert "| gilbert/topk/centroid@0.4 |" in text
    assert len(attention_tables.render(summary)) == len(attention_tables.sheets(summary))


def test_where_an_order_turns():
    """Of two candidates the one with the smaller error ends worse; the summary says where."""

    def call(error):
        names = attention_summary.COLUMNS
        return {**dict.fromkeys(names), "error": error}

    def course(**values):
        names = attention_summary.COURSE
        return {**dict.fromkeys(names, 0.0), **values, "latent_by_step": [], "guided_by_step": []}

    told = {"kind": "combination", "asked": None, "layout": "l", "route": "r", "rest": "r"}
    measured = Measured(
        {"candidates": {"a": told, "b": told}},
        {
            (name, "captured:0", 0): {"calls": [call(error)], "persistent": None}
            for name, error in (("a", 0.1), ("b", 0.2))
        },
        {
            ("a", 0): course(branch=0.1, guided=0.9, added=0.9, latent=0.9, psnr=20.0),
            ("b", 0): course(branch=0.2, guided=0.3, added=0.3, latent=0.3, psnr=25.0),
        },
    )
    (turn,) = attention_summary.summarise(measured).turns
    assert (turn.smaller, turn.better, turn.link) == ("a", "b", "by guidance")
    assert (turn.psnr, turn.agreeing, turn.prompts) == (5.0, 1, 1)


def test_a_course_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 2, 1, 3, generator=generator)
    latents = torch.randn(2, 1, 3, generator=generator)
    frames = torch.rand(1, 3, 16, 16, generator=generator)
    dense = Path(frames, latents, outputs, torch.tensor([1.0, 0.6, 0.0]), 1.0)
    off = torch.tensor([[[0.1, 0, 0]], [[0, 0.2, 0]]])  # the branches' errors, at right angles
    forced = Path(frames, latents, outputs + off, None, 0.5)
    free = Path((frames + 0.1).clamp(0, 1), latents * 1.5, outputs, None, 0.5)
    found = compare(dense, free, forced, 3.0)
    mixed = 3 * off[0] - 2 * off[1]
    truth = 3 * outputs[:, 0] - 2 * outputs[:, 1]
    wanted = [float(mixed.norm() / truth[s].norm()) for s in range(2)]
    assert found.guided_by_step == pytest.approx(wanted, rel=1e-5)
    assert found.branch_cosine == pytest.approx(0, abs=1e-6)
    assert found.latent == pytest.approx(0.5, rel=1e-5)
    assert found.added == pytest.approx(float(mixed.norm() / latents[-1].norm()), rel=1e-5)
    # steps of 0.4 and 0.6 with one error: (0.4 + 0.6)² over 0.4² + 0.6²
    assert found.coherence == pytest.approx(1 / (0.16 + 0.36), rel=1e-5)
    assert found.amplified == pytest.approx(found.latent / found.added)
    assert torch.equal(with_guidance(outputs[:, :1], 3.0), outputs[:, 0].double())


def test_the_command(saved, tmp_path):
    from dit_accel.cli.app import app

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves right\n")
    words = [
        "eval", "attention", "--out", str(tmp_path / "study"), "--model", str(saved),
        "--methods", "none", "--combinations", "raster/topk/d*", "--density", "0.3,0.6",
        "--limit", "0", "--grid", "2x4x4", "--block-size", "4", "--prompts", str(prompts),
    ]  # fmt: skip
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "raster/topk/drop@0.3" in done.stdout
    kept = json.loads((tmp_path / "study/summary.json").read_text())
    assert [row["asked"] for row in kept["summary"]["rows"]] == [0.3, 0.6]
    for change, message in (
        (["--density", "2"], "density: expected numbers"),
        (["--combinations", "raster/nothing/drop"], "matches none"),
        (["--grid", "5x5"], "grid: expected"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(app, [*words, *change], catch_exceptions=False)
    with pytest.raises(InputError, match="expected a folder, or a --run"):
        CliRunner().invoke(app, ["eval", "attention"], catch_exceptions=False)


def test_the_methods_of_a_run(saved, fake, tmp_path):
    from dit_accel.cli.app import app
    from dit_accel.eval.samples import Variant
    from dit_accel.eval.store import Store

    pisa = Variant("pisa-0.4", "pisa", "method", given={"density": 0.4, "block_size": 4})
    settings = fake.settings(
        variants=(Variant("dense", "dense", "dense"), pisa), frames=5, model=str(saved), steps=2
    )
    Store(tmp_path / "run").claim(replace(settings, height=64, width=48))
    words = ["eval", "attention", "--run", str(tmp_path / "run"), "--synthetic", "0"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    folder = tmp_path / "run/attention"
    found = attention_study.read(folder)
    assert {name for name, _, _ in found.replays} == {"pisa-0.4"}
    assert found.courses == {}, "no generations beside those of the run"
    assert found.settings["prompts"] == [settings.prompts[0].text]
    assert found.settings["study"]["height"] == 64
    assert [path.name for path in (folder / "maps").iterdir()] == ["pisa-0.4.safetensors"]
