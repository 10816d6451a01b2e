"""Methods and `attention` as a whole."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import dit_accel
from dit_accel import Context, Geometry, InputError, Method, Schedule, State, presets
from dit_accel.attend import attend_all
from dit_accel.partial import merge

LAYOUTS = ("raster", "gilbert", "tile3d", "cyclic")
RESTS = ("drop", "centroid", "taylor", "moment")


def inputs(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkv"
    )


def dense64(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(q.double() @ k.double().mT * scale, -1) @ v.double()


@pytest.mark.parametrize("taylor", ["global", "rest", None])
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_density_is_dense(layout, rest, taylor):
    q, k, v = inputs(2, 2, 106, 8)
    for route in ("topk", "topp"):
        for layer in range(3):
            method = presets.pisa(
                density=1.0,
                p=1.0,
                route=route,
                layout=layout,
                rest=rest,
                taylor=taylor,
                block_size=8,
            )
            out, report = dit_accel.attention(
                q,
                k,
                v,
                method,
                grid=(3, 5, 7),
                text=slice(105, 106),
                layer=layer,
                return_report=True,
            )
            torch.testing.assert_close(out, dense64(q, k, v), rtol=0, atol=1e-13)
            assert report.density == 1.0
            assert (report.head_density == 1.0).all()


def test_a_partial_merges_with_attention_to_yet_other_keys():
    """As for references that stand beside the sequence."""
    q, k, v = inputs(2, 2, 105, 8)
    more_k, more_v = (torch.randn_like(x[:, :, :7]) for x in (k, v))
    ctx = Context(Geometry((3, 5, 7)))
    method = presets.pisa(density=1.0, block_size=8)
    partial, report = method.partial(q, k, v, ctx)
    merged = merge(partial, attend_all(q, more_k, more_v)).out
    wanted = dense64(q, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2))
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-13)
    assert report.density == 1.0
    sparse = presets.pisa(density=0.2, block_size=8)
    assert torch.equal(sparse.partial(q, k, v, ctx)[0].out, sparse(q, k, v, ctx)[0])
    dense = presets.pisa(density=0.2, dense_steps=1)
    partial, report = dense.partial(q, k, v, ctx)
    torch.testing.assert_close(partial.out, dense64(q, k, v), rtol=0, atol=1e-13)
    assert report.density == 1.0
    with pytest.raises(InputError, match="got 'sdpa', which gives no normaliser"):
        replace(dense, backend="sdpa").partial(q, k, v, ctx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rest", RESTS)
def test_low_precision_errs_at_most_twice_what_naive_maths_does(oracle, rest, dtype):
    """At full density, against the same attention done naively in that dtype."""
    q, k, v = inputs(1, 2, 105, 16, dtype=dtype)
    exact = dense64(q, k, v)
    naive = oracle.naive_low_precision(q, k, v, 16**-0.5)
    # the floor is one rounding of an output of order 1 to the dtype
    bound = 2 * float((naive.double() - exact).abs().max()) + torch.finfo(dtype).eps
    method = presets.pisa(density=1.0, rest=rest, block_size=8)
    out = dit_accel.attention(q, k, v, method, grid=(3, 5, 7))
    assert out.dtype == dtype
    assert float((out.double() - exact).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rest", RESTS)
def test_low_precision_follows_fp64_where_the_plan_is_given(rest, dtype):
    """Sparse: the fp64 run of the same rounded inputs, under a route that no rounding can tip."""
    q, k, v = inputs(1, 1, 128, 16, dtype=dtype)
    # the first 16 channels of blocks of 16 tokens point apart, so that scores are far from ties
    sign = torch.tensor([1, -1, 3, -3, 5, -5, 7, -7]).repeat_interleave(16).view(1, 1, 128, 1)
    k[..., :1] += sign.to(dtype)
    q[..., :1] = 1 + q[..., :1].abs()
    method = presets.pisa(density=0.25, layout="raster", rest=rest, block_size=16, bias=False)
    fine, wanted = dit_accel.attention(
        q.double(), k.double(), v.double(), method, grid=(2, 8, 8), return_report=True
    )
    out, report = dit_accel.attention(q, k, v, method, grid=(2, 8, 8), return_report=True)
    assert report.exact_pairs.equal(wanted.exact_pairs)
    naive = torch.softmax(q @ k.mT * 0.25, -1) @ v
    exact = dense64(q, k, v)
    bound = 2 * float((naive.double() - exact).abs().max()) + torch.finfo(dtype).eps
    assert float((out.double() - fine).abs().max()) <= bound


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["front", "back"])
def test_padded_keys_change_nothing(where, layout, rest):
    """Whatever stands in padding, as key or as value, the other rows are the same to the bit."""
    q, k, v = inputs(2, 2, 80, 8, dtype=torch.float32)
    text = slice(0, 20) if where == "front" else slice(60, 80)
    valid = torch.ones(2, 80, dtype=torch.bool)
    valid[0, text.stop - 13 : text.stop] = False
    valid[1, text.start + 3 : text.stop] = False
    method = presets.pisa(density=0.4, layout=layout, rest=rest, block_size=8)

    def run(k, v):
        return dit_accel.attention(
            q, k, v, method, grid=(3, 4, 5), text=text, key_valid=valid, return_report=True
        )

    plain, report = run(k, v)
    pad = ~valid[:, None, :, None]
    for filling in (0.0, 7.0, 1e30, float("inf")):
        out, again = run(k.masked_fill(pad, filling), v.masked_fill(pad, filling))
        assert torch.equal(out, plain)
        assert again.exact_pairs.equal(report.exact_pairs)
    assert not plain.isnan().any()
    assert report.all_pairs.tolist() == [[80 * 67] * 2, [80 * 63] * 2]


def test_padding_a_sequence_changes_nothing_but_rounding():
    """Text that is not there, and text that is padding, give the same rows."""
    q, k, v = inputs(1, 2, 70, 8)
    valid = torch.ones(1, 70, dtype=torch.bool)
    valid[:, 64:] = False
    method = presets.pisa(density=0.4, block_size=8, rest="moment")
    padded, report = dit_accel.attention(
        q, k, v, method, grid=(4, 4, 4), text=slice(64, 70), key_valid=valid, return_report=True
    )
    cut = [x[:, :, :64] for x in (q, k, v)]
    plain, alone = dit_accel.attention(*cut, method, grid=(4, 4, 4), return_report=True)
    torch.testing.assert_close(padded[:, :, :64], plain, rtol=0, atol=1e-13)
    assert int(report.exact_pairs.sum() - alone.exact_pairs.sum()) == 2 * 6 * 64


@pytest.mark.parametrize("name", ["dense", "pisa"])
def test_a_batch_element_without_any_key_is_zero(name):
    q, k, v = inputs(2, 1, 24, 4)
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1] = False
    out = dit_accel.attention(q, k, v, name, grid=(2, 3, 4), key_valid=valid)
    torch.testing.assert_close(out[0], dense64(q, k, v)[0], rtol=0, atol=1e-13)
    assert (out[1] == 0).all()


@pytest.mark.parametrize("text", [slice(0, 9), slice(60, 69)], ids=["front", "back"])
def test_text_queries_are_dense_and_text_keys_are_never_left_out(text):
    q, k, v = inputs(1, 2, 69, 8)
    method = presets.pisa(density=0.1, rest="drop", block_size=8, layout="raster")
    out, report = dit_accel.attention(
        q, k, v, method, grid=(3, 4, 5), text=text, return_report=True
    )
    torch.testing.assert_close(out[:, :, text], dense64(q, k, v)[:, :, text], rtol=0, atol=1e-13)
    # one text key that overrules every other must be seen by each query
    k = k.clone()
    k[:, :, text.start + 4] = 40 * q.mean((0, 1, 2)) / q.mean((0, 1, 2)).norm()
    q = q + 100 * k[:, :, text.start + 4 : text.start + 5] / 40
    out = dit_accel.attention(q, k, v, method, grid=(3, 4, 5), text=text)
    torch.testing.assert_close(
        out, v[:, :, text.start + 4 : text.start + 5].expand_as(out), rtol=0, atol=1e-6
    )
    per_row = 9 * 69 + 60 * 9 + 60 * 8 - 4 * 4  # k = 1 block of 8, or the last one of 4
    assert abs(int(report.exact_pairs[0, 0]) - per_row) <= 60 * 4


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 2), (1, 1, 67), (7, 1, 9), (3, 5, 7)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_length(layout, grid):
    length = grid[0] * grid[1] * grid[2]
    q, k, v = inputs(1, 2, length, 4, dtype=torch.float32)
    for layer in range(3):
        method = presets.pisa(layout=layout, density=0.2, rest="moment")
        out = dit_accel.attention(q, k, v, method, grid=grid, layer=layer)
        assert out.isfinite().all()
        if length <= 2:
            torch.testing.assert_close(out.double(), dense64(q, k, v), rtol=0, atol=1e-6)


def test_batch_elements_and_heads_are_independent():
    q, k, v = inputs(3, 4, 60, 8)
    method = presets.pisa(density=0.3, block_size=8, rest="moment")
    whole, report = dit_accel.attention(q, k, v, method, grid=(3, 4, 5), return_report=True)
    for b, h in ((0, 0), (1, 3), (2, 2)):
        one = [x[b : b + 1, h : h + 1] for x in (q, k, v)]
        out = dit_accel.attention(*one, method, grid=(3, 4, 5))
        torch.testing.assert_close(out[0, 0], whole[b, h], rtol=0, atol=1e-13)
    assert report.exact_pairs.shape == (3, 4)


def test_strides_do_not_matter():
    """Models hand over [B, L, H, D], transposed."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2, 3, 60, 8))
    assert not q.is_contiguous()
    method = presets.pisa(density=0.3, block_size=8)
    out = dit_accel.attention(q, k, v, method, grid=(3, 4, 5))
    assert torch.equal(
        out, dit_accel.attention(*(x.contiguous() for x in (q, k, v)), method, grid=(3, 4, 5))
    )


