"""HunyuanVideo 1.5: three texts under one mask, which never grows. See test_families.py."""

import copy

import families
import pytest
import specimens
import torch
from spy import spying

import dit_accel
from dit_accel.pipelines import session, session_of


@pytest.fixture(scope="module")
def _built():
    return specimens.built(families.hunyuan15).transformer


@pytest.fixture
def model(_built):
    return copy.deepcopy(_built)


def given(image=True, lengths=((7, 3), (4, 0)), dtype=torch.float32):
    """Latents of 3x4x5 tokens, 10 of language, 6 of glyphs, 5 of an image; valid ones first."""
    draw, batch = torch.Generator().manual_seed(0), len(lengths)

    def random(*shape):
        return torch.randn(batch, *shape, generator=draw).to(dtype)

    def mask(count, which):
        return torch.tensor([[i < pair[which] for i in range(count)] for pair in lengths]).to(dtype)

    return {
        "hidden_states": random(9, 3, 4, 5),
        "timestep": torch.full((batch,), 500.0, dtype=dtype),
        "encoder_hidden_states": random(10, 16),
        "encoder_attention_mask": mask(10, 0),
        "encoder_hidden_states_2": random(6, 16),
        "encoder_attention_mask_2": mask(6, 1),
        "image_embeds": random(5, 16) * image,
    }


@torch.no_grad()
def run(model, given):
    return model(**given).sample


@pytest.mark.parametrize("image", [False, True])
def test_the_geometry_counts_what_is_valid_of_all_three(model, image):
    method = spying()
    dit_accel.accelerate(model, method)
    run(model, given(image))
    *_, where = method.route.seen[0]
    assert (where.grid, where.text) == ((3, 4, 5), slice(60, 81))
    shown = 5 * image
    assert where.key_valid.sum(1).tolist() == [60 + shown + 10, 60 + shown + 4]
    assert where.key_valid[1, : 60 + shown + 4].all(), "valid ones first, as the model sorts them"


@pytest.mark.parametrize("image", [False, True])
def test_dense_is_stock_to_the_bit_with_a_mask_of_the_keys_alone(model, image, monkeypatch):
    call = given(image)
    wanted = run(model, call)
    inner, masks = session.dispatch_attention_fn, []

    def dispatch(*args, attn_mask=None, **kwargs):
        masks.append(list(attn_mask.shape))
        return inner(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(session, "dispatch_attention_fn", dispatch)
    dit_accel.accelerate(model, "dense")
    assert torch.equal(run(model, call), wanted)
    assert masks == [[2, 1, 1, 81]] * 2
    assert session_of(model).log.density == 1.0
    dit_accel.accelerate(model, "pisa", dense_layers=(0,), density=0.2, block_size=4)
    assert not torch.equal(run(model, call), wanted)
    assert len(masks) == 3


def test_half_precision(model):
    model.bfloat16()
    call = given(dtype=torch.bfloat16)
    wanted = run(model, call)
    dit_accel.accelerate(model, "dense")
    assert torch.equal(run(model, call), wanted)
    dit_accel.accelerate(model, "pisa", density=1.0, block_size=4)
    got = run(model, call)
    assert got.dtype == torch.bfloat16
    # a rounding of bf16 (2^-8) in each of two blocks, of values of about 1
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


def test_the_backend_that_diffusers_was_told_runs_dense_steps(model, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    told = []
    inner = session.dispatch_attention_fn
    monkeypatch.setattr(
        session,
        "dispatch_attention_fn",
        lambda *args, backend, **kw: told.append(backend) or inner(*args, backend=backend, **kw),
    )
    with attention_backend("native"):
        dit_accel.accelerate(model, "dense")
        model.set_attention_backend("_native_math")
        run(model, given())
        model.set_attention_backend("native")
    assert told == [AttentionBackendName._NATIVE_MATH] * 2
