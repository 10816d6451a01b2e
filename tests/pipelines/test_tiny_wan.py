"""The embedded model: its world, its files, its recipe."""

import json
import random
from collections import Counter

import pytest
import torch
from diffusers import WanPipeline

from dit_accel import InputError
from dit_accel.pipelines import embedded
from dit_accel.pipelines.tiny_wan import model, scenes
from dit_accel.pipelines.tiny_wan.recipe import Recipe
from dit_accel.pipelines.tiny_wan.train import train

DIRECTORY = embedded.find("tiny-wan").directory


def test_the_files_are_small_and_stock():
    files = [path for path in DIRECTORY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    index = json.loads((DIRECTORY / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    classes = {name: entry[1] for name, entry in index.items() if isinstance(entry, list)}
    assert classes["transformer"] == "WanTransformer3DModel"
    assert classes["vae"] == "AutoencoderKLWan"
    assert classes["text_encoder"] == "UMT5EncoderModel"
    # diffusers itself loads it, without us
    assert isinstance(WanPipeline.from_pretrained(DIRECTORY), WanPipeline)


def test_the_default_clip_is_long_enough(tiny_wan):
    call = embedded.defaults("tiny-wan")
    frames = 1 + (call["num_frames"] - 1) // tiny_wan.vae_scale_factor_temporal
    rows = call["height"] // tiny_wan.vae_scale_factor_spatial
    assert frames * rows * rows >= 2000
    assert call["num_frames"] >= 16
    assert min(call["height"], call["width"]) >= 64


def test_the_world_is_as_large_as_documented():
    assert len(scenes.COLOURS) >= 8
    assert set(scenes.SHAPES) >= {"circle", "square", "triangle", "star"}
    assert len(scenes.MOTIONS) >= 6
    every = scenes.combinations()
    held = [m for m in every if scenes.held_out(m.colour, m.shape, m.motion)]
    assert (len(held), len(every)) == (31, 248)
    for values in (scenes.COLOURS, scenes.SHAPES, scenes.MOTIONS):
        assert {v for m in held for v in (m.colour, m.shape, m.motion)} >= set(values)


def test_training_never_shows_what_is_held_out():
    rng = random.Random(0)
    kinds = Counter()
    for _ in range(2000):
        scene = scenes.sample_scene(rng)
        kinds[len(scene.movers), len(set(scene.movers))] += 1
        for mover in scene.movers:
            assert not scenes.held_out(mover.colour, mover.shape, mover.motion)
            assert scenes.compatible(mover.colour, scene.background)
    assert all(kinds[kind] > 100 for kind in ((1, 1), (2, 1), (2, 2)))
    for scene in scenes.evaluation_scenes(64):
        (mover,) = scene.movers
        assert scenes.held_out(mover.colour, mover.shape, mover.motion)


def test_captions_stay_inside_the_vocabulary(tiny_wan):
    rng = random.Random(1)
    known = set(embedded.vocabulary(tiny_wan.tokenizer))
    plural = 0
    for _ in range(500):
        text = scenes.sample_scene(rng).caption(rng)
        assert set(text.lower().replace(",", " ").replace(".", " ").split()) <= known, text
        plural += "two" in text
    assert plural > 50
    assert known == set(scenes.vocabulary())


def test_clips_do_not_depend_on_the_batch():
    batch, captions = scenes.dataset(3, range(4), 9)
    alone, caption = scenes.dataset(3, [2], 9)
    assert caption[0] == captions[2]
    whole = scenes.render(batch, 32, 32)
    assert whole.shape == (4, 3, 9, 32, 32)
    assert torch.equal(scenes.render(alone, 32, 32)[0], whole[2])
    assert -1 <= whole.min() < whole.max() <= 1


SMALL = {
    "autoencoder_batch": 2,
    "autoencoder_frames": 5,
    "autoencoder_crop": 32,
    "clips": 6,
    "batch": 2,
    "frames": 5,
    "height": 32,
    "width": 32,
}


def small():
    torch.manual_seed(0)
    return model.untrained(
        autoencoder={"base_dim": 8}, transformer={"num_layers": 1, "ffn_dim": 32}
    )


def weights(path):
    pipe = WanPipeline.from_pretrained(path)
    return {
        f"{part}.{name}": value
        for part in ("vae", "transformer", "text_encoder")
        for name, value in getattr(pipe, part).state_dict().items()
    }


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
    recipe = Recipe(autoencoder_steps=4, steps=4, checkpoint_every=2, **SMALL)
    records = []
    whole = train(tmp_path / "whole", recipe, pipe=small(), log=records.append)
    assert [r["stage"] for r in records] == ["autoencoder", "latents", "denoiser"]
    assert all(torch.tensor(r["loss"]).isfinite() for r in records if "loss" in r)
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records

    class Stop(Exception):
        pass

    def stop(record):
        if record["stage"] == "latents":
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path / "broken", recipe, pipe=small(), log=stop)
    resumed = train(tmp_path / "broken", recipe, pipe=small(), resume=True)
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_is_not_mixed_with_another(tmp_path):
    recipe = Recipe(autoencoder_steps=1, steps=1, **SMALL)
    train(tmp_path / "run", recipe, pipe=small())
    with pytest.raises(InputError, match="holds a run already; expected --resume"):
        train(tmp_path / "run", recipe, pipe=small())
    other = Recipe(autoencoder_steps=1, steps=1, **{**SMALL, "batch": 3})
    with pytest.raises(InputError, match="expected the recipe of the run to take up, got batch"):
        train(tmp_path / "run", other, pipe=small(), resume=True)
    with pytest.raises(InputError, match="steps: expected a positive integer, got 0"):
        Recipe(steps=0)
    with pytest.raises(InputError, match="one more than a multiple of 4"):
        Recipe(frames=16)
