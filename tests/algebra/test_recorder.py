"""Where the time goes."""

import pytest
import torch

import dit_accel
from dit_accel import presets
from dit_accel.recorder import Recorder, Watch, recording, span


@pytest.fixture
def clock(monkeypatch):
    """Time stands still, until told."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def test_spans_are_charged_with_their_own_time(clock):
    recorder = Recorder("cpu")
    with recorder.span("other", layer=1):
        clock(1)
        with recorder.span("linear"):
            clock(2)
        with recorder.span("attend"):
            clock(4)
            with recorder.span("merge"):
                clock(8)
    with recorder.span("other", layer=0):
        clock(16)
    assert recorder.parts() == {"other": 17, "linear": 2, "attend": 4, "merge": 8}
    assert recorder.layers("linear") == {0: 16, 1: 13}


def test_nobody_listens_by_default():
    one, two = span("route"), span("attend")
    assert one is two
    with recording("cpu") as recorder:
        with pytest.raises(RuntimeError, match="one at a time"), recording("cpu"):
            pass
        with span("route"):
            pass
    assert list(recorder.parts()) == ["route"]
    assert span("route") is one


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("dense", {}, {"attend"}),
        ("pisa", {"block_size": 8}, {"layout", "route", "attend"}),
        ("psa", {"block_q": 8, "block_k": 8}, {"layout", "route", "attend"}),
        ("flashblock", {"block_size": 8}, {"layout", "route", "attend"}),
        ("flashblock", {"inner": "vmoba"}, {"layout", "route", "attend", "merge"}),
    ],
)
def test_methods_tell_their_parts(name, options, parts):
    q, k, v = torch.randn(3, 1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    method = presets.build(name, **options)
    given = {"grid": (4, 4, 4), "state": dit_accel.State()}
    expected = dit_accel.attention(q, k, v, method, **given)
    with recording("cpu") as recorder:
        got = dit_accel.attention(q, k, v, method, **{**given, "state": dit_accel.State()})
    assert set(recorder.parts()) == parts
    assert torch.equal(got, expected)


@pytest.mark.gpu
def test_the_clock_of_a_gpu():
    watch = Watch("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    start = watch.now()
    for _ in range(10):
        x = x @ x / 64
    stop = watch.now()
    watch.wait()
    assert 0 < watch.seconds(start, stop) < 60
