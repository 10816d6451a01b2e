"""The merge as a kernel: each part read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.specimen import Specimen
from dit_accel.kernels.tuning import SPACES, setting


@triton.jit(do_not_specialize=["rows"])
def merge_kernel(a, a_lse, b, b_lse, out, lse, rows, D: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    first = tl.load(a_lse + row, mask=inside, other=float("-inf"))
    second = tl.load(b_lse + row, mask=inside, other=float("-inf"))
    peak = tl.maximum(first, second)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    mine, theirs = tl.exp(first - peak), tl.exp(second - peak)
    total = mine + theirs
    where = row[:, None] * D + tl.arange(0, D)[None, :]
    known = inside[:, None]
    merged = tl.load(a + where, mask=known, other=0.0).to(tl.float32) * mine[:, None]
    merged += tl.load(b + where, mask=known, other=0.0).to(tl.float32) * theirs[:, None]
    merged /= tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + where, merged.to(out.dtype.element_ty), mask=known)
    norm = tl.where(total == 0.0, float("-inf"), tl.log(tl.where(total == 0.0, 1.0, total)) + peak)
    tl.store(lse + row, norm, mask=inside)


@torch.no_grad()
def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, other, other_lse = (x.contiguous() for x in (out, lse, other, other_lse))
    merged, norm = torch.empty_like(out), torch.empty_like(lse)
    rows, depth = lse.numel(), out.shape[-1]
    chosen = setting("merge", out, out.shape[-2])
    merge_kernel[(triton.cdiv(rows, chosen["ROWS"]),)](
        out, lse, other, other_lse, merged, norm, rows, D=depth, **chosen.values
    )
    return merged, norm


SPECIMENS = (
    [
        Specimen(
            f"merge bf16 D{depth}",
            merge_kernel,
            {
                **dict.fromkeys(("a", "b", "out"), "*bf16"),
                **dict.fromkeys(("a_lse", "b_lse", "lse"), "*fp32"),
                "rows": "i32",
            },
            {"D": depth, **SPACES["merge"].half.constants},
            SPACES["merge"].half.options,
        )
        for depth in (64, 128)
    ]
    if isinstance(merge_kernel, triton.JITFunction)
    else []
)
