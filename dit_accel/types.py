"""The nouns of the algebra. Frozen, free of behaviour beyond their own invariants.

Shapes follow one order everywhere: ``B`` batch, ``H`` heads, ``L`` tokens, ``D`` head size,
``Nq`` / ``Nk`` query / key blocks. ``X|1`` means the dimension may be 1 and is then broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.kernels.packed import remembered
from dit_accel.kernels.words import Words
from dit_accel.state import State

DROP: Final = 0
"""Plan code: the pair is left out."""
EXACT: Final = 1
"""Plan code: every token pair is computed. Codes 2, 4 and 8 are pooled levels."""
REST: Final = -1
"""Plan code: the pair is left to the method's rest."""


Grid = tuple[int, int, int]
"""Latent frames, rows, columns."""


def _checked(grid: Grid) -> Grid:
    if not (isinstance(grid, tuple | list) and len(grid) == 3):
        raise InputError(f"grid: expected three sizes (frames, rows, columns), got {grid!r}")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in grid):
        raise InputError(f"grid: expected three positive integers, got {grid!r}")
    frames, rows, columns = grid
    return frames, rows, columns


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the tokens of a sequence are.

    Attributes:
        grid: latent frames, rows, columns ``(T, H, W)`` of the video tokens, which stand in
            row-major order. An image has ``T = 1``.
        text: where the text tokens stand in a joint sequence, or ``None`` without any. Text is
            never reordered and never approximated.
        key_valid: bool ``[B, L]``; ``False`` marks padding, which contributes nothing as a key.
        more: grids that follow in the sequence, such as reference images of any size. Their tokens
            are approximated like the others, in blocks of their own.
    """

    grid: Grid
    text: slice | None = None
    key_valid: Tensor | None = None
    more: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _checked(self.grid))
        object.__setattr__(self, "more", tuple(map(_checked, self.more)))
        if self.text is not None:
            start, stop = self.text.start, self.text.stop
            if self.text.step not in (None, 1) or not (
                isinstance(start, int) and isinstance(stop, int) and 0 <= start <= stop
            ):
                raise InputError(
                    f"text: expected slice(start, stop) with 0 <= start <= stop and no step, "
                    f"got {self.text!r}"
                )

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All grids, in the order of the sequence."""
        return self.grid, *self.more

    @property
    def num_video(self) -> int:
        """Number of video tokens, the product of the grid; of all grids together."""
        return sum(map(math.prod, self.grids))

    @property
    def num_text(self) -> int:
        """Number of text tokens."""
        return 0 if self.text is None else self.text.stop - self.text.start

    @property
    def length(self) -> int:
        """Number of tokens in the sequence."""
        return self.num_video + self.num_text

    @property
    def text_span(self) -> tuple[int, int]:
        """``(start, stop)`` of the text tokens; ``(L, L)`` without any. Hashable, for caches."""
        return (
            (self.length, self.length) if self.text is None else (self.text.start, self.text.stop)
        )


