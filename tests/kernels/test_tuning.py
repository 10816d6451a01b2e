"""Settings of kernels: which one is chosen, whose file counts, and what a bad file is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_accel.kernels.tuning import SPACES, Setting, files, lookup, overridden, setting
from dit_accel.kernels.tuning.files import Table
from dit_accel.kernels.tuning.spaces import KINDS

SHIPPED = sorted(Path(files.__file__).parent.glob("*.json"))
LIKE = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)


def entry(tokens, op="merge", head_dim=128, dtype="half", **values):
    chosen = {**SPACES[op].default(dtype).values, **values}
    return {
        "op": op,
        "head_dim": head_dim,
        "dtype": dtype,
        "tokens": tokens,
        "setting": chosen,
        "ms": 1.0,
        "default_ms": 2.0,
    }


def table(*entries, **change):
    head = {"format": 1, "architecture": 90, "device": "a card", "versions": {"torch": "2"}}
    return {**head, "entries": list(entries), **change}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Where the shipped and the user's files of a Hopper device lie: ``write("own", table)``."""
    monkeypatch.setenv(files.VARIABLE, str(tmp_path / "own"))
    monkeypatch.setattr(files, "shipped", lambda sm: tmp_path / "shipped" / f"sm_{sm}.json")
    monkeypatch.setattr(lookup, "architecture_of", lambda device: 90)
    lookup.forget()

    def write(which, content):
        path = tmp_path / which / "sm_90.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        lookup.forget()
        return path

    yield write
    lookup.forget()


def test_without_files_there_are_the_defaults(folders):
    assert setting("merge", LIKE, 5) == SPACES["merge"].half
    assert setting("kmeans.assign", LIKE.float(), 5) == SPACES["kmeans.assign"].single
    assert setting("kmeans.assign", LIKE.float(), 5) != SPACES["kmeans.assign"].half


def test_the_shortest_range_that_holds_the_sequence_counts(folders):
    folders("shipped", table(entry(4096, ROWS=16), entry(1024, ROWS=8), entry(8192, ROWS=64)))
    for tokens, rows in ((1, 8), (1024, 8), (1025, 16), (4097, 64), (10**6, 64)):
        assert setting("merge", LIKE, tokens)["ROWS"] == rows


def test_what_was_measured_for_something_else_does_not_count(folders, monkeypatch):
    folders("shipped", table(entry(4096, ROWS=16)))
    default = SPACES["merge"].half
    assert setting("merge", LIKE[..., :64], 5) == default
    assert setting("merge", LIKE.float(), 5) == default
    assert setting("block_summary.mean", LIKE, 5) == SPACES["block_summary.mean"].half
    monkeypatch.setattr(lookup, "architecture_of", lambda device: 80)
    assert setting("merge", LIKE, 5) == default


def test_the_users_entries_take_the_place_of_the_shipped_ones(folders):
    folders(
        "shipped",
        table(entry(1024, ROWS=8), entry(4096, ROWS=16), entry(64, "error_probe", BM=128)),
    )
    folders("own", table(entry(2048, ROWS=64)))
    assert [setting("merge", LIKE, n)["ROWS"] for n in (5, 1500, 4000)] == [64, 64, 64]
    assert setting("error_probe", LIKE, 64)["BM"] == 128


def test_a_process_keeps_what_it_has_read(folders):
    path = folders("own", table(entry(1024, ROWS=8)))
    assert setting("merge", LIKE, 5)["ROWS"] == 8
    path.write_text(json.dumps(table(entry(1024, ROWS=16))))
    assert setting("merge", LIKE, 6)["ROWS"] == 8
    lookup.forget()
    assert setting("merge", LIKE, 6)["ROWS"] == 16


