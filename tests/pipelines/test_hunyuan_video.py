"""HunyuanVideo: video and padded text under one attention, in blocks of two kinds."""

import copy

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

import dit_accel
from dit_accel import InputError, Method, Schedule, presets
from dit_accel.layout import LAYOUTS
from dit_accel.pipelines import processor, session_of
from dit_accel.pipelines.hunyuan_video import HunyuanVideoProcessor
from dit_accel.rest import Centroid
from dit_accel.route import PooledScore

SPARSE = {"density": 0.25, "block_size": 4}
SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


class Spy:
    """A route that notes where it was called."""

    needs = ()

    def __init__(self):
        self.seen = []
        self.inner = PooledScore(density=0.3, bias=False)

    def __call__(self, blocked, rest, ctx):
        self.seen.append((ctx.step, ctx.num_steps, ctx.layer, ctx.branch, ctx.geometry))
        return self.inner(blocked, rest, ctx)


def spying(**schedule):
    return Method(LAYOUTS["raster"](4), Spy(), Centroid(), Schedule(**schedule), name="spy")


def random_model(**changes):
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(**{**SMALL, **changes}).eval()
    # attention of fresh weights is all but flat: sharpen it, so that what is dropped shows
    for name, weight in model.named_parameters():
        if any(f".{norm}." in name for norm in ("norm_q", "norm_k", "norm_added_q")):
            torch.nn.init.normal_(weight, mean=2.0, std=0.5)
    return model


@pytest.fixture(scope="module")
def _built():
    return random_model()


@pytest.fixture
def model(_built):
    return copy.deepcopy(_built)


@pytest.fixture
def pipe(model):
    made = HunyuanVideoPipeline(
        None, None, model, None, FlowMatchEulerDiscreteScheduler(), None, None
    )
    made.set_progress_bar_config(disable=True)
    return made


