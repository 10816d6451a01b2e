"""FLUX.2: what the other families do not have. See test_families.py for the rest."""

import copy

import families
import pytest
import specimens
import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)

import dit_accel
from dit_accel import InputError
from dit_accel.pipelines import session_of

SPARSE = {"density": 0.25, "block_size": 4}


@pytest.fixture(scope="module")
def _built():
    return specimens.built(families.klein).transformer


@pytest.fixture
def model(_built):
    return copy.deepcopy(_built).double()


def positions(*images, batch=1):
    ids = [
        torch.cartesian_prod(
            torch.tensor([10 * i]), torch.arange(rows), torch.arange(columns), torch.arange(1)
        )
        for i, (rows, columns) in enumerate(images)
    ]
    return torch.cat(ids).expand(batch, -1, -1)


def given(*images, batch=1, text=10):
    ids = positions(*images, batch=batch)
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, ids.shape[1], 16, generator=draw).double(),
        "encoder_hidden_states": torch.randn(batch, text, 48, generator=draw).double(),
        "timestep": torch.full((batch,), 0.5).double(),
        "img_ids": ids,
        "txt_ids": torch.cartesian_prod(
            *[torch.arange(1)] * 3, torch.arange(text)
        ).expand(batch, -1, -1),
    }  # fmt: skip


@torch.no_grad()
def run(model, given):
    return model(**given, return_dict=False)


@pytest.mark.parametrize("images", [[(6, 5)], [(6, 5), (4, 7), (1, 3)], [(1, 1), (2, 2)]])
@pytest.mark.parametrize("fused", [False, True])
def test_references_of_any_size_and_fused_projections(model, images, fused):
    if fused:
        model.fuse_qkv_projections()
    call = given(*images, batch=2)
    (wanted,) = run(model, call)
    dit_accel.accelerate(model, "dense")
    assert torch.equal(run(model, call)[0], wanted)
    for block_size, layout in ((4, "gilbert"), (7, "tile3d")):
        dit_accel.accelerate(model, "pisa", density=1.0, block_size=block_size, layout=layout)
        torch.testing.assert_close(run(model, call)[0], wanted, rtol=1e-9, atol=1e-9)


def test_half_precision(model):
    model.bfloat16()
    call = specimens.copied(given((6, 5), (3, 4)), torch.bfloat16)
    (wanted,) = run(model, call)
    dit_accel.accelerate(model, "dense")
    assert torch.equal(run(model, call)[0], wanted)
    dit_accel.accelerate(model, "pisa", density=1.0, block_size=4)
    (got,) = run(model, call)
    assert got.dtype == torch.bfloat16
    # a rounding of bf16 (2^-8) in each of two blocks, of values of about 1
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


def kv_calls(refs=((4, 7), (1, 3)), image=(6, 5)):
    """The two kinds of forward of klein KV: references first, then without them."""
    whole = given(image, *refs)
    one, count = given(image), image[0] * image[1]
    ids, states = whole["img_ids"], whole["hidden_states"]
    whole["img_ids"] = torch.cat([ids[:, count:], ids[:, :count]], 1)
    whole["hidden_states"] = torch.cat([states[:, count:], states[:, :count]], 1)
    extract = {"kv_cache_mode": "extract", "num_ref_tokens": ids.shape[1] - count}
    return {**whole, **extract}, {**one, "timestep": torch.tensor([0.2]).double()}


def run_kv(model, calls):
    first, second = calls
    out, cache = run(model, first)
    (later,) = run(model, {**second, "kv_cache": cache, "kv_cache_mode": "cached"})
    return out, later, cache


@pytest.fixture
def kv(model):
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


def test_klein_kv_keeps_its_references_exact(kv):
    calls = kv_calls()
    *wanted, kept = run_kv(kv, calls)
    text, image, refs = 10, 30, 31
    pairs = (text + image) * (text + image + refs) + refs * refs
    for options, close in (({"density": 1.0, "block_size": 7}, True), (SPARSE, False)):
        dit_accel.accelerate(kv, "pisa", **options)
        *got, cache = run_kv(kv, calls)
        for mine, stock in zip(got, wanted, strict=True):
            if close:
                torch.testing.assert_close(mine, stock, rtol=1e-9, atol=1e-9)
            else:
                assert (mine - stock).abs().max() > 1e-4
        layers = zip(cache.double_block_caches, kept.double_block_caches, strict=True)
        for mine, stock in layers:  # those of the first layer, before anything is approximated
            torch.testing.assert_close(mine.k_ref, stock.k_ref, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(mine.v_ref, stock.v_ref, rtol=1e-9, atol=1e-9)
        first = session_of(kv).log.records[0]
        assert int(first.every) == 2 * pairs, "of two heads"
        own = (text + image) ** 2 * 2
        assert int(first.every - first.exact) < own
        assert (int(first.every) == int(first.exact)) is close
    dit_accel.accelerate(kv, "dense")
    *got, _ = run_kv(kv, calls)
    assert all(torch.equal(mine, stock) for mine, stock in zip(got, wanted, strict=True))
    assert int(session_of(kv).log.records[0].every) == 2 * pairs


def test_references_never_see_the_rest(kv):
    """What klein KV keeps of them is the same whatever the text and the noise are."""
    dit_accel.accelerate(kv, "pisa", **SPARSE)
    first, second = kv_calls()
    *_, cache = run_kv(kv, (first, second))
    noise = first["hidden_states"].clone()
    noise[:, -30:] += 1
    other = {**first, "hidden_states": noise}
    other["encoder_hidden_states"] = first["encoder_hidden_states"] + 1
    *_, again = run_kv(kv, (other, second))
    for one, two in zip(cache.single_block_caches, again.single_block_caches, strict=True):
        torch.testing.assert_close(one.k_ref, two.k_ref, rtol=1e-9, atol=1e-9)


def test_klein_kv_is_not_compiled(kv):
    dit_accel.accelerate(kv, "pisa", **SPARSE)
    kv.compile(backend="eager")
    with pytest.raises(InputError, match="references outside of a compiled model"):
        run_kv(kv, kv_calls())
    torch._dynamo.reset()


def test_what_is_not_supported_is_refused(model):
    call = given((6, 5))
    dit_accel.accelerate(model, "pisa", **SPARSE)
    with pytest.raises(InputError, match="called by its transformer's forward"):
        model.transformer_blocks[0].attn(torch.zeros(1, 30, 32), torch.zeros(1, 10, 32))
    masked = {"attention_mask": torch.ones(1, 1, 1, 40, dtype=torch.bool)}
    with pytest.raises(InputError, match=r"expected no mask in FLUX.2's .* \[1, 1, 1, 40\]"):
        run(model, {**call, "joint_attention_kwargs": masked})
    model.single_transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(InputError, match="context parallelism"):
        run(model, call)
