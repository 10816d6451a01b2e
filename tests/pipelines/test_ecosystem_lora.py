"""LoRA and fused projections, before and after `accelerate` and `restore`."""

import pytest
import torch

import dit_accel

SPARSE = {"density": 0.25, "block_size": 4}


def lora_of(pipe, rank=2):
    """A state dict of random low-rank changes to every projection of the self-attention."""
    draw, made = torch.Generator().manual_seed(3), {}
    for name, module in pipe.transformer.named_modules():
        if not name.endswith((".to_q", ".to_k", ".to_v")) or "refiner" in name or "attn2" in name:
            continue
        out, into = module.weight.shape
        made[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, into, generator=draw)
        made[f"transformer.{name}.lora_B.weight"] = torch.randn(out, rank, generator=draw) * 0.3
    assert len(made) >= 18
    return made


@pytest.fixture
def expected(family):
    """Results without and with the LoRA: stock, and of a pipeline accelerated afterwards."""
    pipe = family.pipe()
    found = {"stock": family.go(pipe)}
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    found["sparse"] = family.go(pipe)
    dit_accel.restore(pipe)
    pipe.load_lora_weights(lora_of(pipe), adapter_name="ours")
    found["stock+lora"] = family.go(pipe)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    found["sparse+lora"] = family.go(pipe)
    values = list(found.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    return found


def test_lora_comes_and_goes_in_an_accelerated_pipeline(family, expected):
    pipe = family.pipe()
    weights = lora_of(pipe)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    pipe.load_lora_weights(dict(weights), adapter_name="ours")
    assert torch.equal(family.go(pipe), expected["sparse+lora"])
    pipe.disable_lora()
    assert torch.equal(family.go(pipe), expected["sparse"])
    pipe.enable_lora()
    dit_accel.accelerate(pipe, "dense")
    assert torch.equal(family.go(pipe), expected["stock+lora"])
    dit_accel.restore(pipe)
    assert torch.equal(family.go(pipe), expected["stock+lora"])
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    pipe.unload_lora_weights()
    assert torch.equal(family.go(pipe), expected["sparse"])
    dit_accel.restore(pipe)
    assert torch.equal(family.go(pipe), expected["stock"])


def test_lora_fused_into_the_weights(family, expected):
    """Fused weights round differently; a plan may tip, which would show as 1e-1."""
    pipe = family.pipe()
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    pipe.load_lora_weights(lora_of(pipe), adapter_name="ours")
    pipe.fuse_lora()
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(family.go(pipe), expected["sparse+lora"], **close)
    dit_accel.restore(pipe)
    torch.testing.assert_close(family.go(pipe), expected["stock+lora"], **close)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    pipe.unfuse_lora()
    torch.testing.assert_close(family.go(pipe), expected["sparse+lora"], **close)
    pipe.unload_lora_weights()
    torch.testing.assert_close(family.go(pipe), expected["sparse"], **close)


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_projections(family, when):
    if not hasattr(family.pipe().transformer, "fuse_qkv_projections"):
        pytest.skip(f"diffusers has no fuse_qkv_projections for {family.name}")
    pipe = family.pipe()
    stock = family.go(pipe)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    sparse = family.go(pipe)
    dit_accel.restore(pipe)
    for step in ("fuse", "accelerate") if when == "before" else ("accelerate", "fuse"):
        if step == "fuse":
            pipe.transformer.fuse_qkv_projections()
        else:
            dit_accel.accelerate(pipe, "pisa", **SPARSE)
    # one product in place of three rounds differently; a plan may tip, which would show as 1e-1
    torch.testing.assert_close(family.go(pipe), sparse, rtol=1e-3, atol=1e-3)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(family.go(pipe), sparse)
    dit_accel.restore(pipe)
    assert torch.equal(family.go(pipe), stock)
