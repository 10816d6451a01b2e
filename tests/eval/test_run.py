"""Runs of a small random model, and one of the embedded model, from end to end."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_accel import InputError
from dit_accel.cli import main
from dit_accel.eval import export, instrument, looks
from dit_accel.eval.measure import Bench, load_for
from dit_accel.eval.run import Group, Rank, outcome_of, rank_of_environment, run, share, work
from dit_accel.eval.samples import PARTS, Key, Variant
from dit_accel.eval.store import Store
from dit_accel.eval.summary import summarise
from dit_accel.eval.variants import entries_of, settings_of, variants_of
from dit_accel.pipelines import accelerate, load
from dit_accel.pipelines.generate import Request

SHORT = Request("", None, 64, 48, 5, 2, 2.0)
PROMPTS = "a red circle moves right over a blue background\n# not one\n\na green star\n"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return str(path)


@pytest.fixture(scope="module")
def pipe(small_model):
    made = load(small_model, device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def settings(small_model, prompts, pipe):
    entries = entries_of(["pisa", {"method": "flashblock", "block_size": 4, "refresh": 2}])
    shared = {"pisa": {"block_size": 4}}
    return settings_of(
        pipe,
        model=small_model,
        variants=variants_of(entries, (0.25,), shared, small_model, "_native_math"),
        prompts=prompts,
        limit=None,
        seeds=(7,),
        request=SHORT,
        fps=None,
        latents=True,
        warmup=1,
    )


@pytest.fixture(scope="module")
def store(pipe, settings, tmp_path_factory):
    """A whole run, which tests do not change."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    outcome = run(pipe, settings, out, command=("dit-accel", "eval", "run"))
    assert outcome.complete, outcome.failures
    return Store(out)


def frames_of(store, key):
    return store.frames(key), store.latents(key)


def equal(one, other, key):
    (a, b), (c, d) = frames_of(one, key), frames_of(other, key)
    return torch.equal(a, c) and all(torch.equal(b[name], d[name]) for name in b)


def test_a_sample_says_what_was_measured(store):
    sample = store.sample(Key("pisa-0.25", 1, 8))
    assert sample.text == "a green star"
    assert sample.shape == (5, 3, 64, 48)
    assert len(sample.seconds.steps) == 2
    assert sum(sample.seconds.steps) + sample.seconds.decode <= sample.seconds.total
    assert sorted(sample.density.by_layer) == [0, 1, 2]
    # 36 tokens are 9 blocks, of which a quarter is 2
    assert sample.density.total == pytest.approx(2 / 9)
    assert sorted(sample.attention_seconds) == [0, 1, 2]
    assert set(sample.breakdown) <= set(PARTS)
    assert min(sample.breakdown[part] for part in ("layout", "route", "attend", "linear")) > 0
    assert sum(sample.breakdown.values()) <= sample.seconds.denoise
    assert sample.options["block_size"] == 4
    kept = store.latents(sample.key)
    assert torch.equal(kept["steps"][-1], kept["final"].half())
    assert kept["steps"].shape == (2, *kept["final"].shape)


def test_dense_spends_its_attention_in_torch(store):
    sample = store.sample(Key("dense", 0, 7))
    assert sample.density.total == 1
    assert sample.breakdown["attend"] > 0
    assert "route" not in sample.breakdown
    assert sum(sample.attention_seconds.values()) >= sample.breakdown["attend"]


def test_operations_are_counted(store):
    # 2 steps, 2 guidance branches, 3 layers, 2 heads of 24, 36 x 36 pairs, 2 products of 2 each
    every = 2 * 2 * 3 * 2 * 24 * 36 * 36 * 4
    dense, sparse = (store.sample(Key(v, 0, 7)).flops for v in ("dense", "pisa-0.25"))
    assert dense.attention == dense.dense_attention == sparse.dense_attention == every
    assert sparse.attention == pytest.approx(every * 2 / 9)
    # at least the projections of self-attention: 4 of 48 x 48 for every token
    assert dense.other > 2 * 2 * 3 * 4 * 2 * 48 * 48 * 36
    assert dense.other == sparse.other


def test_operations_are_what_torch_counts(pipe):
    accelerate(pipe, "dense")
    given = {
        "hidden_states": torch.randn(1, 16, 3, 8, 6),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 128),
    }
    whole = FlopCounterMode(display=False, custom_mapping=instrument._CPU)
    with torch.inference_mode():
        with instrument.counting(pipe) as found:
            pipe.transformer(**given)
        with whole:
            pipe.transformer(**given)
    tokens = 3 * 4 * 3
    attention = 3 * 2 * 24 * tokens * tokens * 4
    assert found["transformer"] == whole.get_total_flops() - attention