def test_the_order_of_the_layout_is_undone():
    """At full density, tokens moved about in the grid's order give outputs moved likewise."""
    q, k, v = inputs(1, 1, 60, 8)
    shuffle = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    method = presets.pisa(density=1.0, block_size=8)
    out = dit_accel.attention(q, k, v, method, grid=(3, 4, 5))
    moved = dit_accel.attention(
        q[:, :, shuffle], k[:, :, shuffle], v[:, :, shuffle], method, grid=(3, 4, 5)
    )
    torch.testing.assert_close(moved, out[:, :, shuffle], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["dense", "pisa"])
def test_scale(name):
    q, k, v = inputs(1, 2, 60, 8)
    options = {} if name == "dense" else {"density": 1.0}
    out = dit_accel.attention(q, k, v, presets.build(name, **options), grid=(3, 4, 5), scale=0.9)
    torch.testing.assert_close(out, dense64(q, k, v, 0.9), rtol=0, atol=1e-13)


def test_scaling_queries_is_scaling_the_scale():
    q, k, v = inputs(1, 2, 60, 8)
    method = presets.pisa(density=0.3, block_size=8, rest="moment")
    a = dit_accel.attention(q, k, v, method, grid=(3, 4, 5), scale=0.5)
    b = dit_accel.attention(q * 2, k, v, method, grid=(3, 4, 5), scale=0.25)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_deterministic_and_independent_of_threads():
    q, k, v = inputs(1, 3, 512, 16, dtype=torch.float32)
    method = presets.pisa(density=0.2, rest="moment", taylor="rest")
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(dit_accel.attention(q, k, v, method, grid=(8, 8, 8)))
            assert torch.get_num_threads() == threads
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[2], runs[4])
        for other in runs[2:]:
            torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_inputs_are_not_changed_and_inference_mode_is_fine():
    q, k, v = inputs(1, 2, 60, 8)
    kept = [x.clone() for x in (q, k, v)]
    with torch.inference_mode():
        inside = dit_accel.attention(q, k, v, "pisa", grid=(3, 4, 5))
    outside = dit_accel.attention(q, k, v, "pisa", grid=(3, 4, 5))
    assert torch.equal(inside, outside)
    assert all(torch.equal(a, b) for a, b in zip(kept, (q, k, v), strict=True))


