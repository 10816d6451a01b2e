"""The worked example of a new method runs as it stands, and holds what the page says of it."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dit_accel
from dit_accel import InputError, presets, registry
from dit_accel.cluster import KMeans
from dit_accel.layout import Cyclic, Raster, Tile3D
from dit_accel.rest import Drop
from dit_accel.scored_route import Scored, centres
from dit_accel.types import Context, Geometry

PAGE = Path(__file__).parents[2] / "docs" / "new_method.md"
GRID, TEXT = (5, 6, 7), slice(0, 8)


@pytest.fixture
def example(monkeypatch):
    """The names of the page's code, with its row in a table that is put back afterwards."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names = {"__name__": "example"}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def inputs(length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 2, length, 6, generator=generator, dtype=dtype)


def test_it_is_one_function_and_one_row(example):
    assert [name for name in example if "radial" in name] == ["radial_score", "radial"]
    assert example["report"].density == 0.25


def test_full_density_is_dense_and_less_is_sparse(example):
    q, k, v = inputs(218)
    valid = torch.rand(2, 218, generator=torch.Generator().manual_seed(1)) < 0.8
    where = {"grid": GRID, "text": TEXT, "key_valid": valid, "return_report": True}
    dense, _ = dit_accel.attention(q, k, v, "dense", **where)
    method = presets.build("radial", density=1.0, block_size=16)
    out, report = dit_accel.attention(q, k, v, method, **where)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)
    assert report.density == 1.0
    method = presets.build("radial", density=0.25, block_size=16)
    out, report = dit_accel.attention(q, k, v, method, **where)
    assert 0.25 < report.density < 0.35, "three of 14 blocks, and text"
    torch.testing.assert_close(out[:, :, TEXT], dense[:, :, TEXT], rtol=0, atol=1e-12)
    assert (out - dense).abs().max() > 1e-3


def test_the_window_narrows_with_the_distance_in_time(example):
    """By hand, on blocks of one cell: how far a query sees in its own frame, and further away."""
    q = torch.zeros(1, 1, 9 * 9, 4)
    ctx = Context(Geometry((9, 1, 9)))
    blocked = Raster(1)(q, q, q, ctx)
    code = Scored(example["radial_score"], 0.4)(blocked, None, ctx).code[0, 0, 0]
    seen = (code.view(9, 9) == 1).sum(-1).tolist()
    assert seen[0] == seen[1] == max(seen)
    assert seen[1:] == sorted(seen[1:], reverse=True)
    assert seen[-1] < seen[1]


@pytest.mark.parametrize("layout", [Tile3D((2, 2, 3)), Cyclic(), KMeans(4, 6), Raster(16)])
def test_any_layout_will_do(example, layout):
    q, k, v = inputs(218)
    where = {"grid": GRID, "text": TEXT, "layer": 2, "return_report": True}
    dense, _ = dit_accel.attention(q, k, v, "dense", **where)
    for density in (0.3, 1.0):
        method = dit_accel.Method(layout, Scored(example["radial_score"], density), Drop())
        out, report = dit_accel.attention(q, k, v, method, **where)
        assert out.isfinite().all()
        assert (report.density == 1.0) == (density == 1.0)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)


def test_centres_are_those_of_the_blocks(oracle):
    q, k, v = inputs(218)
    for layout in (Tile3D((2, 2, 3)), KMeans(4, 6)):
        blocked = layout(q, k, v, Context(Geometry(GRID, TEXT)))
        found = centres(blocked.keys, blocked.geometry)
        for h in range(found.shape[1]):
            blocks = oracle.lists(blocked.keys, 0, h)[: blocked.keys.num_video]
            for j, tokens in enumerate(blocks):
                cells = [divmod(token - 8, 42) for token in tokens]
                cells = torch.tensor([(t, *divmod(rest, 7)) for t, rest in cells]).float()
                torch.testing.assert_close(found[0, h, j], cells.mean(0))


def test_it_is_listed(example):
    from dit_accel.cli.app import app

    listed = CliRunner().invoke(app, ["methods", "radial", "--json"]).output
    assert '"arxiv": "2506.19852"' in listed
    assert "Blocks by their centres" in listed
    assert "radial" in CliRunner().invoke(app, ["methods"]).output
    with pytest.raises(InputError, match="radial: density: expected float > 0, <= 1, got 2"):
        presets.build("radial", density=2.0)


def test_a_score_of_another_shape_is_told():
    q, k, v = inputs(210)
    method = dit_accel.Method(Raster(16), Scored(lambda blocked, ctx: q[:, :, :3, :3]), Drop())
    with pytest.raises(InputError, match=r"score: expected \[B\|1, H\|1, 14, 14\], got \[2, 2, 3"):
        dit_accel.attention(q, k, v, method, grid=GRID)
    with pytest.raises(InputError, match="Scored: density: expected float > 0, <= 1, got 0"):
        Scored(lambda blocked, ctx: q, 0)
