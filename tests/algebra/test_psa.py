"""PSA against its equations: sampled importance, levels, pooled keys with their log-counts."""

import math

import pytest
import torch

import dit_accel
from dit_accel import InputError, presets
from dit_accel.kernels.block_attention import batched, block_attention, reference
from dit_accel.pyramid import CAPS, RATIOS, Pyramid, pooled_pairs
from dit_accel.types import Context, Geometry

GRID = (3, 5, 7)


def inputs(seed=0, batch=2, heads=2, length=105, depth=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, depth, generator=generator, dtype=dtype)


class Blocks:
    def __init__(self, perm, offsets):
        self.perm, self.offsets = perm, offsets


def clusters(length, count, generator):
    perm = torch.stack([torch.randperm(length, generator=generator) for _ in range(4)])
    cuts = torch.randint(0, length + 1, (2, 2, count - 1), generator=generator)
    ends = torch.tensor([0, length]).expand(2, 2, 2)
    offsets = torch.cat([cuts, ends], -1).sort(-1).values.to(torch.int32)
    return Blocks(perm.view(2, 2, length), offsets)


@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["reference", "batched"])
def test_pooled_levels_follow_the_definition(oracle, monkeypatch, backend, padded, workspace):
    if workspace:
        module = {"reference": reference, "batched": batched}[backend]
        monkeypatch.setattr(module, "WORKSPACE_BYTES", workspace)
    q, k, v = inputs(1, length=61)
    generator = torch.Generator().manual_seed(7)
    queries, keys = clusters(61, 5, generator), clusters(61, 6, generator)
    code = torch.tensor([0, 1, 2, 4, 8, 8])[torch.randint(0, 6, (2, 2, 5, 6), generator=generator)]
    valid = None
    if padded:
        valid = torch.rand(2, 61, generator=generator) < 0.7
        hole = ~valid[:, None, :, None]
        k, v = k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.nan)
    out, lse = block_attention(
        q,
        k,
        v,
        code.to(torch.int8),
        q_perm=queries.perm,
        q_offsets=queries.offsets,
        k_perm=keys.perm,
        k_offsets=keys.offsets,
        key_valid=valid,
        scale=0.6,
        backend=backend,
    )
    for b in range(2):
        keep = [True] * 61 if valid is None else valid[b].tolist()
        for h in range(2):
            wanted = oracle.attend(
                q[b, h],
                k[b, h],
                v[b, h],
                oracle.lists(queries, b, h),
                oracle.only_valid(oracle.lists(keys, b, h), keep),
                code[b, h].tolist(),
                0.6,
            )
            torch.testing.assert_close(out[b, h], wanted[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(lse[b, h], wanted[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("least", [0.0, 0.3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("mode", "ratios"),
    [("threshold", RATIOS["wan-14b"]), ("topk", RATIOS["4-step"]), ("topk", (0.0, 0.3, 0.3, 0.9))],
)
def test_the_whole_method_follows_the_equations(oracle, mode, ratios, padded, least, cap):
    q, k, v = inputs(3)
    q, k = q * 2, k * torch.linspace(0.3, 2, 105).view(1, 1, -1, 1) + (2.0 if cap else 0.0)
    valid = None
    if padded:
        valid = torch.rand(2, 105, generator=torch.Generator().manual_seed(5)) < 0.8
    ctx = Context(Geometry(GRID, key_valid=valid))
    method = presets.psa(
        ratios=ratios, mode=mode, block_q=20, block_k=9, similarity_cap=cap, min_exact=least
    )
    out, report = method(q, k, v, ctx, scale=0.5)
    blocked = method.layout(q, k, v, ctx, 0.5)
    code = method.route(blocked, method.rest, ctx).code
    for b in range(2):
        keep = [True] * 105 if valid is None else valid[b].tolist()
        for h in range(2):
            queries = oracle.lists(blocked.queries, b, h)
            keys = oracle.only_valid(oracle.lists(blocked.keys, b, h), keep)
            wanted = oracle.levels(
                q[b, h], k[b, h], queries, keys, 0.5, ratios, mode, CAPS if cap else None, least
            )
            assert code[b, h].tolist() == wanted
            result, _ = oracle.attend(q[b, h], k[b, h], v[b, h], queries, keys, wanted, 0.5)
            torch.testing.assert_close(out[b, h], result, rtol=0, atol=1e-11)
            exact = sum(
                len(rows) * len(columns)
                for i, rows in enumerate(queries)
                for j, columns in enumerate(keys)
                if wanted[i][j] == 1
            )
            assert report.exact_pairs[b, h] == exact, "only level 1 is exact"


def test_the_cap_makes_a_difference():
    codes = []
    q, k, v = inputs(4)
    for cap in (False, True):
        ctx = Context(Geometry(GRID))
        method = presets.psa(block_q=20, block_k=9, similarity_cap=cap)
        codes.append(method.route(method.layout(q, k, v, ctx, 1.0), method.rest, ctx).code)
    assert ((codes[1] == 1) >= (codes[0] == 1)).all()
    assert (codes[1] == 1).sum() > (codes[0] == 1).sum()
    assert torch.equal(codes[0] == 0, codes[1] == 0)


@pytest.mark.parametrize("layout", ["raster", "gilbert", "tile3d", "cyclic", "kmeans"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), GRID])
@pytest.mark.parametrize("mode", ["threshold", "topk"])
def test_level_one_for_all_is_dense(layout, grid, mode):
    length = math.prod(grid) + 4
    q, k, v = inputs(6, length=length)
    text = slice(length - 4, length)
    method = presets.psa(ratios=(1.0, 1.0, 1.0, 1.0), mode=mode, layout=layout, block_k=8)
    out, report = dit_accel.attention(q, k, v, method, grid=grid, text=text, return_report=True)
    wanted = torch.softmax(q @ k.mT * 6**-0.5, -1) @ v
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    assert report.density == 1.0


def test_text_is_never_pooled():
    q, k, v = inputs(8, length=112)
    ctx = Context(Geometry(GRID, slice(0, 7)))
    method = presets.psa(block_q=20, block_k=9)
    blocked = method.layout(q, k, v, ctx)
    code = method.route(blocked, method.rest, ctx).code
    assert (code[..., blocked.queries.num_video :, :] == 1).all()
    assert (code[..., blocked.keys.num_video :] == 1).all()
    assert (code > 1).any()
    out, _ = method(q, k, v, ctx)
    wanted = torch.softmax(q @ k.mT * 6**-0.5, -1) @ v
    torch.testing.assert_close(out[:, :, :7], wanted[:, :, :7], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sample", ["stride", "random"])
def test_samples_can_be_repeated(sample):
    q, k, v = inputs(9)
    runs = [
        dit_accel.attention(
            q, k, v, presets.psa(block_q=20, block_k=9, sample=sample, seed=seed), grid=GRID
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (sample == "stride")


def test_chunks_of_the_importance_do_not_matter(monkeypatch):
    q, k, v = inputs(10)
    method = presets.psa(block_q=20, block_k=9)
    whole = dit_accel.attention(q, k, v, method, grid=GRID)
    monkeypatch.setattr("dit_accel.kernels.block_importance.reference.WORKSPACE_BYTES", 1)
    torch.testing.assert_close(
        dit_accel.attention(q, k, v, method, grid=GRID), whole, rtol=0, atol=1e-12
    )


def test_the_published_settings():
    assert presets.psa().route.ratios == (0.4, 0.5, 0.6, 0.8)
    assert presets.psa(mode="topk").route.ratios == (0.05, 0.15, 0.25, 0.5)
    assert presets.psa(ratios="wan-1.3b").route.ratios == (0.5, 0.6, 0.7, 0.8)
    method = presets.psa()
    assert (method.layout.query_block_size, method.layout.block_size) == (128, 64)
    assert presets.parse_option("psa", "ratios", "0.1,0.2,0.3,0.4") == (0.1, 0.2, 0.3, 0.4)
    assert presets.parse_option("psa", "ratios", "4-step") == "4-step"


def test_bad_options_are_told():
    for options, message in (
        ({"ratios": (0.4, 0.3, 0.6, 0.8)}, "expected four rising bounds in"),
        ({"ratios": (0.4, 0.5)}, "expected four rising bounds in"),
        ({"ratios": (0.4, 0.5, 0.6, 1.8)}, "expected four rising bounds in"),
        ({"ratios": "wan14b"}, r"got 'wan14b' \(did you mean 'wan-14b'\?\)"),
        ({"mode": "rank"}, "mode: expected threshold | topk"),
        ({"min_exact": 1.5}, "min_exact: expected float >= 0, <= 1"),
        ({"block_q": 0}, "block_q: expected int >= 1"),
    ):
        with pytest.raises(InputError, match=message):
            presets.psa(**options)
    with pytest.raises(InputError, match="none is left to a rest"):
        dit_accel.Method(presets.psa().layout, Pyramid(), presets.pisa().rest)
    with pytest.raises(InputError, match="sample: expected stride or random, got 'all'"):
        Pyramid(sample="all")
    inner = presets.flashblock(inner=presets.psa(block_k=8, block_q=8))
    with pytest.raises(InputError, match="got one with pooled levels"):
        dit_accel.attention(*inputs(0), inner, grid=GRID, state=dit_accel.State())


@pytest.mark.parametrize("padded", [False, True])
def test_pairs_of_queries_and_means_are_counted(padded):
    q, k, v = inputs(3)
    valid = torch.ones(2, 105, dtype=torch.bool)
    valid[1, 50:] = not padded
    geometry = Geometry(GRID, key_valid=valid if padded else None)
    method = presets.psa(ratios=(0.1, 0.3, 0.5, 0.8), mode="topk", block_q=16, block_k=8)
    trace = method.trace(q, k, v, Context(geometry))
    code = trace.plan.code
    wanted = torch.zeros(2, 2, dtype=torch.int64)
    for b in range(2):
        for h in range(2):
            for i, size in enumerate(trace.blocked.queries.sizes[0, 0].tolist()):
                for j in range(code.shape[3]):
                    first, last = trace.blocked.keys.offsets[0, 0, j : j + 2].tolist()
                    kept = trace.blocked.keys.perm[0, 0, first:last]
                    number = int(valid[b, kept].sum())
                    level = int(code[b, h, i, j])
                    if level in (2, 4, 8):
                        wanted[b, h] += size * math.ceil(number / level)
    assert wanted.all()
    assert torch.equal(pooled_pairs(trace.blocked, trace.plan), wanted)