def test_gradients_are_refused_rather_than_lost():
    q, k, v = inputs(1, 2, 60, 8)
    q.requires_grad_()
    with pytest.raises(InputError, match=r"expected no gradients .* torch.no_grad"):
        dit_accel.attention(q, k, v, "pisa", grid=(3, 4, 5))
    with torch.no_grad():
        dit_accel.attention(q, k, v, "pisa", grid=(3, 4, 5))
    dit_accel.attention(q, k, v, "dense", grid=(3, 4, 5)).sum().backward()
    assert q.grad is not None


# --- schedules ------------------------------------------------------------------------------------


def where(step=0, layer=0, num_steps=None, num_layers=None):
    return Context(Geometry((1, 1, 1)), step, num_steps, layer, num_layers)


@pytest.mark.parametrize(
    ("steps", "num_steps", "dense"),
    [(0, None, 0), (3, None, 3), (0.0, None, 0), (0.2, 50, 10), (0.25, 50, 13), (0.01, 20, 0)],
)
def test_dense_steps_are_the_first_ones(steps, num_steps, dense):
    schedule = Schedule(steps)
    got = [schedule.is_dense(where(step, num_steps=num_steps)) for step in range(20)]
    assert got == [step < dense for step in range(20)]


def test_dense_layers_count_from_both_ends():
    schedule = Schedule(dense_layers=(0, 2, -1))
    got = [schedule.is_dense(where(layer=layer, num_layers=6)) for layer in range(6)]
    assert got == [True, False, True, False, False, True]


