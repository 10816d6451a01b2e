"""Whatever the shape: what must hold of every layout, route and rest."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_accel
from dit_accel import presets

SIZES = st.integers(1, 7)


@st.composite
def problems(draw):
    """q, k, v in fp64 and the keywords that say what their tokens are."""
    grid = (draw(SIZES), draw(SIZES), draw(SIZES))
    video = grid[0] * grid[1] * grid[2]
    text = draw(st.integers(0, 9))
    where = None
    if text:
        start = draw(st.sampled_from([0, video]))
        where = slice(start, start + text)
    batch, heads, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (3, batch, heads, video + text, depth)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64)
    valid = None
    if draw(st.booleans()):
        valid = torch.rand(batch, video + text, generator=generator) < draw(
            st.sampled_from([0.0, 0.3, 0.9])
        )
    return (q, k, v), {"grid": grid, "text": where, "key_valid": valid}


METHODS = st.fixed_dictionaries(
    {
        "block_size": st.integers(1, 40),
        "layout": st.sampled_from(["raster", "gilbert", "tile3d", "cyclic"]),
        "rest": st.sampled_from(["drop", "centroid", "taylor", "moment"]),
        "taylor": st.sampled_from(["global", "rest", None]),
        "bias": st.booleans(),
    }
)


def dense(q, k, v, valid):
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v


@settings(max_examples=60, deadline=None)
@given(problems(), METHODS, st.integers(0, 5))
def test_full_density_is_dense(problem, options, layer):
    (q, k, v), where = problem
    method = presets.pisa(density=1.0, **options)
    out, report = dit_accel.attention(q, k, v, method, layer=layer, return_report=True, **where)
    torch.testing.assert_close(out, dense(q, k, v, where["key_valid"]), rtol=0, atol=1e-11)
    assert report.density == 1.0


@settings(max_examples=60, deadline=None)
@given(
    problems(),
    METHODS,
    st.sampled_from(["topk", "topp"]),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_less_than_full_is_sound(problem, options, route, share, layer):
    """No NaN, rows are averages of values, and padding, whatever it holds, changes nothing."""
    (q, k, v), where = problem
    method = presets.pisa(density=share, p=share, route=route, **options)
    out, report = dit_accel.attention(q, k, v, method, layer=layer, return_report=True, **where)
    assert out.isfinite().all()
    assert ((report.head_density >= 0) & (report.head_density <= 1)).all()
    if options["rest"] in ("drop", "centroid"):
        assert out.abs().max() <= v.abs().max() + 1e-9
    valid = where["key_valid"]
    if valid is not None:
        hole = ~valid[:, None, :, None]
        other = (k.masked_fill(hole, 1e6), v.masked_fill(hole, -1e6))
        again = dit_accel.attention(q, *other, method, layer=layer, **where)
        torch.testing.assert_close(again, out, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(problems(), METHODS, st.integers(0, 5))
def test_a_batch_is_its_elements(problem, options, layer):
    (q, k, v), where = problem
    method = presets.pisa(density=0.3, **options)
    out = dit_accel.attention(q, k, v, method, layer=layer, **where)
    for b in range(q.shape[0]):
        valid = where["key_valid"]
        alone = {**where, "key_valid": None if valid is None else valid[b : b + 1]}
        one = [x[b : b + 1] for x in (q, k, v)]
        got = dit_accel.attention(*one, method, layer=layer, **alone)
        torch.testing.assert_close(got[0], out[b], rtol=0, atol=1e-12)
