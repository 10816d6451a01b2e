"""VMoBA against its equations: gates of query tokens, global and local selection."""

import pytest
import torch

import dit_accel
from dit_accel import InputError, presets
from dit_accel.kernels.token_attention import reference, token_attention
from dit_accel.layout import Cyclic
from dit_accel.state import State
from dit_accel.token_route import Gate, block_of
from dit_accel.types import Context, Geometry

GRID = (3, 4, 5)


def inputs(seed=0, batch=2, heads=2, length=60, depth=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, depth, generator=generator, dtype=dtype)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["threshold", "topk"])
@pytest.mark.parametrize("scope", ["head", "token"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_route_follows_the_equations(oracle, layer, scope, mode, padded):
    q, k, v = inputs(layer)
    valid = None
    if padded:
        valid = torch.rand(2, 60, generator=torch.Generator().manual_seed(9)) < 0.6
    ctx = Context(Geometry(GRID, key_valid=valid), layer=layer)
    blocked = Cyclic(1, (2, 2), (2, 2, 2))(q, k, v, ctx)
    plan = Gate(0.3, scope, mode)(blocked, None, ctx)
    blocks = oracle.lists(blocked.keys)
    for b in range(2):
        keep = [True] * 60 if valid is None else valid[b].tolist()
        for h in range(2):
            wanted = oracle.selection(q[b, h], k[b, h], range(60), blocks, keep, 0.3, scope, mode)
            assert plan.select[b, h].tolist() == wanted


@pytest.mark.parametrize("workspace", [reference.WORKSPACE_BYTES, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_follows_the_equations(oracle, monkeypatch, padded, workspace):
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", workspace)
    q, k, v = inputs(5)
    generator = torch.Generator().manual_seed(2)
    perm = torch.stack([torch.randperm(60, generator=generator) for _ in range(4)]).view(2, 2, 60)
    offsets = torch.tensor([0, 0, 7, 20, 20, 41, 60], dtype=torch.int32).view(1, 1, -1)
    select = torch.rand(2, 2, 60, 6, generator=generator) < 0.4
    select[0, 0, 3] = False
    valid = torch.rand(2, 60, generator=generator) < 0.7 if padded else None
    if padded:
        hole = ~valid[:, None, :, None]
        k, v = k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.nan)
    out, lse = token_attention(
        q, k, v, select, k_perm=perm, k_offsets=offsets, key_valid=valid, scale=0.7
    )

    class Blocks:
        pass

    Blocks.perm, Blocks.offsets = perm, offsets
    for b in range(2):
        keep = [True] * 60 if valid is None else valid[b].tolist()
        for h in range(2):
            blocks = oracle.only_valid(oracle.lists(Blocks, b, h), keep)
            each = [[n] for n in range(60)]  # every token is a block of queries by itself
            code = select[b, h].int().tolist()
            wanted = oracle.attend(q[b, h], k[b, h], v[b, h], each, blocks, code, 0.7)
            torch.testing.assert_close(out[b, h], wanted[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(lse[b, h], wanted[1], rtol=0, atol=1e-12)
    assert (out[0, 0, 3] == 0).all()
    assert lse[0, 0, 3] == -torch.inf


@pytest.mark.parametrize(
    "options",
    [
        {"rest": "centroid"},
        {"rest": "taylor"},
        {"rest": "taylor", "taylor": None},
        {"rest": "moment"},
        {"rest": "moment", "weight": "gaussian", "taylor": None},
    ],
)
def test_rests_follow_the_table(oracle, options):
    """Every token is a block of queries by itself."""
    q, k, v = inputs(6, batch=1)
    method = presets.vmoba(threshold=0.3, layout="gilbert", block_size=9, **options)
    ctx = Context(Geometry(GRID))
    out, _ = method(q, k, v, ctx, scale=0.5)
    blocked = method.layout(q, k, v, ctx, 0.5)
    select = method.route(blocked, method.rest, ctx).select
    blocks = oracle.lists(blocked.keys)
    for h in range(2):
        code = [[1 if taken else -1 for taken in row] for row in select[0, h].tolist()]
        rest = options["rest"]
        wanted, _ = oracle.attend(
            q[0, h],
            k[0, h],
            v[0, h],
            [[n] for n in range(60)],
            blocks,
            code,
            0.5,
            rest="taylor" if rest == "centroid" else rest,
            taylor=None if rest == "centroid" else options.get("taylor", "global"),
            weight=options.get("weight", "second"),
        )
        torch.testing.assert_close(out[0, h], wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("text", [None, slice(0, 4), slice(60, 64)])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_full_threshold_is_dense(text, layer):
    q, k, v = inputs(7, length=64 if text else 60)
    method = presets.vmoba(threshold=1.0)
    out, report = dit_accel.attention(
        q, k, v, method, grid=GRID, text=text, layer=layer, return_report=True
    )
    wanted = torch.softmax(q @ k.mT * 6**-0.5, -1) @ v
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    assert report.density == 1.0


def test_text_is_exact(oracle):
    q, k, v = inputs(8, length=65)
    text = slice(60, 65)
    ctx = Context(Geometry(GRID, text))
    method = presets.vmoba(threshold=0.2, layout="raster", block_size=8)
    blocked = method.layout(q, k, v, ctx)
    select = method.route(blocked, method.rest, ctx).select
    assert select[:, :, 60:].all()
    assert select[..., blocked.keys.num_video :].all()
    assert not select[:, :, :60].all()
    out, report = method(q, k, v, ctx)
    wanted = torch.softmax(q @ k.mT * 6**-0.5, -1) @ v
    torch.testing.assert_close(out[:, :, 60:], wanted[:, :, 60:], rtol=0, atol=1e-12)
    sizes = blocked.keys.sizes[0, 0]
    pairs = (select[0, 0] * sizes).sum()
    assert report.exact_pairs[0, 0] == pairs


def test_own_blocks_of_any_order():
    perm = torch.tensor([[[3, 0, 4, 1, 2]]])
    offsets = torch.tensor([[[0, 0, 2, 2, 5]]], dtype=torch.int32)
    assert block_of(perm, offsets).tolist() == [[[1, 3, 3, 1, 3]]]


def test_the_density_follows_the_threshold():
    q, k, v = inputs(9, length=480, batch=1)
    densities = []
    for threshold in (0.05, 0.2, 0.5, 0.9):
        method = presets.vmoba(threshold=threshold, mode="topk", layout="gilbert", block_size=8)
        _, report = dit_accel.attention(q, k, v, method, grid=(5, 8, 12), return_report=True)
        densities.append(report.density)
        assert abs(report.density - threshold) < 0.02
    assert densities == sorted(densities)


def test_low_precision(oracle):
    q, k, v = inputs(10, dtype=torch.float32)
    fine = dit_accel.attention(q.double(), k.double(), v.double(), "vmoba", grid=GRID)
    low = dit_accel.attention(q, k, v, "vmoba", grid=GRID)
    torch.testing.assert_close(low.double(), fine, rtol=0, atol=2e-6)


def test_combinations_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"Gate can be combined with, .* for every token"):
        presets.vmoba(rest="taylor", taylor="rest")
    for options, message in (
        ({"threshold": 0.0}, "threshold: expected float > 0"),
        ({"scope": "layer"}, "scope: expected head | token"),
        ({"mode": "top"}, "mode: expected threshold | topk"),
    ):
        with pytest.raises(InputError, match=message):
            presets.vmoba(**options)
    with pytest.raises(InputError, match="expected head or token, got 'x'"):
        Gate(scope="x")
    q = torch.zeros(1, 1, 4, 2)
    order = {
        "k_perm": torch.arange(4).view(1, 1, 4),
        "k_offsets": torch.tensor([[[0, 4]]], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match="select: expected bool"):
        token_attention(q, q, q, torch.ones(1, 1, 4, 2, dtype=torch.bool), **order)


@pytest.mark.parametrize(
    ("layer", "layers", "seen"),
    [(0, 30, {0, 1, 2}), (29, 30, {27, 28, 29}), (4, None, {2, 3, 4, 5, 6}), (0, 2, {0, 1})],
)
def test_first_use_prepares_every_kind_of_layer(monkeypatch, layer, layers, seen):
    """Each once, among the layers that there are, and with no memory of the caller's."""
    called = []
    real = Cyclic.__call__

    def spy(self, q, k, v, ctx, scale=None):
        called.append((ctx.layer, ctx.state))
        return real(self, q, k, v, ctx, scale)

    monkeypatch.setattr(Cyclic, "__call__", spy)
    method, state = presets.vmoba(threshold=0.5, block_size=4), State()
    ctx = Context(Geometry(GRID), layer=layer, num_layers=layers, state=state)
    method._rehearse(*inputs(), ctx, None)
    kinds = min(3, layers or 3)
    assert sorted(one % 3 for one, _ in called) == list(range(kinds))
    assert {one for one, _ in called} <= seen
    assert all(one is not state for _, one in called)
