"""What Triton's scans combine by."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    """The larger of two."""
    return tl.maximum(a, b)
