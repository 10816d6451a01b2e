"""The bits of a word in Triton."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  (the interpreter wants it where a kernel is)


@triton.jit
def word_bit(number):
    """`words.bit_of`, which is its own inverse."""
    return ((number & 1) << 3) | ((number & 2) << 1) | ((number & 4) >> 1) | ((number & 8) >> 3)
