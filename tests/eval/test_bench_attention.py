"""The benchmark: what it measures, and that it refuses to time what is wrong."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from dit_accel import InputError, presets
from dit_accel.eval import bench_attention
from dit_accel.eval.bench_attention import IncorrectError, grid_of, render, run


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [(1, (1, 1, 1)), (7, (1, 1, 7)), (64, (4, 4, 4)), (16384, (16, 32, 32)), (75600, (40, 42, 45))],
)
def test_grids(tokens, grid):
    assert grid_of(tokens) == grid


def test_a_small_run_measures_everything():
    before = torch.get_num_threads()
    result = run(tokens=512, heads=2, head_dim=16, density=0.25, repeats=2, threads=1)
    assert torch.get_num_threads() == before
    assert result.density == 0.25
    assert len(result.dense_ms) == len(result.sparse_ms) == 2
    assert result.ratio > 0
    assert 0 < result.error < 1
    assert result.options["density"] == "0.25"
    json.dumps(result.to_dict())
    text = StringIO()
    Console(width=120, file=text).print(render(result))
    assert "512 tokens" in text.getvalue()


def test_memory_sees_at_least_the_output():
    result = run(tokens=4096, heads=4, head_dim=64, repeats=1)
    if result.dense_peak_bytes is None:
        pytest.skip("no /proc here")
    output = 4096 * 4 * 64 * 4
    # a page or two of a call may have been there before
    assert 0.9 * output < result.dense_peak_bytes < 4 * output
    assert 0.9 * output < result.sparse_peak_bytes < output + 2**26


def test_what_is_wrong_is_not_timed(monkeypatch):
    real = bench_attention.dit_accel.attention

    def wrong(*args, **kwargs):
        out = real(*args, **kwargs)
        return out if isinstance(out, tuple) else out + 1e-2

    monkeypatch.setattr(bench_attention.dit_accel, "attention", wrong)
    with pytest.raises(IncorrectError, match="at full density expected dense attention"):
        bench_attention.check(presets.pisa(), head_dim=16, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("rest", ["drop", "taylor", "moment"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes_the_check(rest, dtype):
    bench_attention.check(presets.pisa(rest=rest), head_dim=16, dtype=dtype, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens: expected a positive integer, got 0"),
        ({"threads": -1}, "threads: expected a positive integer"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
        ({"method": "piza"}, "expected one of custom, dense, .*pisa"),
        ({"density": 3.0}, "pisa: density: expected"),
        ({"options": {"rest": "x"}}, "pisa: rest: expected"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError, match=message):
        run(**options)