def test_a_schedule_that_cannot_be_told_says_so():
    with pytest.raises(InputError, match=r"a fraction \(0.2\) needs num_steps"):
        Schedule(0.2).is_dense(where(step=3))
    with pytest.raises(InputError, match=r"counts from the last layer, which needs num_layers"):
        Schedule(dense_layers=(-1,)).is_dense(where())
    for bad in (-1, 1.0, 1.5, True, "all", float("nan")):
        with pytest.raises(InputError, match="dense_steps: expected a count"):
            Schedule(bad)
    for bad in ((0.5,), "01", (True,), 3):
        with pytest.raises(InputError, match="dense_layers: expected a tuple"):
            Schedule(dense_layers=bad)


def test_dense_where_the_schedule_says_so():
    q, k, v = inputs(1, 2, 64, 8, dtype=torch.float32)
    method = presets.pisa(density=0.2, block_size=8, dense_steps=0.5, dense_layers=(1,))
    for step, layer in ((0, 0), (1, 0), (2, 0), (3, 1), (2, 1)):
        out, report = dit_accel.attention(
            q, k, v, method, grid=(4, 4, 4), step=step, layer=layer, num_steps=4, return_report=True
        )
        dense = step < 2 or layer == 1
        assert (report.density == 1.0) == dense
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v)) == dense


def test_a_method_is_whole_or_dense():
    method = presets.pisa()
    with pytest.raises(InputError, match="expected a layout, a route and a rest, or none"):
        Method(method.layout, None, method.rest)
    assert presets.dense().is_dense(where())
    assert not method.is_dense(where())


# --- bad input ------------------------------------------------------------------------------------

