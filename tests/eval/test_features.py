"""The feature networks, and the real clips that they look at."""

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from dit_accel import InputError
from dit_accel.eval import real
from dit_accel.eval.features import network, train
from dit_accel.eval.features.extractor import extractor_of
from dit_accel.eval.metrics import distribution


@pytest.fixture(scope="module")
def ours():
    return extractor_of("auto", "tiny-wan")


def test_the_shipped_network_knows_the_embedded_domain():
    assert network.WEIGHTS.stat().st_size < 2**20
    found = train.accuracy(network.load(), clips=64)
    chance = {name: 1 / len(answers) for name, answers in network.HEADS.items()}
    for name, share in found.items():
        assert share > 2 * chance[name], name
    assert min(found[name] for name in ("colour", "motion", "background")) > 0.9


def test_the_recipe_trains(tmp_path):
    clips, answers = train.batch_of(0, 5, 2)
    again, same = train.batch_of(0, 6, 1)
    assert clips.shape == (2, 3, 8, 64, 64)
    assert torch.equal(clips[1:], again), "clip i does not depend on its batch"
    assert all(torch.equal(answers[name][1:], same[name]) for name in answers)
    told = []
    made = train.train(2, 2, log=told.append)
    assert [record["step"] for record in told] == [0, 1]
    path = tmp_path / "w.safetensors"
    network.save(made, path)
    loaded = network.load(path)
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name


def test_worse_clips_are_further_from_real_ones(ours):
    """Distances grow with what is done to clips of another seed."""

    def features(seed, noise):
        clips, _ = train.batch_of(seed, 0, 48)
        generator = torch.Generator().manual_seed(seed)
        clips = clips + noise * torch.randn(clips.shape, generator=generator)
        frames = ((clips + 1) / 2).clamp(0, 1).transpose(1, 2)
        return torch.cat([ours.features(clip) for clip in frames])

    truth = features(10, 0.0)
    distances = [distribution.kernel_distance(features(11, n), truth) for n in (0.0, 0.3, 0.8)]
    assert distances == sorted(distances)


def test_choices_of_a_network(tmp_path, ours):
    assert (ours.name, ours.of) == ("embedded", "clip")
    clip = torch.rand(5, 3, 20, 30)
    assert ours.features(clip).shape == (1, 64)
    assert "torch-fidelity" in extractor_of("auto", "owner/name")
    assert "know the clips of tiny-wan alone" in extractor_of("embedded", "owner/name")
    given = extractor_of(str(network.WEIGHTS), "owner/name")
    assert torch.equal(given.features(clip), ours.features(clip))

    class Means(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return frames.mean((2, 3))

    path = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(path))
    means = extractor_of(str(path), "owner/name")
    assert means.of == "frame"
    assert torch.allclose(means.features(clip), clip.mean((2, 3)))
    path.write_bytes(b"no")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for bad, message in (
        (path, "expected TorchScript"),
        (tmp_path / "x.safetensors", "expected safetensors"),
        ("nothing", "expected auto, embedded, inception or a file"),
    ):
        with pytest.raises(InputError, match=message):
            extractor_of(str(bad), "tiny-wan")


def test_procedural_clips_are_of_the_prompts(fake):
    from dit_accel.eval import checker
    from dit_accel.eval.prompts import scene_of

    chosen = fake.settings(prompts=(fake.PROMPTS[0], "a cat"), frames=9, size=96)
    clips = real.procedural(chosen)
    assert len(clips) == real.PER_PROMPT
    assert clips[0].shape == (9, 3, 96, 96)
    scene = scene_of(fake.PROMPTS[0])
    assert all(all(checker.inspect(clip).agrees(scene).values()) for clip in clips)
    assert torch.equal(real.procedural(chosen)[3], clips[3])


def test_a_folder_of_clips_and_images(tmp_path, fake):
    chosen = fake.settings(frames=3, size=16)
    pixels = np.zeros((5, 32, 64, 3), np.uint8)
    pixels[:, :, 16:48] = 255  # white in the middle, which the crop keeps
    imageio.imwrite(tmp_path / "b.png", pixels[0])
    imageio.mimsave(tmp_path / "a.gif", list(pixels), format="GIF", duration=100)
    clip, image = real.from_folder(tmp_path, chosen)
    assert clip.shape[1:] == image.shape[1:] == (3, 16, 16)
    assert len(image) == 1
    assert image.mean() > 0.98
    with pytest.raises(InputError, match="expected a folder"):
        list(real.from_folder(tmp_path / "none", chosen))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected videos or images"):
        list(real.from_folder(tmp_path / "empty", chosen))
    (tmp_path / "empty" / "x.png").write_bytes(b"no")
    with pytest.raises(InputError, match="expected to read"):
        list(real.from_folder(tmp_path / "empty", chosen))
