"""The judge, on clips whose content is known."""

import random

import pytest
import torch

from dit_accel import InputError
from dit_accel.eval import checker
from dit_accel.pipelines.tiny_wan import scenes
from dit_accel.pipelines.tiny_wan.scenes import Mover, Scene


def clip(scene, seed=0, frames=17, size=128):
    batch = scenes.stage([scene], [random.Random(seed)], frames)
    return (scenes.render(batch, size, size)[0].permute(1, 0, 2, 3) + 1) / 2


# every seventh combination: all colours, shapes and motions are among them
MOVERS = scenes.combinations()[::7]


@pytest.mark.parametrize("mover", MOVERS, ids=lambda m: f"{m.colour}-{m.shape}-{m.motion}")
def test_finds_what_is_there(mover):
    for number, texture in enumerate(("plain", "striped", "checkered", "dotted")):
        grounds = [b for b in scenes.BACKGROUNDS if scenes.compatible(mover.colour, b)]
        scene = Scene((mover,), grounds[number % len(grounds)], texture)
        found = checker.inspect(clip(scene, number))
        assert (found.colour, found.shape, found.motion) == (
            mover.colour,
            mover.shape,
            mover.motion,
        ), scene


def test_the_sample_has_everything():
    for key, values in (
        ("colour", scenes.COLOURS),
        ("shape", scenes.SHAPES),
        ("motion", scenes.MOTIONS),
    ):
        assert {getattr(mover, key) for mover in MOVERS} == set(values)


def test_sees_nothing_where_nothing_is():
    for ground in (torch.zeros(17, 3, 64, 64), torch.full((17, 3, 64, 64), 0.5)):
        assert checker.inspect(ground) == checker.Finding(None, None, None)


def test_a_wrong_clip_is_wrong():
    """What makes the shares mean something: the judge can say no to each attribute alone."""
    wanted = Scene((Mover("red", "square", "right"),), "gray", "plain")
    for other, attribute in (
        (Mover("green", "square", "right"), "colour"),
        (Mover("red", "star", "right"), "shape"),
        (Mover("red", "square", "up"), "motion"),
    ):
        right = checker.inspect(clip(Scene((other,), "gray", "plain"))).agrees(wanted)
        assert right == {key: key != attribute for key in checker.ATTRIBUTES}


def test_a_clip_played_backwards_moves_the_other_way():
    scene = Scene((Mover("yellow", "triangle", "left"),), "black", "plain")
    assert checker.inspect(clip(scene).flip(0)).motion == "right"


def test_shares():
    one = Scene((Mover("red", "square", "right"),), "gray", "plain")
    right = checker.Finding("red", "square", "right")
    half = checker.Finding("red", "circle", "right")
    assert checker.tally([(one, right), (one, half)]) == {
        "colour": 1.0, "shape": 0.5, "motion": 1.0, "all": 0.5,
    }  # fmt: skip
    with pytest.raises(InputError, match="expected at least one clip"):
        checker.tally([])
    two = Scene((Mover("red", "square", "right"),) * 2, "gray", "plain")
    with pytest.raises(InputError, match="a scene of one shape, got 2"):
        right.agrees(two)
    with pytest.raises(InputError, match=r"expected \[T >= 4, 3, H, W\]"):
        checker.inspect(torch.zeros(2, 3, 8, 8))
