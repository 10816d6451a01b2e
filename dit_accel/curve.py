"""A space-filling curve for boxes of any size.

The generalised Hilbert curve: a box is entered at one corner and left at the far end of its main
axis ``a``, and is cut recursively into boxes that are entered and left the same way. The power of
two of the classic curve is not needed (Hilbert, Math. Ann. 38, 1891; the generalisation to any
sizes is known as "gilbert", which PSA, arXiv 2512.04025, takes its name from).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

# A box is a corner and three signed edges; an edge is (axis, signed length).
_Edge: TypeAlias = tuple[int, int]
_Box: TypeAlias = tuple[tuple[int, int, int], _Edge, _Edge, _Edge]


def _half(length: int) -> int:
    """Half of a signed length, away from odd values: odd pieces are what breaks adjacency."""
    sign = 1 if length > 0 else -1
    half = abs(length) // 2
    if half % 2 and abs(length) > 2:
        half += 1
    return sign * half


def _move(corner: tuple[int, int, int], *steps: tuple[int, int]) -> tuple[int, int, int]:
    point = list(corner)
    for axis, amount in steps:
        point[axis] += amount
    return (point[0], point[1], point[2])


def _far(edge: _Edge) -> tuple[int, int]:
    """The step from the first to the last cell of an edge."""
    axis, length = edge
    return axis, length - (1 if length > 0 else -1)


def _split_along(corner: tuple[int, int, int], a: _Edge, b: _Edge, c: _Edge) -> list[_Box]:
    """Two boxes, one after the other on the main axis."""
    half = _half(a[1])
    return [
        (corner, (a[0], half), b, c),
        (_move(corner, (a[0], half)), (a[0], a[1] - half), b, c),
    ]


def _split_bridge(corner: tuple[int, int, int], a: _Edge, b: _Edge, c: _Edge) -> list[_Box]:
    """Up ``b``, across along ``a``, down ``b``: the plane's curve, ``c`` carried along."""
    half_a, half_b = _half(a[1]), _half(b[1])
    near_a, rest_a = (a[0], half_a), (a[0], a[1] - half_a)
    near_b, rest_b = (b[0], half_b), (b[0], b[1] - half_b)
    end = _move(corner, _far(a), _far(near_b))
    return [
        (corner, near_b, c, near_a),
        (_move(corner, near_b), a, rest_b, c),
        (end, (b[0], -half_b), c, (a[0], -rest_a[1])),
    ]


def _split_fully(corner: tuple[int, int, int], a: _Edge, b: _Edge, c: _Edge) -> list[_Box]:
    """Five boxes: up ``b``, out along ``c``, across along ``a``, back along ``c``, down ``b``."""
    half_a, half_b, half_c = _half(a[1]), _half(b[1]), _half(c[1])
    near_a, rest_a = (a[0], half_a), (a[0], a[1] - half_a)
    near_b, rest_b = (b[0], half_b), (b[0], b[1] - half_b)
    near_c, rest_c = (c[0], half_c), (c[0], c[1] - half_c)
    back_a = (a[0], -rest_a[1])
    return [
        (corner, near_b, near_c, near_a),
        (_move(corner, near_b), c, near_a, rest_b),
        (
            _move(corner, _far(near_b), _far(c)),
            a,
            (b[0], -half_b),
            (c[0], -rest_c[1]),
        ),
        (_move(corner, _far(a), near_b, _far(c)), (c[0], -c[1]), back_a, rest_b),
        (_move(corner, _far(a), _far(near_b)), (b[0], -half_b), near_c, back_a),
    ]


def _cut(corner: tuple[int, int, int], a: _Edge, b: _Edge, c: _Edge) -> list[_Box]:
    along, up, out = abs(a[1]), abs(b[1]), abs(c[1])
    if out == 1 or up == 1:  # a plane: let b be its second axis
        if up == 1:
            b, c, up = c, b, out
        return (_split_along if 2 * along > 3 * up else _split_bridge)(corner, a, b, c)
    if 2 * along > 3 * up and 2 * along > 3 * out:
        return _split_along(corner, a, b, c)
    if 3 * up > 4 * out:
        return _split_bridge(corner, a, b, c)
    if 3 * out > 4 * up:
        return _split_bridge(corner, a, c, b)
    return _split_fully(corner, a, b, c)


def gilbert_order(grid: tuple[int, int, int]) -> Tensor:
    """Row-major cell indices of a grid, in the order of a generalised Hilbert curve.

    Args:
        grid: sizes ``(T, H, W)``, any positive integers.

    Returns:
        int64 ``[T * H * W]`` on the CPU; a permutation. Consecutive cells are neighbours, but for a
        few diagonal steps that odd sizes force.
    """
    _, rows, columns = grid
    stride = (rows * columns, columns, 1)
    edges = sorted(enumerate(grid), key=lambda edge: -edge[1])
    todo: list[_Box] = [((0, 0, 0), edges[0], edges[1], edges[2])]
    cells: list[int] = []
    while todo:
        corner, a, b, c = todo.pop()
        lengths = abs(a[1]), abs(b[1]), abs(c[1])
        if sum(length > 1 for length in lengths) <= 1:  # a line of cells
            axis, length = max((a, b, c), key=lambda edge: abs(edge[1]))
            start = sum(x * s for x, s in zip(corner, stride, strict=True))
            step = stride[axis] if length > 0 else -stride[axis]
            cells.extend(range(start, start + abs(length) * step, step))
        elif lengths[0] == 1:  # entered and left at one corner: no such curve, take the plane's own
            todo.append((corner, b, a, c) if lengths[1] >= lengths[2] else (corner, c, a, b))
        else:
            todo.extend(reversed(_cut(corner, a, b, c)))
    return torch.tensor(cells, dtype=torch.int64)
