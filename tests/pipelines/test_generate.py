"""One measured generation."""

import pytest
import torch

import dit_accel
from dit_accel import InputError
from dit_accel.pipelines.generate import Request, effective, generate
from dit_accel.pipelines.plug import prepare

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
