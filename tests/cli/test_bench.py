"""``dit-accel bench pipeline`` and ``tune-kernels``, as a user meets them."""

import json

import pytest
import torch

QUICK = ["--repeats", "1", "--each", "1", "--splits", "1", "--device", "cpu"]


def test_bench_pipeline(cli, tmp_path):
    code, out, err = cli(
        *("bench", "pipeline", "--models", "tiny", "--methods", "dense,pisa,svg_ear"),
        *("--density", "0.3", "--set", "pisa.block_size=16", "--set", "svg_ear.density=0.5"),
        *("--layers", "1,2", "--whole", "--out", "run.json", *QUICK),
    )
    assert code == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"][:3] == ["dit-accel", "bench", "pipeline"]
    assert record["machine"]["cpus"]
    assert record["versions"]["diffusers"]
    assert record["methods"]["pisa"]["options"]["density"] == 0.3
    assert record["methods"]["svg_ear"]["options"]["density"] == 0.5
    assert {one["options"]["dense_below"] for one in record["methods"].values()} == {0}
    model = record["models"]["tiny"]
    assert list(model["whole"]["methods"]) == ["dense", "pisa", "svg_ear"]
    for word in ("4 (from 1 and 2)", "warm (49 of 50)", "mean of 50", "norms and rotary"):
        assert word in out
    assert "fidelity is not measured" in err
    assert "  pisa: correct" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "wan"], "models: expected some of wan1.3b, wan14b, hunyuan"),
        (["--methods", "piza"], "expected one of custom, dense"),
        (["--methods", "pisa", "--set", "psa.mode=topk"], "--set: expected options of pisa, got"),
        (["--methods", "dense", "--set", "dense.backend=sdpa"], "expected no options of dense"),
        (["--layers", "3"], "layers: expected two numbers with a comma, got '3'"),
        (["--layers", "none"], "expected two numbers of layers, or the whole, got neither"),
        (["--device", "tpu"], "device: expected one that is here, cpu or cuda, got 'tpu'"),
        (["--backend", "fa9"], "backend: expected cudnn | flash | sdpa, got 'fa9'"),
        (["--set", "pisa.dense_layers=0"], "--whole times all of them"),
    ],
)
def test_bad_input_of_bench_pipeline(cli, words, message):
    code, _, err = cli("bench", "pipeline", "--device", "cpu", *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ops", "sort"], "ops: expected some of merge, block_summary.mean"),
        (["--shapes", "wan"], "shapes: expected some of wan14b"),
        (["--dtype", "int8"], "dtype: expected one of fp32"),
    ],
)
def test_bad_input_of_tune_kernels(cli, words, message):
    code, _, err = cli("tune-kernels", *words)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "pisa,dense"], "methods: expected some of pisa, pisa_moment, svg_ear, "),
        (["--shape", "wan"], "shape: expected some of wan14b, wan1.3b"),
    ],
)
def test_bad_input_of_bench_first_use(cli, words, message):
    code, _, err = cli("bench", "first-use", *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1, err


def test_bench_first_use_writes_what_it_found(cli, tmp_path, monkeypatch):
    from dit_accel.eval import bench_first_use

    def process(name, shape, device, cache):
        if name == "psa":
            return {"error": "RuntimeError: out of registers"}
        kernels = {"compiled": 2, "seconds": 7.0, "slowest": ("attend_kernel", 5.0)}
        return {**dict.fromkeys(("imports", "start", "first", "again"), 3.0), "kernels": kernels}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_first_use, "in_a_process", process)
    words = ["bench", "first-use", "--methods", "pisa,psa", "--shape", "flux", "--out", "run.json"]
    code, out, _ = cli(*words)
    assert code == 1, "psa failed"
    assert "RuntimeError: out of registers" in out
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["shape"], record["rows"][0]["cold"]["first"]) == ("flux", 3.0)
    assert record["command"][:3] == ["dit-accel", "bench", "first-use"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_first_use_needs_a_gpu(cli):
    code, _, err = cli("bench", "first-use")
    assert code == 2
    assert err == "error: device: expected a GPU, which kernels are compiled for, got none\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tune_kernels_needs_a_gpu(cli):
    code, _, err = cli("tune-kernels")
    assert code == 2
    assert err == "error: tune-kernels: expected a CUDA device, got none\n"


def test_tune_kernels_writes_what_it_found(cli, tmp_path, monkeypatch):
    """On a device that is made up, with a clock that makes the last candidate the fastest."""
    from dit_accel.eval import bench_kernels, tuning
    from dit_accel.eval.kernel_cases import SHAPES, inputs
    from dit_accel.kernels.tuning import SPACES, files, lookup, setting

    pytest.importorskip("triton")
    parts = inputs(SHAPES["small"], torch.float16, "cpu")
    last = list(SPACES["merge"].candidates("half"))[-1]
    real = tuning.search
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(lookup, "_capability", lambda index: 90)
    monkeypatch.setattr(tuning, "inputs", lambda shape, dtype, device: parts)
    monkeypatch.setattr(
        tuning,
        "search",
        lambda *given, **named: real(*given, **{**named, "compile_together": False}),
    )

    def clock(call, device, budget):
        call()
        return 1.0 if setting("merge", parts[0], 5) == last else 2.0

    monkeypatch.setattr(bench_kernels, "milliseconds", clock)
    words = ["tune-kernels", "--ops", "merge", "--shapes", "small"]
    code, out, err = cli(*words, "--dry-run")
    assert (code, list(tmp_path.glob("*.json"))) == (0, [])
    code, out, err = cli(*words)
    assert code == 0
    assert str(last) in out
    assert "2.000 -> 1.000 ms" in err
    (entry,) = files.read(tmp_path / "sm_90.json", 90).entries
    assert entry.setting == dict(last.values)
    (tmp_path / "sm_90.json").write_text("{")
    code, _, err = cli(*words)
    assert code == 2
    assert "sm_90.json" in err
    lookup.forget()