GOOD = inputs(2, 3, 60, 8, dtype=torch.float32)
NAN = GOOD[0].clone()
NAN[1, 2, 3, 4] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": GOOD[0][0]}, r"q: expected \[B, H, L, D\], got shape \[3, 60, 8\]"),
        ({"k": GOOD[1][:, :2]}, r"q, k, v: expected one shape, got \[2, 3, 60, 8\], \[2, 2,"),
        ({"v": GOOD[2].double()}, "q, k, v: expected one dtype, got torch.float32, torch.float32"),
        ({"k": GOOD[1].to("meta")}, "q, k, v: expected one device, got cpu, meta, cpu"),
        ({n: x.int() for n, x in zip("qkv", GOOD, strict=True)}, "q: expected a floating dtype"),
        ({"q": [1.0]}, "q: expected a tensor, got list"),
        ({n: x[:, :, :0] for n, x in zip("qkv", GOOD, strict=True)}, "expected no empty dimension"),
        ({"q": NAN}, "q: expected numbers, got NaN"),
        ({"v": NAN}, "v: expected numbers, got NaN"),
        ({"grid": (3, 4, 6)}, "grid: expected 60 tokens as in q, got 3x4x6 = 72"),
        ({"grid": (3, 4, 5), "text": slice(0, 4)}, r"got 3x4x5 \+ text 4 = 64"),
        ({"grid": (60,)}, "grid: expected three sizes"),
        ({"grid": (3, 4, 5.0)}, "grid: expected three positive integers"),
        ({"grid": (3, -4, -5)}, "grid: expected three positive integers"),
        ({"grid": (3, 4, 4), "text": slice(60, 72)}, "text: expected a slice within 60 tokens"),
        ({"grid": (3, 4, 4), "text": slice(None, 12)}, "text: expected slice"),
        ({"grid": (3, 4, 4), "text": 12}, "text: expected a slice or None, got int"),
        ({"key_valid": torch.ones(2, 59, dtype=torch.bool)}, r"key_valid: expected \[B, L\]"),
        ({"key_valid": torch.ones(2, 60)}, "key_valid: expected a bool tensor, got torch.float32"),
        ({"key_valid": [True] * 60}, "key_valid: expected a bool tensor, got list"),
        ({"method": "piza"}, r"method: expected one of .*pisa.*, got 'piza' \(did you mean 'pisa'"),
        ({"method": None}, "method: expected a Method or a preset's name, got NoneType"),
        ({"step": -1}, "step: expected an integer, 0 or more, got -1"),
        ({"layer": 1.5}, "layer: expected an integer, 0 or more, got 1.5"),
    ],
)
@pytest.mark.parametrize("method", ["dense", "pisa"])
def test_bad_input_is_told_in_one_line(method, change, message):
    arguments = dict(zip("qkv", GOOD, strict=True)) | {"method": method, "grid": (3, 4, 5)} | change
    with pytest.raises(InputError, match=message) as caught:
        dit_accel.attention(**arguments)
    assert "\n" not in str(caught.value)


def test_large_numbers_are_not_taken_for_nan():
    q, k, v = GOOD
    q = q.clone()
    q[0, 0, :2, 0], q[0, 0, 2:4, 0] = 3e38, -3e38  # sums that overflow, and may even cancel
    k = torch.zeros_like(k)
    out = dit_accel.attention(q, k, v, "dense", grid=(3, 4, 5))
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))


def test_state_is_kept_by_layer_and_branch():
    state = State()
    a = Context(Geometry((1, 1, 1)), layer=1, branch="cond", state=state)
    b = Context(Geometry((1, 1, 1)), layer=1, branch="uncond", state=state)
    a.memory["x"] = 1
    assert "x" not in b.memory
    assert Context(Geometry((1, 1, 1)), layer=1, branch="cond", state=state).memory["x"] == 1
    assert len(state) == 1
    state.clear()
    assert len(state) == 0
    assert a.memory == {}
