"""FLUX.1: text and image under one attention, in blocks of two kinds."""

import copy

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from spy import spying

import dit_accel
from dit_accel import InputError, presets
from dit_accel.pipelines import session_of
from dit_accel.pipelines.flux import FluxProcessor
from dit_accel.pipelines.plug import prepare
from dit_accel.pipelines.session import ATTRIBUTE

SPARSE = {"density": 0.25, "block_size": 4}


@pytest.fixture(scope="module")
def _built():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    # attention of fresh weights is all but flat: sharpen it, so that what is dropped shows
    for name, weight in model.named_parameters():
        if ".norm_" in name and weight.ndim == 1 and "linear" not in name:
            torch.nn.init.normal_(weight, mean=2.0, std=0.5)
    return model


@pytest.fixture
def model(_built):
    return copy.deepcopy(_built)


@pytest.fixture
def pipe(model):
    return _pipe(FluxPipeline, model)


def _pipe(cls, model):
    made = cls(FlowMatchEulerDiscreteScheduler(), *[None] * 5, transformer=model)
    made.set_progress_bar_config(disable=True)
    return made


def positions(*images):
    """Of images with so many rows and columns."""
    return torch.cat(
        [
            torch.cartesian_prod(torch.tensor([i]), torch.arange(rows), torch.arange(columns))
            for i, (rows, columns) in enumerate(images)
        ]
    ).float()