def given(latent=(3, 8, 6), lengths=(7,), text=10, dtype=torch.float32, seed=0):
    """What a transformer's forward takes; latents of 3x8x6 are 3x4x3 tokens."""
    draw, batch = torch.Generator().manual_seed(seed), len(lengths)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    return {
        "hidden_states": random(batch, 4, *latent),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": random(batch, text, 24),
        "encoder_attention_mask": torch.tensor([[i < n for i in range(text)] for n in lengths]).to(
            dtype
        ),
        "pooled_projections": random(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


@torch.no_grad()
def run(model, given):
    return model(**given).sample


def one_of(given, i):
    return {name: value[i : i + 1] for name, value in given.items()}


@torch.no_grad()
def go(pipe, **arguments):
    """Latents of a pipeline's call with random embeddings of texts that differ in length."""
    draw = torch.Generator().manual_seed(7)
    call = {"height": 64, "width": 48, "num_frames": 9, "num_inference_steps": 3}
    for name, length in (("", 7), ("negative_", 4)):
        call[f"{name}prompt_embeds"] = torch.randn(1, 10, 24, generator=draw)
        call[f"{name}pooled_prompt_embeds"] = torch.randn(1, 8, generator=draw)
        call[f"{name}prompt_attention_mask"] = (torch.arange(10) < length).unsqueeze(0)
    call |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    return pipe(**{**call, **arguments}).frames


@pytest.mark.parametrize("kind", [None, "token_replace"])
def test_dense_through_ours_is_stock_to_the_bit(kind):
    model, call = random_model(image_condition_type=kind), given(lengths=(7, 3))
    wanted = run(model, call)
    assert dit_accel.accelerate(model, "dense") is model
    assert torch.equal(run(model, call), wanted)
    assert session_of(model).log.density == 1.0
    dit_accel.accelerate(model, "pisa", dense_steps=1, **SPARSE)
    assert torch.equal(run(model, call), wanted)
    assert session_of(model).log.by_layer == dict.fromkeys(range(4), 1.0)


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_a_named_backend_computes_dense_attention_over_padded_text(model, backend):
    """Also one that takes no mask: it is given the valid keys alone."""
    call = given(lengths=(7, 3))
    wanted = run(model, call)
    dit_accel.accelerate(model, "dense", backend=backend)
    torch.testing.assert_close(run(model, call), wanted, rtol=1e-4, atol=1e-5)
    assert session_of(model).log.density == 1.0
    call["encoder_attention_mask"][:] = 1
    assert (run(model, call) - wanted).abs().max() > 1e-3, "the padding mattered"


@pytest.mark.parametrize(
    ("latent", "text", "changes"),
    [
        ((3, 8, 6), 10, {}),
        ((5, 10, 6), 10, {}),
        ((1, 2, 2), 1, {}),
        ((3, 8, 6), 10, {"image_condition_type": "token_replace"}),
        ((4, 8, 6), 7, {"patch_size": 1, "patch_size_t": 2}),
    ],
)
def test_full_density_is_dense(latent, text, changes):
    """In fp64, where nothing but a wrong formula could tell them apart; 4 and 7 divide little."""
    model = random_model(**changes).double()
    call = given(latent, (min(7, text), 1), text, dtype=torch.float64)
    wanted = run(model, call)
    for block_size, layout in ((4, "gilbert"), (7, "tile3d")):
        dit_accel.accelerate(model, "pisa", density=1.0, block_size=block_size, layout=layout)
        # queries and keys are rounded to fp32 by both when they are rotated
        torch.testing.assert_close(run(model, call), wanted, rtol=1e-9, atol=1e-9)


def test_low_density_leaves_out_pairs_of_the_video_alone(model):
    """The text, which comes last, is never approximated."""
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
    (video, text), (sparse_video, sparse_text) = outputs
    torch.testing.assert_close(sparse_text, text, rtol=1e-9, atol=1e-9)
    assert (sparse_video - video).abs().max() > 1e-3
    assert 0.2 < session_of(model).log.density < 0.8


@pytest.mark.parametrize("options", [{"density": 1.0}, {"density": 0.2}])
def test_padded_text_changes_nothing(model, options):
    model.double()
    call = given(dtype=torch.float64)
    dit_accel.accelerate(model, "pisa", block_size=4, **options)
    wanted = run(model, call)
    garbage = call["encoder_hidden_states"].clone()
    garbage[:, 7:] = 1e3
    torch.testing.assert_close(
        run(model, {**call, "encoder_hidden_states": garbage}), wanted, rtol=1e-9, atol=1e-9
    )
    names = ("encoder_hidden_states", "encoder_attention_mask")
    short = {**call, **{name: call[name][:, :7] for name in names}}
    torch.testing.assert_close(run(model, short), wanted, rtol=1e-9, atol=1e-9)


def test_a_batch_of_two_is_two_batches_of_one(model):
    model.double()
    call = given(lengths=(9, 2), dtype=torch.float64)
    dit_accel.accelerate(model, "pisa", **SPARSE)
    both = run(model, call)
    for i in range(2):
        torch.testing.assert_close(
            both[i : i + 1], run(model, one_of(call, i)), rtol=1e-9, atol=1e-9
        )


def test_layers_count_both_kinds_of_block_in_order(model):
    method = spying()
    dit_accel.accelerate(model, method)
    run(model, given())
    assert [layer for _, _, layer, *_ in method.route.seen] == [0, 1, 2, 3]
    assert model.single_transformer_blocks[0].attn._dit_accel.layer == 2
    where = method.route.seen[0][-1]
    assert (where.grid, where.text) == ((3, 4, 3), slice(36, 46))
    assert where.key_valid.tolist() == [[True] * 43 + [False] * 3]
    dit_accel.accelerate(model, presets.pisa(**SPARSE), dense_layers=(0, -1))
    # timesteps that rise begin another call
    run(model, {**given(), "timestep": torch.tensor([900.0])})
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


def test_restore_leaves_nothing_behind(model):
    call = given()
    wanted = run(model, call)
    before = dict(model.attn_processors)
    dit_accel.accelerate(model, "pisa", **SPARSE)
    assert not torch.equal(run(model, call), wanted)
    refiner = [one for name, one in model.attn_processors.items() if "refiner" in name]
    assert [type(one) for one in refiner] == [AttnProcessor2_0]
    assert dit_accel.restore(model) is model
    after = model.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(run(model, call), wanted)
    for module in model.modules():
        assert not [name for name in vars(module) if "dit_accel" in name]
        assert not module._forward_pre_hooks


def test_one_instance_for_every_module(model):
    """diffusers' own setter, which also reaches the refiner of the text."""
    call = given(lengths=(7, 3))
    stock = run(model, call)
    dit_accel.accelerate(model, "pisa", **SPARSE)
    wanted = run(model, call)
    dit_accel.restore(model)
    model.set_attn_processor(processor(model, "dense"))
    assert torch.equal(run(model, call), stock)
    model.set_attn_processor(processor(model, "pisa", **SPARSE))
    assert len({id(one) for one in model.attn_processors.values()}) == 1
    assert torch.equal(run(model, call), wanted)
    dit_accel.restore(model)
    for name, one in model.attn_processors.items():
        refiner = name.startswith("context_embedder")
        assert type(one) is (AttnProcessor2_0 if refiner else HunyuanVideoAttnProcessor2_0)


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
    valid = {branch: where.key_valid.sum().item() for *_, branch, where in seen}
    assert valid == {"transformer/cond": 36 + 7, "transformer/uncond": 36 + 4}
    assert session_of(pipe).log.by_step[0] == 1.0
    assert len(session_of(pipe).state) == 0
    assert torch.equal(go(pipe, true_cfg_scale=2.0), first)
    dit_accel.accelerate(pipe, "dense")
    assert torch.equal(go(pipe, true_cfg_scale=2.0), stock)
    dit_accel.restore(pipe)
    assert torch.equal(go(pipe, true_cfg_scale=2.0), stock)


def test_what_is_not_supported_is_refused(model):
    call = given()
    with pytest.raises(InputError, match="HunyuanVideoProcessor: expected a Method, got str"):
        HunyuanVideoProcessor("pisa")
    model.set_attn_processor(HunyuanVideoProcessor(presets.pisa()))
    with pytest.raises(InputError, match=r"expected a transformer prepared by"):
        run(model, call)
    dit_accel.accelerate(model, "pisa")
    with pytest.raises(InputError, match="called by its transformer's forward"):
        model.transformer_blocks[0].attn(torch.zeros(1, 36, 32), torch.zeros(1, 10, 32))
    with pytest.raises(InputError, match=r"expected latents \[B, C, T, H, W\], got shape \[1, 4"):
        run(model, {**call, "hidden_states": torch.zeros(1, 4, 8, 6)})
    model.single_transformer_blocks[1].attn.processor._parallel_config = object()
    with pytest.raises(InputError, match="context parallelism"):
        run(model, call)
