"""Layouts on any grid: a permutation, cut into blocks, text last."""

import itertools
import time

import pytest
import torch

from dit_accel import Context, Geometry, InputError
from dit_accel.curve import gilbert_order
from dit_accel.layout import Cyclic, Gilbert, Raster, Tile3D, tile_of

GRIDS = [
    (1, 1, 1),
    (1, 1, 7),
    (1, 13, 1),
    (5, 1, 1),
    (2, 3, 5),
    (7, 11, 13),
    (1, 17, 19),
    (4, 8, 8),
]
LAYOUTS = [
    Raster(8),
    Raster(7, query_block_size=3),
    Gilbert(8),
    Gilbert(5, query_block_size=16),
    Tile3D((2, 3, 2)),
    Tile3D((4, 4, 4)),
    Cyclic(),
    Cyclic(frames=3, window=(2, 5), box=(2, 2, 3)),
]


def name(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else repr(value).replace(" ", "")


def blocked(layout, grid, text=None, layer=0):
    geometry = Geometry(grid, text)
    x = torch.zeros(1, 1, geometry.length, 2)
    return layout(x, x, x, Context(geometry, layer=layer), 1.0)


def coordinates(cells, grid):
    return torch.stack(
        [cells // (grid[1] * grid[2]), cells // grid[2] % grid[1], cells % grid[2]], 1
    )


@pytest.mark.parametrize("text", [None, "front", "middle", "back", "empty"])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_every_token_once_text_last_and_in_order(layout, grid, text):
    video = grid[0] * grid[1] * grid[2]
    start = {None: 0, "front": 0, "middle": video // 2, "back": video, "empty": video}[text]
    span = None if text is None else slice(start, start + (0 if text == "empty" else 9))
    for layer in range(3):
        made = blocked(layout, grid, span, layer)
        for side in (made.queries, made.keys):
            perm, offsets = side.perm[0, 0], side.offsets[0, 0]
            assert perm.dtype == torch.int64
            assert offsets.dtype == torch.int32
            length = made.geometry.length
            # an exact inverse exists: every token stands at exactly one position
            assert torch.equal(perm[perm.argsort()], torch.arange(length))
            assert offsets[0] == 0
            assert offsets[-1] == length
            assert (side.sizes > 0).all()
            boundary = int(offsets[side.num_video])
            assert boundary == video
            words = list(range(length))[span] if span else []
            assert perm[boundary:].tolist() == words


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_further_grids_have_blocks_of_their_own(layout):
    """As if each were alone: in their order, their blocks, and text last."""
    grids = ((2, 3, 5), (1, 4, 4), (1, 1, 3))
    geometry = Geometry(grids[0], slice(0, 9), more=grids[1:])
    assert (geometry.num_video, geometry.length) == (49, 58)
    x = torch.zeros(1, 1, 58, 2)
    for layer in range(3):
        made = layout(x, x, x, Context(geometry, layer=layer), 1.0)
        for side in ("queries", "keys"):
            blocks = getattr(made, side)
            perm, sizes = blocks.perm[0, 0].tolist(), blocks.sizes[0, 0].tolist()
            first = 9
            for grid in grids:
                alone = getattr(blocked(layout, grid, layer=layer), side)
                count = alone.perm.shape[-1]
                assert perm[:count] == (alone.perm[0, 0] + first).tolist()
                assert sizes[: alone.num_blocks] == alone.sizes[0, 0].tolist()
                perm, sizes, first = perm[count:], sizes[alone.num_blocks :], first + count
            assert perm == list(range(9))
            assert len(sizes) == blocks.num_blocks - blocks.num_video


def test_further_grids_are_checked():
    for wrong in ((1, 2), (1, 2, 0), (1, True, 3)):
        with pytest.raises(InputError, match="grid: expected three"):
            Geometry((1, 2, 3), more=(wrong,))


def test_gilbert_walks_from_neighbour_to_neighbour():
    """All steps go to one of the six neighbours on even grids, and to one of the 26 on any grid."""
    for grid in itertools.product((1, 2, 3, 4, 5, 6, 7, 8, 11, 12), repeat=3):
        cells = gilbert_order(grid)
        assert torch.equal(cells.sort().values, torch.arange(cells.numel()))
        if cells.numel() == 1:
            continue
        step = coordinates(cells, grid).diff(dim=0).abs()
        assert step.max() == 1, grid
        diagonal = int((step.sum(1) > 1).sum())
        if all(n % 2 == 0 for n in grid):
            assert diagonal == 0, grid


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52), (33, 45, 80), (1, 64, 64)], ids=name)
def test_gilbert_on_the_models_grids_is_fast_and_hardly_ever_diagonal(grid):
    start = time.process_time()
    cells = gilbert_order(grid)
    assert time.process_time() - start < 2.0
    step = coordinates(cells, grid).diff(dim=0).abs().sum(1)
    assert step.max() <= 2
    assert (step > 1).double().mean() < 0.01


