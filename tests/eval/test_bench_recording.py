"""What recording costs: pairs of generations, and the pipeline as it was."""

import pytest

from dit_accel import InputError, presets
from dit_accel.eval import bench_recording
from dit_accel.pipelines import load
from dit_accel.pipelines.generate import Request

SHORT = Request("a red circle", None, 64, 48, 5, 2, 1.0)


def test_generations_with_and_without(small_model, capsys):
    pipe = load(small_model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    before = {name: type(one) for name, one in pipe.transformer.attn_processors.items()}
    told = []
    methods = {"dense": presets.dense(), "pisa": presets.pisa(block_size=4)}
    found = bench_recording.run(
        pipe, methods, SHORT, 2, lambda done, total: told.append((done, total))
    )
    assert [one.name for one in found] == ["dense", "pisa"]
    assert told[-1] == (12, 12)
    for one in found:
        assert len(one.plain) == len(one.recorded) == 2
        ratios = sorted(b / a for a, b in zip(one.plain, one.recorded, strict=True))
        assert one.ratio == pytest.approx(sum(ratios) / 2)
    dense, pisa = found
    # 2 forwards; 3 layers, each with its attention and torch's, and the linear layers
    assert dense.spans > 2 * (1 + 3 * 2)
    # layout, route, attend and the count in place of torch's attention
    assert pisa.spans == dense.spans + 2 * 3 * 3
    assert {name: type(one) for name, one in pipe.transformer.attn_processors.items()} == before
    assert bench_recording.table(found).row_count == 2
    with pytest.raises(InputError, match="repeats: expected a positive integer, got 0"):
        bench_recording.run(pipe, methods, SHORT, 0)
