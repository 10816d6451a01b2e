"""``layout="raster"`` makes every method deterministic arithmetic on slices of the sequence."""

import pytest
import torch

import dit_accel
from dit_accel import Context, Geometry, State, presets

GRID = (3, 5, 7)
RASTER = {
    "custom": {"block_size": 8},
    "pisa": {"block_size": 8, "block_q": 8},
    "svg_ear": {"block_size": 8},
    "psa": {"block_q": 8, "block_k": 8},
    "vmoba": {"block_size": 8},
    "flashblock": {"block_size": 8, "block_q": 8},
}


def test_every_method_is_here():
    """All that have the option, or hand it to an inner method."""
    rows = [row.name for row in presets.catalogue() if "layout" in row.accepts({})]
    assert rows == sorted(RASTER)


@pytest.mark.parametrize("name", RASTER)
def test_blocks_are_slices(name):
    q = torch.zeros(1, 1, 105 + 9, 4)
    method = presets.build(name, layout="raster", **RASTER[name])
    for layer in range(3):
        where = Context(Geometry(GRID, slice(0, 9)), layer=layer, state=State())
        blocked = method.layout(q, q, q, where)
        for blocks in (blocked.queries, blocked.keys):
            order = blocks.perm.flatten().tolist()
            assert order == [*range(9, 114), *range(9)], "the model's order, text last"
            assert blocks.offsets.flatten().tolist() == [*range(0, 105, 8), 105, 113, 114]


@pytest.mark.parametrize("name", RASTER)
def test_the_same_bits_whatever_came_before(name):
    """No seed, no clusters, no layer, branch or memory: only q, k, v and options count."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 105, 6, generator=generator)
    method = presets.build(name, layout="raster", **RASTER[name])

    def run(seed=0, **where):
        torch.manual_seed(seed)
        return dit_accel.attention(q, k, v, method, grid=GRID, **{"state": State(), **where})

    first = run()
    used = State()
    other = torch.randn(3, 2, 2, 105, 6, generator=generator)
    dit_accel.attention(*other, method, grid=GRID, state=used, branch="uncond")
    dit_accel.attention(*other, method, grid=GRID, state=used, layer=1)
    assert torch.equal(run(seed=1, state=used, branch="cond"), first)
    assert torch.equal(run(seed=2, layer=5, step=7), first)
    if name != "flashblock":  # which is there to remember
        assert torch.equal(run(state=used, branch="uncond"), first)
