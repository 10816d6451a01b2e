"""In what order block attention on Hopper takes its tiles: its own code, on numbers of torch's."""

from types import SimpleNamespace

import pytest
import torch

tile = pytest.importorskip("dit_accel.kernels.block_attention.tile")


@pytest.fixture
def find(monkeypatch):
    """``find(pairs, rows, long)``: which head and tile of it each number is."""
    asked = []
    language = SimpleNamespace(
        where=torch.where,
        maximum=lambda a, b: torch.maximum(a, torch.as_tensor(b)),
        load=lambda address: asked.append(int(address)) or torch.tensor(64),
        int64=torch.int64,
        constexpr=int,
    )
    monkeypatch.setattr(tile, "gl", language)
    monkeypatch.setattr(tile, "_Tile", lambda *values: values)

    def run(pairs, rows, long):
        number = torch.tensor
        none = dict.fromkeys(("counts", "listed", "num_tiles", "q_block"), number(10**9))
        p = SimpleNamespace(
            pairs=number(pairs), num_rows=number(rows), long_tiles=number(long), **none
        )
        p.heads, p.rows, p.tile_b, p.tile_h = number(pairs), number(rows), number(0), number(0)
        p.q_span, p.k_bufs = number(0), SimpleNamespace(shape=(2, 128, 64))
        made = []
        for i in range(pairs * rows):
            asked.clear()
            _, head, *_ = tile.find.fn(p, None, number(i), 64, False)
            made.append((int(head), asked[0]))
        return made

    return run


@pytest.mark.parametrize(
    ("pairs", "rows", "long"), [(1, 1, 0), (1, 1, 1), (3, 7, 2), (4, 5, 5), (2, 9, 0)]
)
def test_every_tile_once_and_text_of_all_heads_first(find, pairs, rows, long):
    order = find(pairs, rows, long)
    assert sorted(order) == [(head, at) for head in range(pairs) for at in range(rows)]
    assert all(at >= rows - long for _, at in order[: pairs * long])
    # a head's keys are read by neighbours
    for part in (order[: pairs * long], order[pairs * long :]):
        assert [head for head, _ in part] == sorted(head for head, _ in part)
