"""Norms and rotary embedding: each implementation against fp64, in every arrangement."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.kernels.norm_rotary import Stream, norm_rotary


def problem(dtype, lengths=(5,), heads=3, depth=16, norm="head", weight=torch.float32, seed=0):
    """Streams as views of a fused projection, of very different sizes by token."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size):
        return torch.randn(*size, generator=generator)

    streams = []
    for length in lengths:
        fused = noise(2, length, 3, heads, depth) * 10 ** noise(2, length, 1, 1, 1)
        width = depth if norm == "head" else heads * depth
        weights = [None, None]
        if norm is not None and weight is not None:
            weights = [noise(width).to(weight) for _ in range(2)]
        streams.append(Stream(*fused.to(dtype).unbind(2), *weights, 1e-6, 1e-3))
    angles = noise(sum(lengths), depth // 2) * 3
    return streams, angles.cos(), angles.sin()


def equations(streams, norm, cos, sin, order=None):
    """The docstring's formulas in fp64, a token and a head at a time."""
    made = []
    for which in ("q", "k", "v"):
        x = torch.cat([getattr(s, which) for s in streams], 1).double()
        batch, length, heads, depth = x.shape
        out = x.clone()
        owner = [s for s in streams for _ in range(s.q.shape[1])]
        for b, t, h in itertools.product(range(batch), range(length), range(heads)):
            if which == "v":
                continue
            y = x[b, t, h]
            if norm is not None:
                of = x[b, t, h] if norm == "head" else x[b, t]
                eps = getattr(owner[t], f"{which}_eps")
                y = y / (of.square().mean() + eps).sqrt()
                weight = getattr(owner[t], f"{which}_weight")
                if weight is not None:
                    y = y * (weight if norm == "head" else weight.view(heads, depth)[h]).double()
            if cos is not None and t < cos.shape[0]:
                turn = torch.complex(cos[t].double(), sin[t].double())
                pairs = torch.view_as_complex(y.view(-1, 2).contiguous()) * turn
                y = torch.view_as_real(pairs).flatten()
            out[b, t, h] = y
        made.append(out if order is None else out[:, order])
    return made


def close(got, exact, dtype):
    """One rounding to the dtype, and a few of fp32 on the way."""
    for one, wanted in zip(got, exact, strict=True):
        bound = torch.finfo(dtype).eps * wanted.abs() + 16 * 2**-23 * wanted.abs().max()
        assert ((one.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", ["head", "token", None])
@pytest.mark.parametrize("turned", ["all", "first", "none"])
def test_against_fp64(backend, dtype, norm, turned):
    """Two streams joined: video and text, of which the first, both or none are turned."""
    streams, cos, sin = problem(dtype, (4, 3), norm=norm)
    rows = {"all": 7, "first": 4, "none": None}[turned]
    cos, sin = (None, None) if rows is None else (cos[:rows], sin[:rows])
    got = norm_rotary(streams, norm=norm, cos=cos, sin=sin, backend=backend)
    assert [x.dtype for x in got] == [dtype] * 3
    close(got, equations(streams, norm, cos, sin), dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("heads", [1, 5, 8, 40, 72])
def test_any_number_of_heads(backend, heads):
    """Fewer than a program takes at once, as many, and several times as many and a rest."""
    streams, cos, sin = problem(torch.float32, (3,), heads, norm="token")
    got = norm_rotary(streams, norm="token", cos=cos, sin=sin, backend=backend)
    assert got[2] is streams[0].v
    close(got, equations(streams, "token", cos, sin), torch.float32)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_order_is_that_of_the_result(backend):
    streams, cos, sin = problem(torch.float32, (7,))
    order = torch.tensor([4, 2, 0, 6, 5, 3, 1], dtype=torch.int32)
    got = norm_rotary(streams, cos=cos, sin=sin, order=order, backend=backend)
    close(got, equations(streams, "head", cos, sin, order), torch.float32)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_dtypes_of_weights_angles_and_results(backend):
    """Angles in fp64 as AnyFlow has them, weights in fp32 beside fp16, results in fp32."""
    streams, cos, sin = problem(torch.float16)
    for wanted in (torch.float16, torch.float32):
        got = norm_rotary(
            streams, cos=cos.double(), sin=sin.double(), dtype=wanted, backend=backend
        )
        assert [x.dtype for x in got] == [wanted, wanted, torch.float16]
        close(got, equations(streams, "head", cos, sin), wanted)
    unweighted, *_ = problem(torch.float16, weight=None)
    got = norm_rotary(unweighted, cos=cos, sin=sin, backend=backend)
    close(got, equations(unweighted, "head", cos, sin), torch.float16)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_views_and_every_second_angle(backend):
    """diffusers gives an angle for every channel; and heads before tokens are a view too."""
    streams, cos, sin = problem(torch.float32)
    doubled = [x.repeat_interleave(2, -1)[:, ::2] for x in (cos, sin)]
    heads_first = [
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (streams[0].q, streams[0].k)
    ]
    one = Stream(*heads_first, streams[0].v, streams[0].q_weight, streams[0].k_weight, 1e-6, 1e-3)
    exact = equations(streams, "head", cos, sin)
    got = norm_rotary([one], cos=doubled[0], sin=doubled[1], backend=backend)
    close(got, exact, torch.float32)
    # channels that do not lie side by side
    apart = [x.mT.contiguous().mT for x in (one.q, one.k)]
    got = norm_rotary(
        [Stream(*apart, one.v, one.q_weight, one.k_weight, 1e-6, 1e-3)],
        cos=cos,
        sin=sin,
        backend=backend,
    )
    close(got, exact, torch.float32)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    heads=st.integers(1, 9),
    depth=st.sampled_from([16, 32, 64]),
    norm=st.sampled_from(["head", "token", None]),
    seed=st.integers(0, 99),
)
def test_any_shape(lengths, heads, depth, norm, seed):
    streams, cos, sin = problem(torch.float32, tuple(lengths), heads, depth, norm, seed=seed)
    rows = sum(lengths[: 1 + seed % len(lengths)])
    got, wanted = (
        norm_rotary(streams, norm=norm, cos=cos[:rows], sin=sin[:rows], backend=backend)
        for backend in ("triton", "reference")
    )
    exact = equations(streams, norm, cos[:rows], sin[:rows])
    close(got, exact, torch.float32)
    close(wanted, exact, torch.float32)


def test_nothing_is_read_or_written_beyond_a_stream():
    """NaN around the projections, and a guard around a result that is a part of something."""
    streams, cos, sin = problem(torch.float32, (5,), heads=3)
    wide = torch.full((2, 9, 5, 16), torch.nan)
    parts = []
    for x in (streams[0].q, streams[0].k, streams[0].v):
        own = wide.clone()
        own[:, 2:7, 1:4] = x
        parts.append(own[:, 2:7, 1:4])
    one = Stream(*parts, streams[0].q_weight, streams[0].k_weight, 1e-6, 1e-3)
    got = norm_rotary([one], cos=cos, sin=sin, backend="triton")
    close(got, equations(streams, "head", cos, sin), torch.float32)


def test_guards_name_what_is_wrong():
    streams, cos, sin = problem(torch.float32, (4, 3))
    one = streams[0]
    with pytest.raises(ValueError, match="streams: expected at least one"):
        norm_rotary([])
    with pytest.raises(ValueError, match="norm: expected 'head', 'token' or None, got 'layer'"):
        norm_rotary([Stream(one.q, one.k, one.v)], norm="layer")
    with pytest.raises(ValueError, match=r"expected weights \[48\] of a norm, got \[16\]"):
        norm_rotary(streams, norm="token")
    with pytest.raises(ValueError, match="for q and k or for none"):
        norm_rotary([Stream(one.q, one.k, one.v, one.q_weight)])
    with pytest.raises(ValueError, match="one shape"):
        norm_rotary([Stream(one.q, one.k[:, :2], one.v)])
    with pytest.raises(ValueError, match="one dtype"):
        norm_rotary([Stream(one.q, one.k.half(), one.v)])
    with pytest.raises(ValueError, match=r"whole streams, which end at \[4, 7\], got 5"):
        norm_rotary(streams, cos=cos[:5], sin=sin[:5])
    with pytest.raises(ValueError, match="cos, sin: expected both"):
        norm_rotary(streams, cos=cos)
    with pytest.raises(ValueError, match=r"expected \[R, 8\] each"):
        norm_rotary(streams, cos=cos[:, :4], sin=sin[:, :4])
    with pytest.raises(ValueError, match="order: expected a single stream"):
        norm_rotary(streams, order=torch.arange(7, dtype=torch.int32))
    with pytest.raises(ValueError, match="order: expected int32"):
        norm_rotary(streams[:1], order=torch.arange(4))
    with pytest.raises(ValueError, match="backend: expected one of"):
        norm_rotary(streams, backend="batched")
    wide = torch.zeros(1, 1, 1025, 16)
    with pytest.raises(ValueError, match="norms at most 16384 channels together"):
        norm_rotary([Stream(wide, wide, wide)], norm="token", backend="triton")
