"""The check of the embedded model, short: two prompts, three steps."""

import json

import pytest
import torch
from rich.console import Console

from dit_accel import InputError, presets
from dit_accel.eval import checker, prompt_check, records
from dit_accel.eval.contact_sheet import contact_sheet
from dit_accel.eval.metrics import fidelity
from dit_accel.pipelines.tiny_wan import scenes


@pytest.fixture(scope="module")
def result():
    kept, told = {}, []
    found = prompt_check.run(
        {"pisa": presets.pisa(block_size=16)},
        prompts=2,
        batch=1,
        steps=3,
        guidance=3.0,
        seed=7,
        progress=lambda *what: told.append(what),
        keep=lambda name, i, frames: kept.setdefault(name, []).append(frames),
    )
    return found, kept, told


def test_every_number_can_be_computed_again(result):
    found, kept, told = result
    assert [check.method for check in found.methods] == ["dense", "pisa"]
    assert told == [("dense", 1, 2), ("dense", 2, 2), ("pisa", 1, 2), ("pisa", 2, 2)]
    dense, pisa = found.methods
    assert dense.density == 1.0
    assert dense.psnr is None
    assert 0.1 < pisa.density < 0.16
    wanted = scenes.evaluation_scenes(2)
    for check in found.methods:
        for i, clip in enumerate(check.clips):
            assert clip.prompt == wanted[i].caption()
            assert clip.seed == 7 + i
            again = checker.inspect(kept[check.method][i])
            assert clip.found == {key: getattr(again, key) for key in checker.ATTRIBUTES}
            assert clip.right == again.agrees(wanted[i])
        for key in checker.ATTRIBUTES:
            assert check.shares[key] == sum(c.right[key] for c in check.clips) / 2
    ratios = []
    for i in range(2):
        error = (kept["pisa"][i].double() - kept["dense"][i].double()).square().mean()
        ratios.append(float(-10 * error.log10()))
        assert pisa.clips[i].psnr == pytest.approx(ratios[i], abs=1e-3)
    assert pisa.psnr == pytest.approx(sum(ratios) / 2, abs=1e-3)
    assert found.settings["guidance_scale"] == 3.0
    assert found.settings["num_inference_steps"] == 3


def test_the_first_prompt_does_not_depend_on_the_batch(result):
    _, kept, _ = result
    both = []
    prompt_check.run(
        {},
        prompts=2,
        batch=2,
        steps=3,
        guidance=3.0,
        seed=7,
        keep=lambda name, i, frames: both.append(frames),
    )
    for i in range(2):
        torch.testing.assert_close(both[i], kept["dense"][i], rtol=0, atol=2e-2)


def test_it_can_be_shown_and_kept(result):
    found, kept, _ = result
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(prompt_check.render(found))
    text = console.export_text()
    assert "dense" in text
    assert "dB" in text
    again = json.loads(records.dumps(found.to_dict()))
    assert len(again["methods"][1]["clips"]) == 2
    captions = [clip.prompt for clip in found.methods[0].clips]
    sheet = contact_sheet(kept, captions, frames=3)
    assert sheet.size == (12 + 2 * (3 * 130 - 2 + 12), 12 + 20 + 2 * (128 + 20 + 12))
    # the first frame of the first dense clip stands where it should
    corner = sheet.crop((12, 52, 140, 180))
    pixels = torch.tensor(list(corner.tobytes())).view(128, 128, 3).permute(2, 0, 1)
    assert torch.equal(pixels, (kept["dense"][0][0] * 255).round().long())


def test_contact_sheets_of_nothing_are_refused():
    clip = torch.zeros(4, 3, 8, 8)
    for clips, captions, message in (
        ({}, ["a"], "at least one clip"),
        ({"dense": [clip]}, ["a", "b"], "expected 2 clips of dense, got 1"),
        ({"dense": [clip], "pisa": [clip[:2]]}, ["a"], "clips of one size"),
    ):
        with pytest.raises(InputError, match=message):
            contact_sheet(clips, captions)


def test_arguments_are_checked():
    with pytest.raises(InputError, match="prompts: expected a positive integer, got 0"):
        prompt_check.run(prompts=0)
    with pytest.raises(InputError, match="expected one of tiny-wan"):
        prompt_check.run(model="large-wan")


def test_fidelity_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 32, 32, generator=generator)
    b = (a + 0.1 * torch.rand(3, 3, 32, 32, generator=generator)).clamp(0, 1)
    error = (a.double() - b.double()).square().mean()
    assert fidelity.psnr(a, b) == pytest.approx(float(-10 * error.log10()), abs=1e-4)
    assert fidelity.psnr(a, a) == float("inf")
    assert fidelity.ssim(a, a) == pytest.approx(1.0)
    assert fidelity.ssim(a, b) < fidelity.ssim(a, (a + b) / 2) < 1
    # flat clips of brightness x and y: only the luminance term is left
    x, y, c1 = 0.3, 0.5, 0.01**2
    flat = [torch.full((1, 3, 32, 32), value) for value in (x, y)]
    wanted = (2 * x * y + c1) / (x * x + y * y + c1)
    assert fidelity.ssim(*flat) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(InputError, match="two clips"):
        fidelity.psnr(a, b[:2])


def test_records_are_valid_json():
    text = records.dumps({"a": float("inf"), "b": (1, 2), "c": object, 4: {"d": None, "e": True}})
    again = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert again["a"] == "inf"
    assert again["b"] == [1, 2]
    assert again["4"] == {"d": None, "e": True}
    assert records.versions()["torch"] == torch.__version__
    assert records.machine()["threads"] == torch.get_num_threads()