def test_overrides_nest_and_end():
    one, other = (Setting({"ROWS": n, "num_warps": 4, "num_stages": 3}) for n in (8, 64))
    with overridden("merge", one):
        with overridden("merge", other):
            assert setting("merge", LIKE, 5) == other
        assert setting("merge", LIKE, 5) == one
        assert setting("error_probe", LIKE, 5) == SPACES["error_probe"].half
    assert setting("merge", LIKE, 5) == SPACES["merge"].half


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Invalid JSON"),
        (table(entry(1024), format=2), "format: Input should be 1"),
        (table(entry(1024), architecture=80), "architecture: expected 90, got 80"),
        (table({**entry(1024), "op": "sort"}), "entries.0.op: expected one of merge, "),
        (table({**entry(1024), "extra": 1}), "entries.0.extra: Extra inputs are not permitted"),
        (table(entry(1024, ROWS=24)), "entries.0.setting: ROWS: expected a power of two, got 24"),
        (table(entry(1024, num_warps=64)), "expected 1 to 32 warps and 1 to 8 stages"),
        (table(entry(1024, BM=64)), "setting: expected ROWS, num_warps, num_stages for merge"),
        (table(entry(1024), entry(1024, ROWS=8)), "expected every entry once"),
        (table(entry(1024, ROWS=0)), "entries.0.setting.ROWS: Input should be greater than 0"),
        (table({**entry(1024), "dtype": "int"}), "entries.0.dtype: "),
    ],
)
def test_a_bad_file_is_named_with_the_first_thing_wrong(folders, content, message):
    path = folders("own", content)
    with pytest.raises(ValueError, match=r"sm_90\.json") as raised:
        setting("merge", LIKE, 5)
    assert str(path) in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_go_round_and_are_written_whole(folders, tmp_path, monkeypatch):
    first = Table.model_validate(table(entry(1024, ROWS=8), entry(4096, ROWS=16)))
    path = tmp_path / "made" / "sm_90.json"
    files.write(path, first)
    assert files.read(path, 90) == first
    later = Table.model_validate(table(entry(1024, ROWS=64), entry(1024, "error_probe")))
    both = files.merged(files.read(path, 90), later)
    assert [(one.op, one.tokens, one.setting.get("ROWS")) for one in both.entries] == [
        ("error_probe", 1024, None), ("merge", 1024, 64), ("merge", 4096, 16),
    ]  # fmt: skip

    def broken(table):
        raise OSError("full")

    monkeypatch.setattr(files, "_text", broken)
    with pytest.raises(OSError, match="full"):
        files.write(path, both)
    assert files.read(path, 90) == first
    assert [one.name for one in path.parent.iterdir()] == ["sm_90.json"]


def test_where_the_users_file_lies(monkeypatch):
    monkeypatch.delenv(files.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert files.own(90) == Path("/caches/dit_accel/tuning/sm_90.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.own(80) == Path.home() / ".cache/dit_accel/tuning/sm_80.json"
    monkeypatch.setenv(files.VARIABLE, "/mine")
    assert files.own(80) == Path("/mine/sm_80.json")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_right_and_used(path, monkeypatch, tmp_path):
    architecture = int(path.stem.removeprefix("sm_"))
    found = files.read(path, architecture)
    assert found.entries
    assert {one.ms < one.default_ms for one in found.entries} == {True}
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))  # none of the user's
    monkeypatch.setattr(lookup, "architecture_of", lambda device: architecture)
    lookup.forget()
    kinds = {"half": torch.bfloat16, "float": torch.float32}
    for one in found.entries:
        like = torch.empty(1, 1, 1, one.head_dim, dtype=kinds[one.dtype])
        chosen = setting(one.op, like, one.tokens)
        assert dict(chosen.values) == one.setting
        assert chosen in list(SPACES[one.op].candidates(one.dtype)), "what a search can find"
    lookup.forget()


def test_a_file_is_shipped_for_hopper():
    assert "sm_90.json" in [path.name for path in SHIPPED]


@pytest.mark.parametrize("op", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_have_every_choice_once(op, kind):
    space = SPACES[op]
    found = list(space.candidates(kind))
    assert found[0] == space.default(kind)
    assert len({str(one) for one in found}) == len(found) > 4
    assert all(tuple(one.values) == space.names for one in found)
    assert all(found[0][name] in space.choices[name] for name in space.names)


COMPILE = """
import dataclasses, importlib, sys
from dit_accel.kernels.specimen import compile_for
from dit_accel.kernels.tuning import SPACES

for op, module, prefix in (
    ("merge", "merge", "merge"), ("kmeans.update", "kmeans", "_update"),
    ("error_probe", "error_probe", "probe"),
):
    made = importlib.import_module(f"dit_accel.kernels.{module}.triton").SPECIMENS
    one = next(one for one in made if one.name.startswith(prefix) and "128" in one.name)
    last = list(SPACES[op].candidates("half"))[-1]
    usage = compile_for(
        dataclasses.replace(
            one, constants={**one.constants, **last.constants}, options=last.options
        ),
        90,
    )
    print(op, usage.spilled, usage.shared)
"""


def test_the_largest_candidates_compile_without_a_gpu():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["merge", "kmeans.update", "error_probe"]
    assert all(int(row[2]) <= 227 * 1024 for row in rows), "what a program may have on Hopper"