def test_the_noise_floor_is_dense_by_another_backend(store):
    key, other = Key("dense", 0, 7), Key("dense-math", 0, 7)
    assert store.run().settings.variants[1].backend == "_native_math"
    a, b = store.latents(key)["final"], store.latents(other)["final"]
    assert 0 < float((a - b).norm() / a.norm()) < 1e-4


def test_the_figures_of_a_run(store):
    summary = summarise(store)
    dense, floor, pisa = (summary.variant(v) for v in ("dense", "dense-math", "pisa-0.25"))
    assert summary.complete
    assert floor.figures["psnr"].value > pisa.figures["psnr"].value
    assert floor.figures["latent_error"].value < pisa.figures["latent_error"].value
    assert pisa.figures["psnr"].low is None, "of two prompts no interval is given"
    assert pisa.figures["psnr"].count == 2
    assert len(pisa.by_frame["psnr"]) == len(pisa.by_frame["ssim"]) == 5
    worst = pisa.figures["psnr_worst_frame"].value
    assert worst <= min(pisa.by_frame["psnr"])
    assert dense.absent["psnr"] == "it is the reference itself"
    assert dense.figures["speedup"].value == 1
    for name in ("lpips", "fid", "subject_consistency", "spatial_relation"):
        assert name not in pisa.figures
        assert pisa.absent[name]
    assert not set(pisa.figures) & set(pisa.absent)
    assert set(pisa.figures) | set(pisa.absent) == set(summary.measures)
    # the checker knows one prompt, and not the other
    assert pisa.figures["colour"].count == 1
    export.write(store, summary)
    assert export.read(store.root) == summary
    rows = export.as_csv(summary).splitlines()
    assert len(rows) == 1 + len(summary.variants) * len(summary.measures)
    assert "pisa-0.25,fid,,,,0,,no " not in rows[0]
    path = store.root / "vbench" / "pisa-0.25_eval_results.json"
    mean, each = json.loads(path.read_text())["temporal_flickering"]
    assert mean == pytest.approx(sum(row["video_results"] for row in each) / 2)
    assert all((store.root / row["video_path"]).is_file() for row in each)


def test_figures_do_not_depend_on_how_many_processes_made_them(store, monkeypatch):
    monkeypatch.setattr(looks, "_WORTH", 1)
    told = []
    # last bits depend on the number of threads, which processes divide between them
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        by_two = summarise(store, progress=lambda done, total: told.append((done, total)), jobs=2)
        assert by_two == summarise(store)
    finally:
        torch.set_num_threads(threads)
    assert told == [(4, 8), (8, 8)]