def given(*images, batch=1, text=10, dtype=torch.float32, seed=0):
    """What a transformer's forward takes, for images of 6x5 tokens or others."""
    ids = positions(*(images or [(6, 5)]))
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    return {
        "hidden_states": random(batch, len(ids), 64),
        "encoder_hidden_states": random(batch, text, 32),
        "pooled_projections": random(batch, 32),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


@torch.no_grad()
def run(model, given):
    return model(**given).sample


@torch.no_grad()
def go(pipe, seed=0, batch=1, **arguments):
    """Latents of a pipeline's call with random embeddings of the text."""
    draw = torch.Generator().manual_seed(7)
    texts = {
        "prompt_embeds": torch.randn(batch, 10, 32, generator=draw),
        "pooled_prompt_embeds": torch.randn(batch, 32, generator=draw),
        "negative_prompt_embeds": torch.randn(batch, 10, 32, generator=draw),
        "negative_pooled_prompt_embeds": torch.randn(batch, 32, generator=draw),
    }
    call = {
        "height": 96,
        "width": 80,
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    return pipe(**texts, **{**call, **arguments}).images


@pytest.mark.parametrize("fused", [False, True])
def test_dense_through_ours_is_stock_to_the_bit(model, fused):
    if fused:
        model.fuse_qkv_projections()
    call = given(batch=2)
    wanted = run(model, call)
    assert dit_accel.accelerate(model, "dense") is model
    assert all(type(one) is FluxProcessor for one in model.attn_processors.values())
    assert torch.equal(run(model, call), wanted)
    assert session_of(model).log.density == 1.0
    dit_accel.accelerate(model, "pisa", dense_steps=1, **SPARSE)
    assert torch.equal(run(model, call), wanted)
    assert session_of(model).log.by_layer == dict.fromkeys(range(4), 1.0)


@pytest.mark.parametrize("images", [((6, 5),), ((7, 3),), ((1, 1),), ((4, 3), (4, 3))])
@pytest.mark.parametrize("fused", [False, True])
def test_full_density_is_dense(model, images, fused):
    """In fp64, where nothing but a wrong formula could tell them apart; 4 and 7 divide little."""
    model.double()
    if fused:
        model.fuse_qkv_projections()
    call = given(*images, batch=2, dtype=torch.float64)
    wanted = run(model, call)
    for block_size, layout in ((4, "gilbert"), (7, "tile3d")):
        dit_accel.accelerate(model, "pisa", density=1.0, block_size=block_size, layout=layout)
        # queries and keys are rounded to fp32 by both when they are rotated
        torch.testing.assert_close(run(model, call), wanted, rtol=1e-9, atol=1e-9)


def test_low_density_leaves_out_pairs_of_the_image_alone(model):
    """The text, which comes first, is never approximated."""
    model.double()
    call = given(dtype=torch.float64)
    outputs = []
    attn = model.transformer_blocks[0].attn
    handle = attn.register_forward_hook(lambda module, args, out: outputs.append(out))
    wanted = run(model, call)
    dit_accel.accelerate(model, "pisa", density=0.2, block_size=4)
    got = run(model, call)
    handle.remove()
    assert (got - wanted).abs().max() > 1e-3
    (image, text), (sparse_image, sparse_text) = outputs
    torch.testing.assert_close(sparse_text, text, rtol=1e-9, atol=1e-9)
    assert (sparse_image - image).abs().max() > 1e-3
    assert 0.2 < session_of(model).log.density < 0.8


def test_layers_count_both_kinds_of_block_in_order(model):
    method = spying()
    dit_accel.accelerate(model, method)
    run(model, given())
    assert [layer for _, _, layer, *_ in method.route.seen] == [0, 1, 2, 3]
    assert model.single_transformer_blocks[0].attn._dit_accel.layer == 2
    dit_accel.accelerate(model, presets.pisa(**SPARSE), dense_layers=(0, -1))
    # timesteps that rise begin another call
    run(model, {**given(), "timestep": torch.tensor([0.9])})
    by_layer = session_of(model).log.by_layer
    assert [by_layer[layer] == 1.0 for layer in range(4)] == [True, False, False, True]
    with pytest.raises(InputError, match="expected layers from -4 to 3"):
        dit_accel.accelerate(model, "pisa", dense_layers=(4,))


def test_half_precision(model):
    model.bfloat16()
    call = given(dtype=torch.bfloat16)
    wanted = run(model, call)
    dit_accel.accelerate(model, "dense")
    assert torch.equal(run(model, call), wanted)
    dit_accel.accelerate(model, "pisa", density=1.0, block_size=4)
    got = run(model, call)
    assert got.dtype == torch.bfloat16
    # a rounding of bf16 (2^-8) in each of four blocks, of values of about 1
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


def test_a_pipeline_tells_steps_and_branches(pipe):
    stock = go(pipe, true_cfg_scale=2.0)
    method = spying(dense_steps=1)
    assert dit_accel.accelerate(pipe, method) is pipe
    first = go(pipe, true_cfg_scale=2.0)
    assert first.isfinite().all()
    assert not torch.equal(first, stock)
    seen = method.route.seen
    assert [step for step, *_ in seen] == [1] * 8 + [2] * 8
    assert {total for _, total, *_ in seen} == {3}
    assert {branch for *_, branch, _ in seen} == {"transformer/cond", "transformer/uncond"}
    where = seen[0][-1]
    assert (where.grid, where.text, where.key_valid) == ((1, 6, 5), slice(0, 10), None)
    assert session_of(pipe).log.by_step[0] == 1.0
    assert len(session_of(pipe).state) == 0
    assert torch.equal(go(pipe, true_cfg_scale=2.0), first)
    dit_accel.accelerate(pipe, "dense")
    assert torch.equal(go(pipe, true_cfg_scale=2.0), stock)
    dit_accel.restore(pipe)
    assert torch.equal(go(pipe, true_cfg_scale=2.0), stock)


def test_pictures_of_another_size_after_the_first(pipe):
    method = spying()
    dit_accel.accelerate(pipe, method)
    go(pipe)
    with torch.inference_mode():
        go(pipe, height=80, width=96)
    grids = [where.grid for *_, where in method.route.seen]
    assert grids == [(1, 6, 5)] * 12 + [(1, 5, 6)] * 12


@pytest.mark.parametrize("size", [(6, 5), (4, 7), (1, 3)])
def test_kontext_has_a_grid_for_its_reference_of_whatever_size(model, size):
    pipe = _pipe(FluxKontextPipeline, model)
    rows, columns = size
    call = {"image": torch.randn(1, 16, 2 * rows, 2 * columns), "max_area": 96 * 80}
    wanted = go(pipe, **call)
    method = spying()
    dit_accel.accelerate(pipe, method)
    assert not torch.equal(go(pipe, **call), wanted)
    for *_, where in method.route.seen:
        assert (where.grid, where.more, where.text) == ((1, 6, 5), ((1, *size),), slice(0, 10))
    dit_accel.accelerate(pipe, "pisa", density=1.0, block_size=4)
    torch.testing.assert_close(go(pipe, **call), wanted, rtol=1e-3, atol=1e-3)


def test_positions_that_make_no_grid_are_refused_unless_processors_are_stock(model):
    call = given()
    call["img_ids"] = call["img_ids"].flip(0)
    wanted = run(model, call)
    prepare(model)
    assert torch.equal(run(model, call), wanted)
    dit_accel.accelerate(model, "pisa")
    with pytest.raises(InputError, match=r"img_ids: expected .* got 30 of one image that make no"):
        run(model, call)
    dit_accel.restore(model)
    assert torch.equal(run(model, call), wanted)


def test_ip_adapters_are_refused(model):
    call = given()
    adapted = {
        name: FluxAttnProcessor() if "single" in name else FluxIPAdapterAttnProcessor(32, 32)
        for name in model.attn_processors
    }
    images = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 4, 32)]}}
    model.set_attn_processor(dict(adapted))
    wanted = run(model, {**call, **images})
    with pytest.raises(InputError, match="pisa: expected no IP-adapter, got one: its attention to"):
        dit_accel.accelerate(model, "pisa")
    assert not hasattr(model, ATTRIBUTE)
    assert model.attn_processors == adapted
    # single blocks have nothing to do with it, so they may be ours
    prepare(model)
    ours = FluxProcessor(presets.dense())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(ours)
    assert torch.equal(run(model, {**call, **images}), wanted)
    model.set_attn_processor(ours)
    with pytest.raises(InputError, match="expected no IP-adapter"):
        run(model, {**call, **images})
    dit_accel.restore(model)
    assert torch.equal(run(model, {**call, **images}), wanted)


def test_what_is_not_supported_is_refused(model):
    call = given()
    with pytest.raises(InputError, match=r"a Method, got none; call dit_accel\.restore"):
        FluxProcessor()
    with pytest.raises(InputError, match="FluxProcessor: expected a Method, got str"):
        FluxProcessor("pisa")
    model.set_attn_processor(FluxProcessor(presets.pisa()))
    with pytest.raises(InputError, match=r"expected a transformer prepared by"):
        run(model, call)
    dit_accel.accelerate(model, "pisa")
    with pytest.raises(InputError, match="called by its transformer's forward"):
        model.transformer_blocks[0].attn(torch.zeros(1, 30, 32), torch.zeros(1, 10, 32))
    masked = {"attention_mask": torch.ones(1, 1, 1, 40, dtype=torch.bool)}
    with pytest.raises(InputError, match=r"expected no mask in FLUX's .* \[1, 1, 1, 40\]"):
        run(model, {**call, "joint_attention_kwargs": masked})
    model.single_transformer_blocks[1].attn.processor._parallel_config = object()
    with pytest.raises(InputError, match="context parallelism"):
        run(model, call)
