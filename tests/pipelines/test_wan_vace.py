"""Wan VACE: control blocks of the same kind, before all others."""

import pytest
import torch
from diffusers import WanVACETransformer3DModel

import dit_accel
from dit_accel.pipelines import session_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        vace_layers=[0, 2],
        vace_in_channels=6,
    ).eval()
    # attention of fresh weights is all but flat: sharpen it, so that what is dropped shows
    for block in (*made.vace_blocks, *made.blocks):
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.normal_(norm.weight, mean=2.0, std=0.5)
    return made


def given(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 6, generator=draw, dtype=dtype),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=draw, dtype=dtype),
        "control_hidden_states": torch.randn(2, 6, 3, 8, 6, generator=draw, dtype=dtype),
    }


@torch.no_grad()
def run(model, given):
    return model(**given).sample


def test_layers_begin_with_the_control_blocks(model):
    order = [model.vace_blocks[0], model.vace_blocks[1], *model.blocks]
    seen = []
    for block in order:
        block.attn1.register_forward_pre_hook(lambda attn, args: seen.append(attn))
    dit_accel.accelerate(model, "pisa", density=0.2, block_size=4, dense_layers=(0, 4))
    run(model, given())
    assert [attn._dit_accel.layer for attn in seen] == [0, 1, 2, 3, 4]
    by_layer = session_of(model).log.by_layer
    assert [by_layer[layer] == 1.0 for layer in range(5)] == [True, False, False, False, True]
