"""What the kernels of k-means work on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.kmeans.start import starting_centroids
from dit_accel.kernels.launch import launch
from dit_accel.kernels.specimen import Specimen, typed

_ROWS = 64
"""Centroids of a program, and of a tile of distances on Hopper."""


@triton.jit(do_not_specialize=["clusters", "padded", "steps"])
def begin_kernel(
    start,
    exact,
    centre,
    half,
    changed,
    clusters,
    padded,
    steps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Centroids in both precisions, and ``½|c|²``, infinite beyond the last one."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < clusters
    where = (head * clusters + row)[:, None] * D + tl.arange(0, D)[None, :]
    value = tl.load(start + where, mask=inside[:, None], other=0.0)
    tl.store(exact + where, value, mask=inside[:, None])
    rounded = value.to(centre.dtype.element_ty)
    tl.store(centre + where, rounded, mask=inside[:, None])
    back = rounded.to(tl.float32)
    square = tl.where(inside, 0.5 * tl.sum(back * back, 1), float("inf"))
    tl.store(half + head * padded + row, square)
    if tl.program_id(0) == 0:
        tl.store(changed + head, 1)
        for step in range(1, steps):
            tl.store(changed + step * tl.num_programs(1) + head, 0)


class Clusters:
    """Labels int32 ``[B, H, L]`` and centroids ``[B, H, C, D]`` on their way.

    ``exact`` are the centroids in fp32, ``centre`` the same in the tokens' dtype, and ``half``
    ``½|c|²`` of these, ``[B, H, C rounded up to 64]``. ``changed`` int32
    ``[iterations + 1, B · H]``: whether a label moved.
    """

    def __init__(
        self,
        x: Tensor,
        clusters: int,
        iterations: int,
        start: Tensor | None,
        valid: Tensor | None,
        seed: int,
    ) -> None:
        batch, heads, length, depth = x.shape
        if start is None:
            start = starting_centroids(x, clusters, valid, seed)
        start = start.float().contiguous()

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        padded = -(-clusters // _ROWS) * _ROWS
        self.exact = new(batch, heads, clusters, depth, dtype=torch.float32)
        self.centre = new(batch, heads, clusters, depth, dtype=x.dtype)
        self.half = new(batch, heads, padded, dtype=torch.float32)
        self.labels = new(batch, heads, length)
        self.changed = new(iterations + 1, batch * heads)
        self.valid = None if valid is None else valid.contiguous()
        launch(
            begin_kernel,
            (padded // _ROWS, batch * heads),
            (start, self.exact, self.centre, self.half, self.changed),
            (clusters, padded, iterations + 1),
            D=depth,
            ROWS=_ROWS,
            num_warps=4,
        )

    @property
    def mask(self) -> Tensor:
        """``valid``, or where there is none something that is not read."""
        return self.labels if self.valid is None else self.valid

    def arguments(self, x: Tensor, step: int) -> tuple[int, ...]:
        """What the kernels are told about the shapes."""
        padding = x.shape[2] if self.valid is not None else 0
        sizes = *x.shape[1:3], self.centre.shape[2]
        return (*x.stride()[:3], padding, *sizes, step)


def _specimen(depth: int, dtype: str) -> Specimen:
    constants = {"D": depth, "ROWS": _ROWS}
    types = {
        **dict.fromkeys(("start", "exact", "half"), "*fp32"),
        **{"centre": f"*{dtype}", "changed": "*i32"},
    }
    signature = typed(begin_kernel, constants, **types)
    name = f"begin {dtype} D={depth}"
    return Specimen(name, begin_kernel, signature, constants, {"num_warps": 4})


SPECIMENS = (
    [_specimen(64, "fp16"), _specimen(128, "bf16")]
    if isinstance(begin_kernel, triton.JITFunction)
    else []
)
