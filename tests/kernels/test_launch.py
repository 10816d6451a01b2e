"""Launching by a remembered binary, on a CUDA device; and what a whole call has to launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_accel import presets
from dit_accel.eval.kernel_cases import Shape, inputs
from dit_accel.kernels import launch as launching
from dit_accel.kernels.merge import merge
from dit_accel.kernels.pooled_topk import pooled_topk
from dit_accel.state import State
from dit_accel.types import Context, Geometry

triton = pytest.importorskip("triton")


@pytest.fixture
def usual(monkeypatch):
    """Runs something as Triton launches it."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(launching, "_DIRECT", False)
            return call()

    return run


def topk(query, key, density=0.3):
    count = torch.ones(1, 1, key.shape[2], dtype=torch.int64, device=key.device)
    options = {"rows": query.shape[2], "columns": key.shape[2], "scale": 1.0, "density": density}
    return pooled_topk(query, key, count, None, backend="triton", **options)


@pytest.mark.gpu
def test_other_values_shapes_and_alignments_get_what_is_theirs(usual):
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    known = len(launching._known)
    for turn in range(3):
        for rows, columns in ((7, 33), (16, 64), (7, 33)):
            query, key = noise(1, 2, rows, 64), noise(1, 2, columns, 64)
            for density in (0.1, 0.5):
                wanted = usual(lambda q=query, k=key, d=density: topk(q, k, d))
                assert torch.equal(topk(query, key, density), wanted)
            odd = noise(query.numel() + 1)[1:].view(query.shape)
            assert odd.data_ptr() % 16
            assert torch.equal(topk(odd, key), topk(odd.clone(), key))
        if turn == 0:
            first = len(launching._known)
    assert first > known
    assert len(launching._known) == first, "remembered, and found again"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pisa", "moment", "flashblock"])
def test_a_call_in_a_cuda_graph_computes_anew(name):
    """The same work as when called, on whatever its inputs hold by then."""
    method = {
        "pisa": presets.pisa(density=0.3),
        "moment": presets.pisa(density=0.3, rest="moment"),
        "flashblock": presets.flashblock(inner="pisa", density=0.3),
    }[name]
    shape = Shape((3, 16, 16), 2, 40, 64)
    state = State()
    parts = inputs(shape, torch.bfloat16, "cuda")
    where = Geometry(shape.grid, slice(768, 808))

    def call():
        return method(*parts, Context(where, step=1, num_steps=9, state=state))

    with torch.inference_mode():
        method(*parts, Context(where, step=0, num_steps=9, state=state))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, report = call()
        for x, new in zip(parts, inputs(shape, torch.bfloat16, "cuda", seed=1), strict=True):
            x.copy_(new)
        graph.replay()
        wanted, told = call()
    assert torch.equal(out, wanted)
    assert report.density == told.density


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    one, two = (torch.randn(2, 1, 2, 9, 16, device="cuda:1") for _ in range(2))
    lse = torch.randn(2, 1, 2, 9, device="cuda:1")
    out, _ = merge(one[0], lse[0], two[0], lse[1])
    assert out.device == one.device


_COUNT = Path(__file__).parents[1] / "support" / "host_work.py"


@pytest.mark.parametrize(
    ("method", "kernels", "others"),
    [
        ("pisa", 9, 0),
        ("moment", 9, 0),
        ("flashblock", 3, 0),
        ("svg_ear", 18, 9),
        ("psa", 7, 0),
        ("psa, thresholds", 7, 0),
        ("vmoba", 54, 7),
    ],
)
def test_how_much_a_call_launches(method, kernels, others):
    """On Hopper, in a step after the first: a bound that a launch more has to raise by hand."""
    said = subprocess.run(
        [sys.executable, _COUNT, method],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(said)
    assert found["kernels"]
    assert sum(found["kernels"].values()) <= kernels, found
    assert sum(found["others"].values()) <= others, found


def test_what_takes_the_place_of_triton_s_launch_is_used(monkeypatch):
    """Such as what compiles kernels and does not launch them."""
    ran = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **options: ran.append(args))
    kernel = triton.JITFunction.__new__(triton.JITFunction)
    for _ in range(2):
        launching.launch(kernel, (1,), (torch.ones(2),), (3,), D=16)
    assert len(ran) == 2
