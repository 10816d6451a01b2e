"""One measured generation."""

from dataclasses import replace

import pytest
import torch
from specimens import EVERY, picture

import dit_accel
from dit_accel import InputError
from dit_accel.pipelines.generate import generate
from dit_accel.pipelines.plug import prepare
from dit_accel.pipelines.request import Request, effective, kind_named, kind_of

SHORT = {"height": 64, "width": 48, "frames": 5, "steps": 3, "guidance": 2.0}


def test_measures_what_it_generates(pipe):
    dit_accel.accelerate(pipe, "pisa", density=0.25, block_size=4, dense_steps=1)
    seen = []
    result = generate(
        pipe, Request("a red circle", **SHORT), on_step=lambda *told: seen.append(told)
    )
    assert result.frames.shape == (5, 3, 64, 48)
    assert result.frames.dtype == torch.float32
    assert 0 <= result.frames.min() <= result.frames.max() <= 1
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(result.step_seconds) == 3
    assert sum(result.step_seconds) + result.decode_seconds <= result.seconds
    assert result.by_step[0] == 1.0 > result.by_step[1]
    assert result.density == pytest.approx(sum(result.by_step.values()) / 3)
    assert not [
        hook for hook in pipe.transformer._forward_pre_hooks.values() if "begin" in str(hook)
    ]


@pytest.mark.parametrize("name", EVERY)
def test_every_family(loaded_family, name):
    specimen = EVERY[name]
    pipe = loaded_family(specimen)
    kind = kind_of(pipe)
    dit_accel.accelerate(pipe, "pisa", density=0.25, block_size=4, dense_steps=1)
    fields = {mine: specimen.call.get(theirs) for mine, theirs in kind.arguments.items()}
    fields["image"] = picture(80, 64) if specimen.image else None
    guider = pipe.components.get("guider")
    ask = Request("a red circle", **fields)
    if name == "kontext":  # it takes its references at about a million pixels
        ask = replace(ask, image=None)
    result = generate(pipe, ask)
    steps = specimen.call["num_inference_steps"]
    frames, _, rows, columns = result.frames.shape
    assert frames == specimen.call.get("num_frames", 1)
    if name == "hunyuan15_i2v":
        assert (rows, columns) == (64, 64), "of the model's size, in about the image's shape"
    else:
        assert (rows, columns) == (specimen.call["height"], specimen.call["width"])
    assert 0 <= result.frames.min() < result.frames.max() <= 1
    assert len(result.step_seconds) == steps
    assert result.by_step[0] == 1.0 > result.by_step[steps - 1]
    assert "step" not in vars(pipe.scheduler)
    assert pipe.components.get("guider") is guider


def test_an_image_reaches_the_model(loaded_family, monkeypatch):
    module = "diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS"
    monkeypatch.setattr(module, [(80, 96), (48, 64)])
    for name in ("kontext", "klein_image", "flux2_image", "klein_kv_image", "wan_i2v"):
        pipe = loaded_family(EVERY[name])
        prepare(pipe)
        ask = Request("a red circle", height=64, width=48, steps=1)
        if kind_of(pipe).video:
            ask = replace(ask, frames=5)
        one = generate(pipe, replace(ask, image=picture(80, 64))).frames
        two = generate(pipe, replace(ask, image=picture(64, 80).rotate(90))).frames
        assert one.shape == two.shape == (ask.frames or 1, 3, 64, 48)
        assert not torch.equal(one, two)


def test_one_side_of_kontext_leaves_the_other_to_the_model(loaded_family, monkeypatch):
    pipe = loaded_family(EVERY["kontext"])
    prepare(pipe)
    monkeypatch.setattr(pipe, "default_sample_size", 10)  # of eight pixels
    ask = Request("a red circle", height=48, steps=1)
    assert generate(pipe, ask).frames.shape == (1, 3, 48, 80)


