"""The sweep that finds where dense attention is faster; its clock is a CPU's here."""

import json

import torch

from dit_accel import presets
from dit_accel.crossover import Crossover, options_of
from dit_accel.eval import bench_crossover


def row(*times):
    return {"method": "pisa", "share": 0.1, "times": [list(one) for one in times]}


def test_from_the_shortest_length_that_is_faster_with_all_longer_ones():
    found = bench_crossover.crossovers(
        [
            # tokens, method, torch's choice, the best
            row((1, 5, 1, 1), (2, 5, 6, 4), (4, 5, 9, 6)),
            row((1, 5, 9, 9), (2, 5, 4, 4), (4, 5, 6, 6)),
            row((1, 5, 4, 4), (2, 5, 4, 4), (4, 5, 5, 4)),
        ]
    )
    assert [(one["against"], one["tokens"], one["longest"]) for one in found] == [
        ("sdpa", 2, 4),
        ("best", 4, 4),
        ("sdpa", 4, 4),
        ("best", 4, 4),
        ("sdpa", None, 4),
        ("best", None, 4),
    ]


def test_a_sweep_becomes_figures_that_can_be_read(tmp_path):
    rows = bench_crossover.sweep(
        ["psa", "vmoba"],
        [2],
        [(1, 4, 4), (1, 4, 8)],
        head_dim=16,
        device="cpu",
        dtype=torch.float32,
        budget_ms=1.0,
        say=lambda text: None,
    )
    assert [(one["method"], one["layer"]) for one in rows] == [
        ("psa", None),
        *(("vmoba", layer) for layer in range(3)),
    ]
    assert all([tokens for tokens, *_ in one["times"]] == [16, 32] for one in rows)
    about = {"device": "none", "methods": ["psa", "vmoba"]}
    made = {"9.0": {"measured": about, "rows": bench_crossover.crossovers(rows)}}
    path = tmp_path / "figures.json"
    bench_crossover.write(made, path)
    other = {"8.0": {"measured": {}, "rows": [made["9.0"]["rows"][0]]}}
    bench_crossover.write(other, path)
    later = {"device": "another", "methods": ["psa"]}
    again = {"9.0": {"measured": later, "rows": made["9.0"]["rows"][:1]}}
    for _ in range(2):
        bench_crossover.write(again, path)
    known = json.loads(path.read_text())
    assert known["8.0"] == {"measured": [{}], "rows": other["8.0"]["rows"]}
    assert known["9.0"]["measured"] == [about, later]
    assert [one["method"] for one in known["9.0"]["rows"]] == ["vmoba"] * 6 + ["psa"]
    figures = [Crossover(**one) for one in known["9.0"]["rows"]]
    assert figures[-1].options == options_of(presets.psa())
    assert len(list(bench_crossover.lines(known))) == 8