def test_a_run_is_taken_up_where_it_stopped(store, pipe, settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(store.root, out)
    again, key = Store(out), Key("pisa-0.25", 1, 8)
    shutil.rmtree(again.folder(key))
    others = {k: again.folder(k).stat().st_mtime_ns for k in again.finished()}
    told = []
    outcome = run(pipe, settings, out, progress=lambda done, total: told.append((done, total)))
    assert outcome.complete
    assert told[0] == (7, 8)
    assert told[-1] == (8, 8)
    assert {k: again.folder(k).stat().st_mtime_ns for k in others} == others
    assert equal(again, store, key)


def test_processes_that_share_make_the_same(store, pipe, settings, tmp_path):
    out = Store(tmp_path / "run")
    out.claim(settings)
    halves = [share(settings, Rank(i, 2, i)) for i in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(settings.every_key())
    assert {key.prompt for key in halves[0]} == {0}
    work(out, settings, pipe, Rank(1, 2, 1))
    assert outcome_of(out).missing == tuple(halves[0])
    assert all(equal(out, store, key) for key in halves[1])


def test_what_fails_is_listed_and_the_rest_kept(pipe, settings, tmp_path):
    greedy = Variant("greedy", "flashblock", "method", {"block_size": 4, "budget_gib": 1e-9})
    few = replace(
        settings, variants=(settings.variants[0], greedy), prompts=settings.prompts[:1], warmup=0
    )
    outcome = run(pipe, few, tmp_path / "run")
    assert not outcome.complete
    assert (outcome.finished, outcome.total, outcome.missing) == (1, 2, ())
    assert "expected kept partials within a budget" in outcome.failures[0].error
    summary = summarise(Store(tmp_path / "run"))
    assert summary.variant("greedy").failed == 1
    assert set(summary.variant("greedy").absent) == set(summary.measures)
    assert not summary.complete


def test_a_gpu_that_is_lost_leaves_the_rest_missing(pipe, settings, tmp_path, monkeypatch):
    def lost(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Bench, "make", lost)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    out = Store(tmp_path / "run")
    out.claim(settings)
    work(out, settings, pipe)
    outcome = outcome_of(out)
    every = settings.every_key()
    assert [failure.key for failure in outcome.failures] == [every[0]]
    assert "illegal memory access" in outcome.failures[0].error
    assert set(outcome.missing) == set(every[1:])
    assert not outcome.complete


def test_other_files_of_the_model_are_refused(settings):
    with pytest.raises(InputError, match="the files that the run began with"):
        load_for(replace(settings, fingerprint="0"), "cpu")


def test_ranks_of_a_launcher(monkeypatch):
    assert rank_of_environment() == Rank(0, 1, 0, 1)
    told = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert rank_of_environment() == Rank(3, 8, 1, 4)
    assert rank_of_environment().sharing("cpu") == 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert rank_of_environment().sharing("cuda") == 2

    def refuse():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        Group(Rank()).first(refuse)


# -- the command line ------------------------------------------------------------------------------


SIZES = "--height 64 --width 48 --frames 5 --steps 2 --guidance 2 --warmup 0 --device cpu"


def words(model, prompts, out):
    return [
        *("eval", "run", "--model", model, "--prompts", prompts, "--out", str(out)),
        *("--methods", "pisa", "--density", "0.25", "--set", "pisa.block_size=4"),
        *SIZES.split(" "),
    ]


def children(parent):
    """Processes that a process started, from Linux."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(word) for word in found.split()]


def alive(number):
    """Whether a process runs: one that ended and was not waited for does not."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_goes_on(small_model, prompts, tmp_path, monkeypatch, capsys):
    """Two processes whose parent is killed outright end with it; one takes the run up."""
    out = tmp_path / "run"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start = "from dit_accel.cli import main; main()"
    call = [sys.executable, "-c", start, *words(small_model, prompts, out)]
    first = subprocess.Popen([*call, "--jobs", "2"], stderr=subprocess.DEVNULL)
    store, limit = Store(out), time.monotonic() + 300
    while not store.finished() and first.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    workers = children(first.pid)
    assert len(workers) >= 2
    first.send_signal(signal.SIGKILL)
    first.wait()
    limit = time.monotonic() + 60
    while any(alive(worker) for worker in workers) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not any(alive(worker) for worker in workers)
    there = store.finished()
    assert 0 < len(there) < 6, "what its processes had begun was given up"
    before = {key: store.folder(key).stat().st_mtime_ns for key in there}
    monkeypatch.setattr(sys, "argv", ["dit-accel", *call[3:]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "6 of 6 samples" in capsys.readouterr().out
    assert {key: store.folder(key).stat().st_mtime_ns for key in there} == before
    assert not list(out.glob("samples/.parts/*"))


def test_processes_of_a_launcher(small_model, prompts, tmp_path, monkeypatch):
    """`accelerate launch` starts its processes as torchrun does; both of them do their share."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, free = tmp_path / "run", socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    start = tmp_path / "start.py"
    start.write_text("from dit_accel.cli import main; main()")
    call = [
        *accelerate, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(port),
        str(start), *words(small_model, prompts, out),
    ]  # fmt: skip
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 of 6 samples") == 1, "the first process tells"
    made = Store(out)
    assert {sample.sharing for sample in made.samples()} == {2}
    again = run(load(small_model, device="cpu"), made.run().settings, tmp_path / "one")
    assert again.complete
    assert all(equal(made, Store(tmp_path / "one"), key) for key in made.finished())


def test_the_embedded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("dit_accel.cli.common.out._width", 200)
    monkeypatch.setattr("dit_accel.cli.common.out._height", 50)
    call = (
        "eval run --methods pisa --density 0.15 --limit 1 --steps 2 --frames 9 --height 64 "
        f"--width 64 --warmup 0 --seeds 0,1 --device cpu --out {tmp_path / 'run'}"
    ).split()
    monkeypatch.setattr(sys, "argv", ["dit-accel", *call])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().out
    assert ended.value.code == 0
    for word in ("pisa-0.15", "dense-math", "KID", "not there: lpips", "6 of 6 samples"):
        assert word in told
    run_ = Store(tmp_path / "run").run()
    assert run_.settings.variants[2].options["block_size"] == 16, "as the model suggests"
    assert run_.settings.fps == 8
    assert run_.command[1:3] == ("eval", "run")
    summary = export.read(tmp_path / "run")
    assert {"fid", "kid", "fid_dense", "all_three"} <= set(summary.variant("pisa-0.15").figures)