def test_guidance_of_a_component(loaded_family):
    pipe = loaded_family(EVERY["hunyuan15"])
    prepare(pipe)
    fields = {"height": 64, "width": 64, "frames": 5, "steps": 1}
    assert effective(pipe, Request("a red circle", **fields)).guidance == 3.0
    weak, strong = (
        generate(pipe, Request("a red circle", guidance=scale, **fields)).frames
        for scale in (3.0, 9.0)
    )
    assert not torch.equal(weak, strong)
    assert pipe.guider.config.guidance_scale == 3.0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("flux_dev", {"frames": 5}, "frames: expected none for a FluxPipeline, since it makes one"),
        ("flux_dev", {"negative_prompt": "x"}, "one counts only beside a true_cfg_scale"),
        ("flux_dev", {"image": picture(64, 64)}, "since it starts from text alone, got one"),
        ("flux_dev", {"height": 100}, "height: expected a multiple of 16, got 100"),
        ("flux_schnell", {"guidance": 2.0}, "checkpoint was distilled to do without, got 2"),
        ("klein_kv", {"guidance": 2.0}, "since it was distilled to do without, got 2.0"),
        ("klein", {"negative_prompt": "x"}, "since it takes none, got 'x'"),
        ("wan_i2v", {}, "image: expected one, which a WanImageToVideoPipeline starts from"),
        ("wan", {"image": picture(64, 64)}, "since it starts from text alone"),
        ("hunyuan", {"negative_prompt": "x"}, "one counts only beside a true_cfg_scale"),
        ("hunyuan15_i2v", {"height": 64}, "since it follows the image's shape"),
        ("hunyuan15", {"height": 64}, "expected both or neither for a Hun.*, got 64 and None"),
        ("hunyuan15", {"frames": 6}, "frames: expected one more than a multiple of 4, got 6"),
    ],
)
def test_what_a_pipeline_has_no_use_for(loaded_family, name, change, message):
    pipe = loaded_family(EVERY[name])
    with pytest.raises(InputError, match=message):
        effective(pipe, Request("a red circle", **change))


def test_a_pipeline_that_is_not_known():
    with pytest.raises(InputError, match=r"got a FluxFillPipeline.* can be called from Python"):
        kind_named("FluxFillPipeline")


def test_a_broken_call_gives_everything_back(loaded_family, monkeypatch):
    pipe = loaded_family(EVERY["hunyuan15"])
    prepare(pipe)
    guider = pipe.guider

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.vae, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(pipe, Request("x", height=64, width=64, frames=5, steps=1, guidance=2.0))
    assert "step" not in vars(pipe.scheduler)
    assert pipe.guider is guider
    hooks = pipe.transformer._forward_pre_hooks.values()
    assert not [hook for hook in hooks if "begin" in str(hook)]


def test_the_seed_decides(pipe):
    prepare(pipe)
    one, again, other = (
        generate(pipe, Request("a red circle", seed=seed, **SHORT)).frames for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert generate(pipe, Request("a red circle", **SHORT)).density is None, "stock processors"


def test_numbers_not_given_are_the_models_own(pipe, tiny_wan):
    full = effective(tiny_wan, Request("a red circle"))
    assert (full.height, full.width, full.frames, full.steps, full.guidance) == (
        128,
        128,
        17,
        20,
        6,
    )
    assert effective(tiny_wan, Request("a red circle", frames=9)).frames == 9
    full = effective(pipe, Request("a red circle"))
    assert (full.height, full.width, full.frames, full.steps) == (480, 832, 81, 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected a positive integer, got 0"),
        ({"frames": 6}, "frames: expected one more than a multiple of 2, got 6"),
        ({"height": 100}, "height: expected a multiple of 16, got 100"),
        ({"width": -16}, "width: expected a positive integer, got -16"),
        ({"guidance": float("nan")}, "guidance: expected a number, 0 or more, got nan"),
        ({"seed": -1}, "seed: expected an integer from 0"),
        ({"prompt": " "}, "prompt: expected some words, got none"),
    ],
)
def test_requests_that_do_not_fit(pipe, change, message):
    with pytest.raises(InputError, match=message):
        generate(pipe, Request(**{"prompt": "a red circle", **SHORT, **change}))