def test_gilbert_blocks_are_compact():
    """A block of 64 tokens spans far less than one of the raster order."""

    def extent(layout):
        made = blocked(layout, (16, 24, 24))
        cells = coordinates(made.keys.perm[0, 0], (16, 24, 24)).double()
        parts = cells.split(made.keys.sizes[0, 0].tolist())
        return sum(part.var(0, unbiased=False).sum() for part in parts) / len(parts)

    assert extent(Gilbert(64)) < extent(Raster(64)) / 5


def test_raster_is_the_models_order():
    made = blocked(Raster(4), (1, 3, 3))
    assert made.keys.perm.flatten().tolist() == list(range(9))
    assert made.keys.offsets.flatten().tolist() == [0, 4, 8, 9]


def test_tiles_by_hand():
    made = blocked(Tile3D((1, 2, 2)), (1, 3, 3))
    assert made.keys.perm.flatten().tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert made.keys.offsets.flatten().tolist() == [0, 4, 6, 8, 9]


def test_text_in_front_shifts_the_video():
    made = blocked(Tile3D((1, 2, 2)), (1, 2, 3), slice(0, 2))
    assert made.keys.perm.flatten().tolist() == [2, 3, 5, 6, 4, 7, 0, 1]
    assert made.keys.num_video == 2


def test_cyclic_takes_time_space_and_boxes_in_turn():
    layout, grid = Cyclic(frames=2, window=(3, 4), box=(4, 6, 4)), (5, 6, 8)
    assert [layout.tile(grid, layer) for layer in range(4)] == [
        (2, 6, 8),
        (5, 3, 4),
        (4, 6, 4),
        (2, 6, 8),
    ]
    assert blocked(layout, grid, layer=0).keys.sizes.flatten().tolist() == [96, 96, 48]
    assert blocked(layout, grid, layer=1).keys.sizes.flatten().tolist() == [60] * 4
    assert blocked(layout, grid, layer=2).keys.sizes.flatten().tolist() == [96, 96, 24, 24]
    first = blocked(layout, grid, layer=0).keys
    assert blocked(layout, grid, layer=3).keys is first


def test_a_grid_is_laid_out_once_and_may_be_used_outside_inference_mode():
    with torch.inference_mode():
        inside = blocked(Gilbert(8), (3, 5, 9))
    outside = blocked(Gilbert(8), (3, 5, 9))
    assert outside.keys.perm is inside.keys.perm
    assert not outside.keys.perm.is_inference()


@pytest.mark.parametrize(
    ("size", "tile"),
    [(1, (1, 1, 1)), (64, (4, 4, 4)), (128, (4, 4, 8)), (32, (2, 4, 4)), (7, (1, 1, 7))],
)
def test_tiles_of_a_size(size, tile):
    assert tile_of(size) == tile


@pytest.mark.parametrize(
    "make",
    [
        lambda: Raster(0),
        lambda: Gilbert(True),
        lambda: Gilbert(8, query_block_size=-1),
        lambda: Tile3D((2, 2)),
        lambda: Tile3D((2, 2, 0)),
        lambda: Cyclic(frames=0),
        lambda: Cyclic(window=(1, 2, 3)),
        lambda: tile_of(0),
    ],
)
def test_bad_sizes_are_named(make):
    with pytest.raises(InputError, match=r"expected .* positive integer.*, got "):
        make()
