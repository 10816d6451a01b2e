"""Captured calls: what the model made, and the dense result beside it."""

import pytest
import torch

from dit_accel import Context, Geometry, InputError
from dit_accel.eval import calls


def oracle(q, k, v, valid=None):
    """Dense attention and its normaliser in fp64."""
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


@pytest.fixture
def call():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 3 * 4 * 5 + 7, 8, generator=generator)
    valid = torch.rand(1, q.shape[2], generator=generator) > 0.2
    where = Geometry((3, 4, 5), slice(60, 67), valid)
    ctx = Context(where, step=4, num_steps=9, layer=2, num_layers=3, branch="transformer/cond")
    return calls.solved(q, k, v, ctx)


def test_the_result_is_dense_attention(call):
    out, lse = oracle(call.q, call.k, call.v, call.ctx.geometry.key_valid)
    torch.testing.assert_close(call.out.double(), out, rtol=0, atol=2e-6)
    torch.testing.assert_close(call.lse.double(), lse, rtol=0, atol=4e-6)


def test_a_call_survives_the_disk(call, tmp_path):
    again = calls.load(calls.save(call, tmp_path))
    for name in ("q", "k", "v", "out", "lse"):
        assert torch.equal(getattr(again, name), getattr(call, name)), name
    assert torch.equal(again.ctx.geometry.key_valid, call.ctx.geometry.key_valid)
    for name in ("step", "num_steps", "layer", "num_layers", "branch"):
        assert getattr(again.ctx, name) == getattr(call.ctx, name)
    assert (again.ctx.geometry.grid, again.ctx.geometry.text) == ((3, 4, 5), slice(60, 67))
    assert again.scale == call.scale
    assert calls.layers_in(tmp_path) == (2,)
    assert calls.steps_in(tmp_path) == (4,)


def test_layers_and_steps_by_text():
    assert calls.chosen_layers("auto", 30) == (0, 15, 29)
    assert calls.chosen_layers("-1,0", 6) == (0, 5)
    assert calls.chosen_steps("all", 3) == (0, 1, 2)
    assert calls.chosen_steps("auto", 20) == (0, 1, 6, 7, 12, 13, 18, 19)
    assert calls.chosen_steps("auto", 1) == (0,)
    with pytest.raises(InputError, match="numbers from -6 to 5, got 6"):
        calls.chosen_layers("6", 6)
    with pytest.raises(InputError, match="expected auto, all or a list"):
        calls.chosen_steps("some", 6)
