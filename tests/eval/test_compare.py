"""What changed from one run to another, beyond noise."""

from dataclasses import replace

import pytest

from dit_accel import InputError
from dit_accel.eval import compare as comparing
from dit_accel.eval.figures import MEASURES
from dit_accel.eval.store import Store

PROMPTS = tuple(f"a star number {i}" for i in range(12))


def made(fake, root, *, slower=1.0, looks=None, prompts=PROMPTS):
    """A run of dense and pisa whose times and errors can be changed."""
    chosen = fake.settings(
        prompts=prompts, variants=(fake.VARIANTS[0], fake.VARIANTS[2]), frames=1, size=16
    )
    if looks:
        fake._LOOKS = {**fake._LOOKS, "pisa-0.15": looks}
    store = Store(root)
    store.claim(chosen)
    for key in chosen.every_key():
        sample, frames, latents, _ = fake.fake_sample(chosen, key)
        if key.variant != "dense":
            steps = tuple(s * slower * (1 + 0.01 * (key.prompt % 3)) for s in sample.seconds.steps)
            sample = replace(sample, seconds=replace(sample.seconds, steps=steps))
        store.put(sample, frames, latents, 8)
    return store


def verdicts(found):
    return {(c.variant, c.measure): c.verdict for c in found.changes}


def test_equal_runs_do_not_differ(tmp_path, fake):
    for name in "ab":
        made(fake, tmp_path / name)
    found = comparing.compare(tmp_path / "a", tmp_path / "b")
    assert found.settings == ()
    assert set(verdicts(found).values()) == {"same"}
    assert comparing.table(found, MEASURES).row_count == 0
    assert comparing.table(found, MEASURES, every=True).row_count == len(found.changes)


def test_a_change_is_found_and_its_sense_told(tmp_path, fake, monkeypatch):
    made(fake, tmp_path / "a")
    monkeypatch.setattr(fake, "_LOOKS", dict(fake._LOOKS))
    made(fake, tmp_path / "b", slower=1.5, looks=(0.03, 0.3, 0.6))
    found = comparing.compare(tmp_path / "a", tmp_path / "b")
    told = verdicts(found)
    assert told["pisa-0.15", "psnr"] == "better"
    assert told["pisa-0.15", "latent_error"] == "better"
    assert told["pisa-0.15", "speedup"] == "worse"
    assert told["pisa-0.15", "density"] == "changed"
    assert told["dense", "denoise_seconds"] == "same"
    (psnr,) = (c for c in found.changes if (c.variant, c.measure) == ("pisa-0.15", "psnr"))
    assert psnr.low < psnr.difference < psnr.high
    assert psnr.q >= psnr.p
    assert psnr.count == 12
    assert comparing.table(found, MEASURES).row_count >= 4


def test_few_prompts_tell_nothing(tmp_path, fake):
    made(fake, tmp_path / "a", prompts=PROMPTS[:3])
    made(fake, tmp_path / "b", prompts=PROMPTS[:4], slower=2.0)
    found = comparing.compare(tmp_path / "a", tmp_path / "b")
    assert verdicts(found)["pisa-0.15", "speedup"] == "too few"
    assert {c.count for c in found.changes if c.measure == "speedup"} == {3}
    # both sides are of the prompts that both have
    assert {c.after.count for c in found.changes if c.measure == "speedup"} == {3}
    assert found.settings == ("prompts: 3 -> 4",)


def test_so_few_prompts_for_so_many_tests_are_told():
    """Of 6 prompts the rarest p is 1/32; adjusted for 2 tests it is 1/16, and both pass."""
    base = comparing.Change("v", "psnr", None, None, 0.1, None, None, 1 / 32, None, 6, "same")
    unmoved = replace(base, p=None)
    (told,) = comparing._power([base, base, unmoved])
    assert told.startswith("6 shared prompts are few for 2 tests")
    assert "if 2 figures have one, and 7 prompts would tell a single one" in told
    assert {c.verdict for c in comparing._adjusted([base, base, unmoved], MEASURES)[:2]} == {
        "better"
    }
    alone = [replace(base, p=1 / 64, count=7), replace(base, p=0.9, count=7)]
    assert list(comparing._power(alone)) == []
    assert comparing._adjusted(alone, MEASURES)[0].verdict == "better"


def test_false_discoveries_are_kept_down():
    """Of many tests without any effect a few have a small p, and none is told."""
    base = comparing.Change("v", "psnr", None, None, 0.1, None, None, 0.03, None, 9, "same")
    many = [replace(base, p=0.03 if i == 0 else 0.2 + 0.001 * i) for i in range(100)]
    assert {c.verdict for c in comparing._adjusted(many, MEASURES)} == {"same"}
    (alone,) = comparing._adjusted(many[:1], MEASURES)
    assert alone.verdict == "better"
    # Benjamini and Hochberg by hand: 0.01 * 3 / 1, 0.02 * 3 / 2 and 0.9
    three = [replace(base, p=p) for p in (0.02, 0.9, 0.01)]
    assert [c.q for c in comparing._adjusted(three, MEASURES)] == pytest.approx([0.03, 0.9, 0.03])


def test_runs_with_nothing_in_common(tmp_path, fake):
    made(fake, tmp_path / "a", prompts=("one",))
    made(fake, tmp_path / "b", prompts=("two",))
    with pytest.raises(InputError, match="share a prompt and seed"):
        comparing.compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match=r"expected a folder with a run\.json"):
        comparing.compare(tmp_path / "a", tmp_path / "nothing")


def test_times_of_a_shared_device_are_not_judged(tmp_path, fake, monkeypatch):
    made(fake, tmp_path / "a")
    alone = fake.fake_sample
    monkeypatch.setattr(
        fake,
        "fake_sample",
        lambda *given: (replace(alone(*given)[0], sharing=16), *alone(*given)[1:]),
    )
    monkeypatch.setattr(fake, "_LOOKS", dict(fake._LOOKS))
    made(fake, tmp_path / "b", slower=1.5, looks=(0.03, 0.3, 0.6))
    found = comparing.compare(tmp_path / "a", tmp_path / "b")
    told = verdicts(found)
    times = {name for name, measure in MEASURES.items() if measure.unit in ("s", "×")}
    assert {v for (_, name), v in told.items() if name in times} == {"busy"}
    assert told["pisa-0.15", "psnr"] == "better"
    assert any("16 processes shared a device" in note for note in found.notes)


def test_both_sides_are_means_as_the_difference_is(tmp_path, fake):
    made(fake, tmp_path / "a")
    made(fake, tmp_path / "b", slower=1.5)
    found = comparing.compare(tmp_path / "a", tmp_path / "b")
    for change in found.changes:
        if change.low is not None:
            assert change.after.value - change.before.value == pytest.approx(change.difference)
