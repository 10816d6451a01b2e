"""What is timed of a first use: on the CPU, where nothing is compiled, and the count of kernels."""

import json
import os
import subprocess
import sys

import pytest

from dit_accel import presets
from dit_accel.eval import bench_first_use
from dit_accel.eval.bench_first_use import METHODS, failure, lines, run


@pytest.mark.parametrize("name", METHODS)
def test_every_layer_in_two_steps(name):
    found = bench_first_use.first_use(name, "small", "cpu", begin=0.0)
    layers = (0, 1, 2) if name == "vmoba" else (0,)
    where = [(one["step"], one["layer"]) for one in found["calls"]]
    assert where == [(step, layer) for step in (0, 1) for layer in layers]
    assert found["first"] == pytest.approx(sum(one["seconds"] for one in found["calls"]))
    assert found["again"] > 0
    assert found["imports"] > 1e9, "since the epoch, as that is what it was told"
    json.dumps(found)


def test_names_are_of_methods_with_their_options():
    assert {preset for preset, _ in METHODS.values()} == {
        "pisa", "svg_ear", "psa", "vmoba", "flashblock",
    }  # fmt: skip
    assert presets.build(METHODS["pisa_moment"][0], **METHODS["pisa_moment"][1]).options["rest"]


def test_two_processes_share_a_cache_that_was_empty():
    told = []
    found = run(["pisa"], shape="small", device="cpu", say=told.append)
    (row,) = found["rows"]
    assert failure(row) is None
    assert {kind: row[kind]["kernels"]["compiled"] for kind in ("cold", "disk")} == {
        "cold": 0, "disk": 0,
    }  # fmt: skip
    assert row["cold"]["imports"] > 0.1
    assert told[0].split()[0] == "pisa"
    assert lines([row])[0].split() == lines([])[0].split()


def test_caches_are_each_methods_own(monkeypatch):
    seen = []

    def process(name, shape, device, cache):
        seen.append((name, cache, os.listdir(cache)))
        with open(os.path.join(cache, name), "w"):
            pass
        numbers = dict.fromkeys(("imports", "start", "first", "again"), float(len(seen)))
        kernels = {"compiled": 2, "seconds": 7.0, "slowest": ("attend_kernel", 5.0)}
        return {**numbers, "kernels": kernels, "calls": []}

    monkeypatch.setattr(bench_first_use, "in_a_process", process)
    found = run(["pisa", "psa"], say=lambda text: None)
    assert [(name, files) for name, _, files in seen] == [
        ("pisa", []), ("pisa", ["pisa"]), ("psa", []), ("psa", ["psa"]),
    ]  # fmt: skip
    assert len({cache for _, cache, _ in seen}) == 2
    assert not any(os.path.exists(cache) for _, cache, _ in seen)
    table = lines(found["rows"])
    assert table[1].split()[:6] == ["pisa", "1.00", "2.00", "1.000", "2", "7.00"]
    assert table[2].split()[:3] == ["psa", "3.00", "4.00"]


def test_a_process_that_fails_is_a_row_that_says_so():
    found = run(["pisa"], shape="no such shape", device="cpu", say=lambda text: None)
    (row,) = found["rows"]
    assert failure(row) == "KeyError: 'no such shape'"
    assert "KeyError" in lines([row])[1]
    assert "disk" not in row


COUNT = """
from dit_accel.eval.bench_first_use import watched
found = watched()
from dit_accel.kernels.merge.triton import SPECIMENS
from dit_accel.kernels.specimen import compile_for
compile_for(SPECIMENS[0], 90)
print(found)
"""


def test_kernels_are_counted_where_they_are_compiled(tmp_path):
    pytest.importorskip("triton")

    def count():
        done = subprocess.run(
            [sys.executable, "-c", COUNT],
            env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert "[('merge_kernel', " in count()
    assert count() == "[]\n", "this time it lay on disk"