@dataclass(frozen=True, slots=True)
class Blocks:
    """A permutation of the tokens, cut into blocks that may all differ in length.

    Attributes:
        perm: int64 ``[B|1, H|1, L]``; ``perm[..., p]`` is the token at position ``p`` of the order.
        offsets: int32 ``[B|1, H|1, N + 1]``; block ``i`` holds positions
            ``offsets[i] .. offsets[i + 1] - 1``. Empty blocks are allowed.
        num_video: blocks ``0 .. num_video - 1`` hold video tokens, the others text tokens, which
            always come last in the order.
        longest: tokens of the longest block, or a bound of it, where a layout knows without
            asking the device.
    """

    perm: Tensor
    offsets: Tensor
    num_video: int
    longest: int | None = None

    @property
    def num_blocks(self) -> int:
        """``N``, text blocks included."""
        return self.offsets.shape[-1] - 1

    @property
    def sizes(self) -> Tensor:
        """int32 ``[B|1, H|1, N]``: tokens in each block, padding included."""
        return remembered(
            self.perm, self.offsets, "sizes", lambda: self.offsets.diff(dim=-1).contiguous()
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of every key block over its *valid* keys, in fp32 (fp64 for fp64 inputs).

    Attributes:
        count: ``[B|1, H|1, Nk]``, number of valid keys ``n_j``.
        k_mean, v_mean: ``[B, H, Nk, D]``; zero where a block has no valid key.
        k_var: ``[B, H, Nk, D]``, variance of the keys by channel (over ``n_j``), or ``None``.
        cov_sum: ``[B, H, D, D]``, ``C = Σ_j C_j`` over the video blocks with
            ``C_j = Σ_n (k_n - k̄_j) v_nᵀ`` (PISA, arXiv 2602.01077), or ``None``.
        cov_norm: ``[B, H, Nk]``, Frobenius norms ``‖C_j‖``, or ``None``.
    """

    count: Tensor
    k_mean: Tensor
    v_mean: Tensor
    k_var: Tensor | None = None
    cov_sum: Tensor | None = None
    cov_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of each pair of blocks.

    Attributes:
        code: int8 ``[B|1, H|1, Nq, Nk]``; ``EXACT`` (1), ``DROP`` (0), ``REST`` (-1), or a pooling
            level 2, 4, 8. Rows and columns of text blocks are ``EXACT``.
        levels: which pooling levels ``code`` may hold.
        whole: every pair is exact, so that dense attention computes the same without any block.
    """

    code: Tensor
    levels: tuple[int, ...] = ()
    whole: bool = False


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """What becomes of each pair of a query *token* and a key block.

    Attributes:
        chosen: bool ``[B|1, H|1, L, Nk]``, or as much in `Words`; query tokens in the model's
            order. ``True`` is exact, ``False`` is left to the method's rest.
    """

    chosen: Tensor | Words

    @property
    def select(self) -> Tensor:
        """bool ``[B|1, H|1, L, Nk]``; unpacked anew wherever it is asked for."""
        return self.chosen.select() if isinstance(self.chosen, Words) else self.chosen

    @property
    def stored(self) -> Tensor:
        """What is kept of it."""
        return self.chosen.word if isinstance(self.chosen, Words) else self.chosen

    def complement(self) -> TokenPlan:
        """The pairs that are left."""
        chosen = self.chosen
        return TokenPlan(chosen.complement() if isinstance(chosen, Words) else ~chosen)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys beyond the sequence that all its queries see: the KV cache of block diffusion.

    The sequence is then the chunk being denoised, and these are the chunks before it. Methods act
    within the sequence; the prefix is attended to exactly, under the same softmax normaliser.

    Attributes:
        length: number of keys; 0 in a first chunk.
        load: makes keys and values, ``[B, H, length, D]`` in ``q``'s dtype. Called only when
            attention to them is computed, which `flashblock` does now and then.
        chunk: whose context it is: what is kept for one chunk is never used for another.
        zeros: number of further keys that are zero, with values of zero, as a pipeline's padding
            may leave them: each adds 1 to the normaliser.
    """

    length: int
    load: Callable[[], tuple[Tensor, Tensor]] = field(repr=False)
    chunk: int = 0
    zeros: int = 0


@dataclass(frozen=True, slots=True)
class Context:
    """Where in a generation an attention call happens. A processor fills it, methods read it."""

    geometry: Geometry
    step: int = 0
    num_steps: int | None = None
    layer: int = 0
    num_layers: int | None = None
    branch: str = ""
    state: State | None = field(default=None, repr=False)
    prefix: Prefix | None = None

    @property
    def memory(self) -> dict[str, Any]:
        """What this layer and guidance branch remember; a throw-away mapping without a state."""
        return {} if self.state is None else self.state.slot(self.layer, self.branch)


@dataclass(frozen=True, slots=True)
class Report:
    """What an attention call really computed.

    Attributes:
        exact_pairs: int64 ``[B, H]``, query-key pairs computed exactly, text and forced blocks
            included.
        all_pairs: int64 ``[B, H]``, pairs that dense attention computes: every query with every
            valid key, those of a prefix included.
    """

    exact_pairs: Tensor
    all_pairs: Tensor

    @property
    def head_density(self) -> Tensor:
        """fp64 ``[B, H]``: exact pairs over all pairs; 1 where there is no pair at all."""
        every = self.all_pairs.double()
        return torch.where(every > 0, self.exact_pairs.double() / every.clamp(min=1), 1.0)

    @property
    def density(self) -> float:
        """Exact pairs over all pairs, batch and heads together. Reads the device."""
        every = int(self.all_pairs.sum())
        return int(self.exact_pairs.sum()) / every if every else 1.0
