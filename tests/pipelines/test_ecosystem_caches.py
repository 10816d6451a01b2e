"""Caches of diffusers beside a method: what they skip shifts no step, layer or memory of ours."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
)

import dit_accel
from dit_accel.pipelines import session_of

STEPS = 8


def first_block(pipe):
    return FirstBlockCacheConfig(threshold=10.0)


def magnitude(pipe):
    # computes steps 0, 1, 4 and 7
    return MagCacheConfig(
        mag_ratios=torch.ones(STEPS),
        num_inference_steps=STEPS,
        threshold=0.5,
        max_skip_steps=2,
        retention_ratio=0.25,
    )


def broadcast(pipe):
    # every other call of an attention, between these timesteps
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("blocks",),
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: pipe.current_timestep,
        is_guidance_distilled=True,
    )


CACHES = [first_block, magnitude, broadcast, faster]


def build(family, method, cache=None, order="before"):
    pipe = family.pipe()
    if cache is not None and order == "before":
        pipe.transformer.enable_cache(cache(pipe))
    if method is not None:
        dit_accel.accelerate(pipe, method)
    if cache is not None and order == "after":
        pipe.transformer.enable_cache(cache(pipe))
    return pipe


@pytest.mark.parametrize("cache", CACHES)
def test_dense_through_ours_is_what_stock_gives_with_the_same_cache(family, cache):
    stock = family.go(build(family, None, cache), STEPS)
    assert not torch.equal(stock, family.go(family.pipe(), STEPS)), "the cache does something"
    for order in ("before", "after"):
        pipe = build(family, "dense", cache, order)
        assert torch.equal(family.go(pipe, STEPS), stock)
        assert torch.equal(family.go(pipe, STEPS), stock), "the second call begins anew"
        dit_accel.restore(pipe)
        assert torch.equal(family.go(pipe, STEPS), stock)
        pipe.transformer.disable_cache()
        assert torch.equal(family.go(pipe, STEPS), family.go(family.pipe(), STEPS))


@pytest.mark.parametrize("cache", CACHES)
def test_steps_layers_and_memory_stay_right(family, zoo, cache):
    """A memory is made at the first step that is computed, and the same layer finds it later."""
    results = []
    for order in ("before", "after"):
        method = zoo.spying(dense_steps=2)
        pipe = build(family, method, cache, order)
        results.append(family.go(pipe, STEPS, **family.unguided))
        seen = method.route.seen
        assert {total for _, _, _, total, _ in seen} == {STEPS}
        assert len({(step, layer) for step, layer, *_ in seen}) == len(seen)
        assert all(2 <= step < STEPS for step, *_ in seen)
        assert len(seen) < (STEPS - 2) * family.layers, "something is skipped"
        remembered = set()
        for _, layer, _, _, first in seen:
            assert first == (layer not in remembered)
            remembered.add(layer)
        assert session_of(pipe).log.by_step[0] == 1.0
        assert len(session_of(pipe).state) == 0
    assert torch.equal(*results)


def test_a_cached_first_block_leaves_the_schedule_alone(family, zoo):
    method = zoo.spying(dense_steps=1)
    pipe = build(family, method, first_block)
    family.go(pipe, STEPS, **family.guided)
    for branch in ("cond", "uncond"):
        assert method.route.steps(0, branch) == list(range(1, STEPS))
        assert method.route.steps(family.layers - 1, branch) == []
    # of the blocks after the first, the dense step alone is computed
    layers = session_of(pipe).log.by_layer
    assert {layer: density == 1.0 for layer, density in layers.items()} == {
        layer: layer > 0 for layer in range(family.layers)
    }


def test_a_skipped_step_leaves_the_schedule_alone(family, zoo):
    method = zoo.spying(dense_steps=2)
    pipe = build(family, method, magnitude)
    family.go(pipe, STEPS, **family.guided)
    for branch in ("cond", "uncond"):
        for layer in range(family.layers):
            assert method.route.steps(layer, branch) == [4, 7]


def test_what_flashblock_kept_grows_old_in_steps_that_are_skipped(family):
    """Kept at step 4 and too old at step 7, though the attention ran but once in between."""
    flash = {"inner": "pisa", "density": 0.25, "block_size": 4, "dense_steps": 2}
    for refresh, expected in ((3, [True, True]), (4, [True, False])):
        pipe = family.pipe()
        dit_accel.accelerate(pipe, "flashblock", refresh=refresh, **flash)
        pipe.transformer.enable_cache(magnitude(pipe))
        family.go(pipe, STEPS)
        by_step = session_of(pipe).log.by_step
        assert [by_step[step] == 1.0 for step in (4, 7)] == expected


def test_another_cache_of_attention_mixes_guidance_up_without_us_too(zoo):
    """PAB counts calls, and not by branch of guidance: of two calls a step, it skips the second."""
    wan, method = zoo.FAMILIES["Wan"], zoo.spying()
    pipe = build(wan, method, broadcast)
    wan.go(pipe, STEPS, **wan.guided)
    skipped = set(method.route.steps(0, "cond")) - set(method.route.steps(0, "uncond"))
    assert len(skipped) >= 4
    assert method.route.steps(0, "cond") == list(range(STEPS))


def test_faster_cache_of_guidance_in_two_calls_fails_without_us_too(zoo):
    """It expects both branches in one batch, which is none of these pipelines' way."""
    wan = zoo.FAMILIES["Wan"]
    for method in (None, "pisa"):
        pipe = build(wan, method)
        config = faster(pipe)
        config.is_guidance_distilled = False
        pipe.transformer.enable_cache(config)
        with pytest.raises((IndexError, RuntimeError, ValueError)) as caught:
            wan.go(pipe, STEPS, **wan.guided)
        assert "dit_accel" not in str(caught.traceback[-1].path)
