"""Copies, pickles, saved pipelines, other pipelines of the same parts, other dtypes."""

import copy
import gc
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, WanPipeline, WanVideoToVideoPipeline

import dit_accel
from dit_accel.pipelines import session_of

# a fraction of the steps: only the pipeline's scheduler can tell how many there are
SPARSE = {"density": 0.25, "block_size": 4, "dense_steps": 0.5}


def through_pickle(one):
    return pickle.loads(pickle.dumps(one))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_has_a_session_of_its_own(family, duplicate):
    pipe = family.pipe()
    stock = family.go(pipe, 6)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    wanted = family.go(pipe, 6)
    other = duplicate(pipe)
    other.set_progress_bar_config(disable=True)
    assert session_of(other) is not session_of(pipe)
    before = list(session_of(pipe).log.records)
    assert torch.equal(family.go(other, 6), wanted)
    assert session_of(pipe).log.records == before
    assert [d == 1.0 for d in session_of(other).log.by_step.values()] == [True] * 3 + [False] * 3
    dit_accel.restore(other)
    assert torch.equal(family.go(other, 6), stock)
    assert torch.equal(family.go(pipe, 6), wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_run_in_turn(zoo, duplicate):
    """Step by step, as two loops of denoising would: neither moves the other's clock."""
    wan = zoo.FAMILIES["Wan"]
    one = dit_accel.accelerate(wan.pipe().transformer, "svg_ear", q_clusters=6, k_clusters=9)
    two = duplicate(one)
    steps = ([], [])
    with torch.no_grad():
        for timestep in (900.0, 500.0, 100.0):
            for model, found in zip((one, two), steps, strict=True):
                model(**{**wan.given(), "timestep": torch.tensor([timestep])})
                found.extend(session_of(model).log.by_step)
    assert steps[0] == steps[1] == [0, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_can_be_compiled_beside_the_original(zoo, duplicate):
    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe()
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    wanted = wan.go(pipe)
    records = len(session_of(pipe).log)
    other = duplicate(pipe)
    other.set_progress_bar_config(disable=True)
    other.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.equal(wan.go(other), wanted)
    assert len(session_of(other).log) == len(session_of(pipe).log) == records
    torch._dynamo.reset()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_two_transformers_of_a_copy_share_its_session(zoo, duplicate):
    wan = zoo.FAMILIES["Wan"]
    parts = {"transformer": wan.pipe().transformer, "transformer_2": wan.pipe().transformer}
    pipe = WanPipeline(**parts, **wan.parts(), boundary_ratio=0.7)
    pipe.set_progress_bar_config(disable=True)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    wanted = wan.go(pipe, 6)
    other = duplicate(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(wan.go(other, 6), wanted)
    assert {record.model for record in session_of(other).log.records} == set(parts)
    assert dict(session_of(other).models) == {name: other.components[name] for name in parts}


def test_a_loaded_pipeline_is_copied_with_what_load_added(tiny_wan, go):
    from dit_accel.pipelines.embedded import VocabularyWarning

    tiny_wan.set_attn_processor("pisa")
    wanted = go(tiny_wan, num_inference_steps=1)
    for other in (copy.deepcopy(tiny_wan), through_pickle(tiny_wan)):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(go(other, num_inference_steps=1), wanted)
        with pytest.warns(VocabularyWarning, match="does not know 'zebra'"):
            other.encode_prompt("a zebra", device="cpu")
        before = tiny_wan.transformer.attn_processors
        other.set_attn_processor("dense")
        assert tiny_wan.transformer.attn_processors == before
        assert session_of(other) is not session_of(tiny_wan)


def test_a_saved_pipeline_is_stock(family, tmp_path):
    pipe = family.pipe()
    stock = family.go(pipe)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    pipe.save_pretrained(tmp_path)
    empty = {name: None for name, part in pipe.components.items() if part is None}
    again = DiffusionPipeline.from_pretrained(tmp_path, **empty)
    again.set_progress_bar_config(disable=True)
    assert not hasattr(again.transformer, "_dit_accel")
    weights = pipe.transformer.state_dict()
    loaded = again.transformer.state_dict()
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(weights[name], loaded[name]) for name in weights)
    # weights in a file are aligned in another way than in memory, and products round by that
    torch.testing.assert_close(family.go(again), stock, rtol=1e-4, atol=1e-5)


def test_another_pipeline_of_the_same_parts(zoo):
    """What `from_pipe` makes shares the transformer, with all that is on it."""
    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe()
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    wan.go(pipe, 4)
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer

    def steps():
        texts = wan.texts(torch.Generator().manual_seed(0), 1)
        other(
            latents=torch.zeros(1, 4, 3, 8, 6), num_inference_steps=10, strength=0.6,
            output_type="latent", height=64, width=48, **texts,
        )  # fmt: skip
        return [density == 1.0 for density in session_of(other).log.by_step.values()]

    assert steps() == [True] * 3 + [False] * 3
    wan.go(pipe, 4)
    assert [d == 1.0 for d in session_of(pipe).log.by_step.values()] == [True] * 2 + [False] * 2
    # the pipeline that was accelerated may go
    del pipe
    gc.collect()
    assert steps() == [True] * 3 + [False] * 3
    # with a scheduler of its own it must be made known
    other.scheduler = type(other.scheduler)(shift=3.0)
    dit_accel.accelerate(other, "pisa", **SPARSE)
    assert steps() == [True] * 3 + [False] * 3
    dit_accel.restore(other)
    assert not hasattr(other, "_dit_accel")


def test_image_to_image_from_an_accelerated_pipeline(zoo):
    flux = zoo.FAMILIES["FLUX.1"]
    pipe = flux.pipe()
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    flux.go(pipe, 4)
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    method = zoo.spying(dense_steps=0.5)
    dit_accel.accelerate(other, method)
    flux.go(pipe, 4)
    assert {total for *_, total, _ in method.route.seen} == {4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_after_it_was_accelerated(family, dtype):
    pipe = family.pipe()
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    family.go(pipe)
    pipe.to(dtype)
    got = family.go(pipe, dtype=dtype)
    late = family.pipe().to(dtype)
    stock = family.go(late, dtype=dtype)
    dit_accel.accelerate(late, "pisa", **SPARSE)
    assert torch.equal(family.go(late, dtype=dtype), got)
    assert got.isfinite().all()
    assert not torch.equal(got, stock)
    dit_accel.accelerate(pipe, "dense")
    assert torch.equal(family.go(pipe, dtype=dtype), stock)


@pytest.mark.parametrize("layerwise", ["before", "after"])
def test_weights_that_are_cast_layer_by_layer(zoo, layerwise):
    """``enable_layerwise_casting``: fp8 weights, widened for every forward of their layer."""
    wan = zoo.FAMILIES["Wan"]
    results = []
    for method in (None, "dense", "pisa"):
        pipe = wan.pipe()
        cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
        if layerwise == "before":
            pipe.transformer.enable_layerwise_casting(**cast)
        if method is not None:
            dit_accel.accelerate(pipe, method, **(SPARSE if method == "pisa" else {}))
        if layerwise == "after":
            pipe.transformer.enable_layerwise_casting(**cast)
        assert torch.float8_e4m3fn in {one.dtype for one in pipe.transformer.parameters()}
        results.append(wan.go(pipe))
    assert torch.equal(results[0], results[1])
    assert results[2].isfinite().all()
    assert not torch.equal(results[0], results[2])
