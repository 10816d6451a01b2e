"""Runs on disk: whole samples or none, and one run a folder."""

import json
import os
from dataclasses import replace

import imageio.v2 as imageio
import pytest
import torch

from dit_accel import InputError
from dit_accel.eval.samples import Failure, Key, Run
from dit_accel.eval.store import Store, differences


def one_of(fake, chosen, variant="dense", prompt=0):
    return fake.fake_sample(chosen, Key(variant, prompt, chosen.seeds[0] + prompt))


def test_what_is_written_is_read(tmp_path, fake):
    chosen = fake.settings(latents=True)
    store = fake.fake_run(tmp_path / "run", chosen)
    assert store.run().settings == chosen
    assert store.finished() == set(chosen.every_key())
    key = Key("pisa-0.15", 1, 1)
    sample, frames, latents, steps = fake.fake_sample(chosen, key)
    kept = store.sample(key)
    assert kept == replace(sample, media="clip.mp4", shape=(5, 3, 32, 32))
    assert torch.equal(store.frames(key), (frames * 255).round() / 255), "8 bits, as shown"
    assert torch.equal(store.latents(key)["final"], latents)
    assert torch.equal(store.latents(key)["steps"], steps.half())
    with imageio.get_reader(store.media(key)) as reader:
        assert sum(1 for _ in reader) == 5
    assert [s.key for s in store.samples("psa")] == [Key("psa", i, i) for i in range(3)]


def test_one_frame_is_an_image(tmp_path, fake):
    store = fake.fake_run(tmp_path / "run", fake.settings(frames=1, prompts=fake.PROMPTS[:1]))
    key = Key("dense", 0, 0)
    assert store.media(key).name == "image.png"
    pixels = torch.from_numpy(imageio.imread(store.media(key))).permute(2, 0, 1)
    assert torch.equal(pixels.float() / 255, store.frames(key)[0])


def test_infinity_survives(tmp_path, fake):
    chosen = fake.settings()
    store = Store(tmp_path / "run")
    store.claim(chosen)
    sample, frames, latents, _ = one_of(fake, chosen)
    store.put(replace(sample, breakdown={"other": float("inf")}), frames, latents, 8)
    assert store.sample(sample.key).breakdown == {"other": float("inf")}


def test_a_sample_is_whole_or_not_there(tmp_path, fake, monkeypatch):
    chosen = fake.settings()
    store = Store(tmp_path / "run")
    store.claim(chosen)
    sample, frames, latents, _ = one_of(fake, chosen)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dit_accel.eval.records.dumps", killed)
        with pytest.raises(KeyboardInterrupt):
            store.put(sample, frames, latents, 8)
    assert store.finished() == set()
    assert not list(tmp_path.glob("run/samples/dense/*"))
    # a process killed outright leaves a room behind, which is no sample, and goes
    left = tmp_path / "run/samples/.parts/x/sample"
    left.mkdir(parents=True)
    (left / "sample.json").write_text("{}")
    assert store.finished() == set()
    store.claim(chosen)
    assert not left.exists()


def test_who_comes_second_changes_nothing(tmp_path, fake):
    chosen = fake.settings()
    store = Store(tmp_path / "run")
    store.claim(chosen)
    sample, frames, latents, _ = one_of(fake, chosen)
    store.put(sample, frames, latents, 8)
    store.put(replace(sample, device="another"), frames, latents, 8)
    assert store.sample(sample.key).device == sample.device


def test_a_failure_goes_when_the_sample_comes(tmp_path, fake):
    chosen = fake.settings()
    store = Store(tmp_path / "run")
    store.claim(chosen)
    sample, frames, latents, _ = one_of(fake, chosen)
    store.fail(Failure("dense", 0, sample.text, 0, "out of memory"))
    assert [f.error for f in store.failures()] == ["out of memory"]
    store.put(sample, frames, latents, 8)
    assert store.failures() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5}, "steps 4 -> 5"),
        ({"seeds": (1,)}, r"seeds \(0,\) -> \(1,\)"),
        ({"prompts": ("a red circle",)}, "prompts: 3 -> 1"),
        ({"fingerprint": "1"}, "fingerprint"),
        ({"device": "cuda", "guidance": 1.0}, "guidance 6.0 -> 1.0; device cpu -> cuda"),
    ],
)
def test_other_settings_are_refused(tmp_path, fake, change, message):
    store = Store(tmp_path / "run")
    store.claim(fake.settings())
    store.claim(fake.settings())
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(InputError, match=message):
        store.claim(fake.settings(**change))
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_other_options_of_the_same_name_are_refused(tmp_path, fake):
    store = Store(tmp_path / "run")
    store.claim(fake.settings())
    *kept, last = fake.VARIANTS
    changed = (*kept, replace(last, options={**last.options, "block_q": 32}))
    with pytest.raises(InputError, match=f"{last.slug}: block_q 16 -> 32$"):
        store.claim(fake.settings(variants=changed))


def test_what_variants_differ_in_is_told_once(fake):
    """Beside what is gone and new; what was given and is the default anyway is no difference."""
    dense, floor, first, second, _ = fake.VARIANTS
    new = (
        dense,
        *(
            replace(one, options={**one.options, "rest": "moment"}, given={**one.given, "p": 0.9})
            for one in (first, second)
        ),
        replace(first, slug="other"),
    )
    runs = [
        Run(fake.settings(variants=listed), (), 0.0, {}, {"cpus": 1, "processor": "x"})
        for listed in (fake.VARIANTS, new)
    ]
    assert list(differences(*runs)) == [
        f"without {floor.slug}, psa",
        "with other",
        f"{first.slug}, {second.slug}: rest taylor -> moment, p None -> 0.9",
    ]
    same = replace(first, given={**first.given, "rest": "taylor"})
    again = replace(
        runs[0], settings=fake.settings(variants=(dense, floor, same, *fake.VARIANTS[3:]))
    )
    assert list(differences(runs[0], again)) == []


def test_another_version_or_machine_is_refused(tmp_path, fake):
    store = Store(tmp_path / "run")
    store.claim(fake.settings())
    path = tmp_path / "run/run.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "versions": {**kept["versions"], "torch": "1.0"}}))
    with pytest.raises(InputError, match=r"version of torch 1\.0 ->"):
        store.claim(fake.settings())
    path.write_text(json.dumps({**kept, "machine": {**kept["machine"], "cpus": 999}}))
    with pytest.raises(InputError, match=f"machine's cpus 999 -> {os.cpu_count()}"):
        store.claim(fake.settings())


def test_what_is_no_run_is_told(tmp_path, fake):
    with pytest.raises(InputError, match=r"expected a folder with a run\.json"):
        Store(tmp_path).run()
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        Store(tmp_path).claim(fake.settings())
    for text, message in (("{", "Invalid JSON"), ("{}", "settings: Field required")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(InputError, match=message):
            Store(tmp_path).run()
    store = fake.fake_run(tmp_path / "run", fake.settings(prompts=fake.PROMPTS[:1]))
    path = store.root / "run.json"
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 1'))
    with pytest.raises(InputError, match=r"expected format 2 in .*, got 1"):
        store.run()
    with pytest.raises(InputError, match="expected one of dense, dense-math"):
        fake.settings().variant("nothing")
