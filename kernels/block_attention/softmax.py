"""The online softmax of block attention on Hopper, in Gluon: a turn's logits, and its level."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dit_accel.kernels.packed import LENGTH_BITS

_COUNT = gl.constexpr(LENGTH_BITS)
_MASK = gl.constexpr((1 << LENGTH_BITS) - 1)


@gluon.jit
def _log2(x):
    """To an error of 1e-6: what the exponential makes of a weight anyway."""
    return gl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _hide(s, entries, turn, columns, BOX: gl.constexpr):
    """Logits in powers of two: mask what the tiles of a turn do not hold, and weigh the pooled."""
    boxes: gl.constexpr = s.shape[1] // BOX
    entry = gl.load(entries + turn * boxes + columns // BOX)
    known = (columns % BOX) < (entry & _MASK)
    pooled = ((entry >> _COUNT) & 7) + 1
    bias = gl.where(known, _log2(pooled.to(gl.float32)), float("-inf"))
    return s + gl.expand_dims(bias, 0)


@gluon.jit
def _level_of(p, turn):
    """How often a turn's keys were halved: its level in powers of two."""
    level = (turn >= p.turn_1).to(gl.int32) + (turn >= p.turn_2).to(gl.int32)
    return level + (turn >= p.turn_3).to(gl.int32)


@gluon.jit
def _is_plain(p, turn):
    """Whether all of a turn's boxes are of full length, and all their means of as many keys."""
    plain = turn < p.plain_0
    plain = plain | ((turn >= p.turn_1) & (turn < p.plain_1))
    plain = plain | ((turn >= p.turn_2) & (turn < p.plain_2))
    return plain | ((turn >= p.turn_3) & (turn < p.plain_3))


@gluon.jit
def _hide_level(s, p, turn, columns, BOX: gl.constexpr):
    """As `_hide`, where every level has boxes of its own."""
    width: gl.constexpr = s.shape[1]
    box_1: gl.constexpr = BOX // 2 if BOX >= 16 else 8
    box_2: gl.constexpr = BOX // 4 if BOX >= 32 else 8
    box_3: gl.constexpr = BOX // 8 if BOX >= 64 else 8
    at = gl.minimum(turn, p.turn_1) * (width // BOX)
    at += gl.maximum(gl.minimum(turn, p.turn_2) - p.turn_1, 0) * (width // box_1)
    at += gl.maximum(gl.minimum(turn, p.turn_3) - p.turn_2, 0) * (width // box_2)
    at += gl.maximum(turn - p.turn_3, 0) * (width // box_3)
    box = gl.where(turn < p.turn_1, BOX, gl.where(turn < p.turn_2, box_1, box_2))
    box = gl.where(turn < p.turn_3, box, box_3)
    entry = gl.load(p.entries + at + columns // box)
    known = (columns % box) < (entry & _MASK)
    pooled = ((entry >> _COUNT) & 7) + 1
    bias = gl.where(known, _log2(pooled.to(gl.float32)), float("-inf"))
    return s + gl.expand_dims(bias, 0)


@gluon.jit
def _soften(s, m, mass):
    """Weights of logits in powers of two; what the accumulator must be multiplied with."""
    peak = gl.maximum(m, gl.max(s, 1))
    safe = gl.where(peak == float("-inf"), 0.0, peak)
    fade = gl.exp2(m - safe)
    weights = gl.exp2(s - gl.expand_dims(safe, 1))
    return weights, peak, mass * fade + gl.sum(weights, 1), fade


@gluon.jit
def _soften_plain(s, m, mass, by):
    """As `_soften`, for logits that still want the scale: it goes into the exponent's product."""
    peak = gl.maximum(m, gl.max(s, 1) * by)
    fade = gl.exp2(m - peak)
    weights = gl.exp2(s * by - gl.expand_dims(peak, 1))
    return weights, peak, mass * fade + gl.sum(weights, 1), fade


@gluon.jit
def _soften_level(s, m, mass, by, level):
    """As `_soften_plain`, for means of as many keys each."""
    more = level.to(gl.float32)
    peak = gl.maximum(m, gl.max(s, 1) * by + more)
    fade = gl.exp2(m - peak)
    weights = gl.exp2(s * by - gl.expand_dims(peak - more, 1))
    return weights, peak, mass * fade + gl.sum(weights, 1), fade
