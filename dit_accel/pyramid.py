"""Routing to pyramid levels: PSA, pyramid sparse attention (arXiv 2512.04025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.kernels.ragged import order_of, positions
from dit_accel.layout import Blocked, Statistic
from dit_accel.rest import Drop
from dit_accel.types import DROP, EXACT, Context, Plan

if TYPE_CHECKING:
    from dit_accel.rest import Rest

LEVELS: Final = (1, 2, 4, 8)
"""Keys that are averaged into one, by level."""
RATIOS: Final = {
    "wan-14b": (0.4, 0.5, 0.6, 0.8),
    "wan-1.3b": (0.5, 0.6, 0.7, 0.8),
    "4-step": (0.05, 0.15, 0.25, 0.5),
}
"""The paper's settings: upper bounds of levels 1, 2, 4 and 8; what lies beyond is skipped."""
CAPS: Final = {2: 0.7, 4: 0.65, 8: 0.6}
"""Least mean cosine of neighbouring keys that may be pooled to a level."""
_SHARE = 4
_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Pyramid:
    """Every pair of blocks gets a level, by falling importance.

    Importance is the attention between a quarter of the tokens of each block, a softmax over all
    sampled keys, summed over the pair.

    Attributes:
        ratios: upper bounds of levels 1, 2, 4 and 8, rising, in [0, 1]; blocks beyond the last are
            skipped. The best block of a row is at level 1 unless the first bound is 0.
        mode: bounds on the importance of the blocks before (``"threshold"``), or on their share of
            all blocks (``"topk"``).
        sample: evenly strided tokens, or drawn ones (``"random"``).
        similarity_cap: pool a block to a level only if the mean cosine of the neighbours that would
            be pooled is at least `CAPS`, otherwise to the next finer one.
        seed: of ``sample="random"``.
        pools: its plans have pooled levels.
    """

    pools: ClassVar[bool] = True

    ratios: tuple[float, float, float, float] = RATIOS["wan-14b"]
    mode: Literal["threshold", "topk"] = "threshold"
    sample: Literal["stride", "random"] = "stride"
    similarity_cap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        ratios = self.ratios
        if (
            not isinstance(ratios, tuple)
            or len(ratios) != len(LEVELS)
            or list(ratios) != sorted(ratios)
            or not all(0 <= bound <= 1 for bound in ratios)
        ):
            raise InputError(
                "Pyramid: ratios: expected four rising bounds in [0, 1], of levels 1, 2, 4 and 8, "
                f"got {ratios!r}"
            )
        for name, known in (("mode", ("threshold", "topk")), ("sample", ("stride", "random"))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"Pyramid: {name}: expected {' or '.join(known)}, got {getattr(self, name)!r}"
                )

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return ()

    def refuses(self, rest: Rest) -> str | None:
        """Why a rest makes no sense beside this route, if it does not."""
        if isinstance(rest, Drop):
            return None
        return "its pairs are exact, pooled or skipped, and none is left to a rest"

    def __call__(self, blocked: Blocked, rest: Rest, ctx: Context) -> Plan:
        rows, columns = blocked.queries.num_video, blocked.keys.num_video
        batch, heads = blocked.q.shape[:2]
        code = torch.full(
            (batch, heads, blocked.queries.num_blocks, blocked.keys.num_blocks),
            EXACT,
            dtype=torch.int8,
            device=blocked.q.device,
        )
        if rows and columns and self.ratios[0] < 1:
            for b in range(batch):
                for h in range(heads):
                    importance, count = self._importance(blocked, b, h, rows, columns)
                    level = self._levels(importance, count)
                    if self.similarity_cap:
                        level = self._capped(level, blocked, b, h, columns)
                    code[b, h, :rows, :columns] = level
        return Plan(code)

    def _importance(
        self, blocked: Blocked, b: int, h: int, rows: int, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Importance ``[rows, columns]`` of a head's pairs, and keys in a block ``[columns]``."""
        valid = blocked.geometry.key_valid
        keys = order_of(blocked.keys.perm, blocked.keys.offsets, valid, b, h)
        queries = order_of(blocked.queries.perm, blocked.queries.offsets, None, b, h)
        k_tokens, k_sizes = self._sampled(keys.tokens, keys.starts[:columns], keys.sizes[:columns])
        q_tokens, q_sizes = self._sampled(
            queries.tokens, queries.starts[:rows], queries.sizes[:rows]
        )
        work = torch.promote_types(blocked.q.dtype, torch.float32)
        query = blocked.q[b, h].index_select(0, q_tokens).to(work) * blocked.scale
        key = blocked.k[b, h].index_select(0, k_tokens).to(work)
        column = torch.arange(columns, device=key.device)
        column = column.repeat_interleave(k_sizes, output_size=key.shape[0])
        row = torch.arange(rows, device=key.device)
        row = row.repeat_interleave(q_sizes, output_size=query.shape[0])
        importance = query.new_zeros(rows, columns)
        step = max(1, _CHUNK_BYTES // (max(1, key.shape[0]) * 2 * key.element_size()))
        for first in range(0, query.shape[0] if key.shape[0] else 0, step):
            some = slice(first, first + step)
            share = (query[some] @ key.mT).softmax(-1)
            by_block = share.new_zeros(share.shape[0], columns).index_add_(1, column, share)
            importance.index_add_(0, row[some], by_block)
        return importance, keys.sizes[:columns]

    def _sampled(self, tokens: Tensor, starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """A quarter of every block's tokens, at least one, and how many of each."""
        counts = -(-sizes // _SHARE)
        inside = positions(torch.zeros_like(starts), counts)
        block = torch.arange(sizes.numel(), device=sizes.device)
        block = block.repeat_interleave(counts, output_size=inside.numel())
        if self.sample == "stride":
            inside = ((2 * inside + 1) * sizes[block]) // (2 * counts[block])
        else:
            # one token of each run of four, so that a block is still covered evenly
            generator = torch.Generator().manual_seed(self.seed)
            shift = torch.randint(0, _SHARE, inside.shape, generator=generator).to(inside.device)
            inside = torch.minimum(inside * _SHARE + shift, sizes[block] - 1)
        return tokens[starts[block] + inside], counts

    def _levels(self, importance: Tensor, count: Tensor) -> Tensor:
        """int8 ``[Nq, Nk]``: the level of every pair."""
        full = count > 0
        ranked, order = importance.masked_fill(~full, -1.0).sort(
            dim=-1, descending=True, stable=True
        )
        ranked = ranked.clamp(min=0).double()
        if self.mode == "threshold":
            total = ranked.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            before = (ranked.cumsum(-1) - ranked) / total
        else:
            place = torch.arange(ranked.shape[-1], device=ranked.device, dtype=torch.float64)
            before = (place / full.sum().clamp(min=1)).expand_as(ranked)
        level = torch.full_like(order, DROP, dtype=torch.int8)
        for bound, number in zip(reversed(self.ratios), reversed(LEVELS), strict=True):
            level.masked_fill_(before < bound, number)
        return torch.zeros_like(level).scatter_(-1, order, level)

    def _capped(self, level: Tensor, blocked: Blocked, b: int, h: int, columns: int) -> Tensor:
        """The levels, no coarser than the likeness of neighbouring keys allows."""
        keys = order_of(blocked.keys.perm, blocked.keys.offsets, blocked.geometry.key_valid, b, h)
        allowed = allowed_levels(
            blocked.k[b, h], keys.tokens, keys.starts[:columns], keys.sizes[:columns]
        )
        return allowed.gather(1, level.mT.long()).mT


def allowed_levels(k: Tensor, tokens: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
    """int8 ``[N, 9]``: by block and level asked for, the level that its keys are alike enough for.

    Args:
        k: ``[L, D]``.
        tokens: int64 ``[M]``, the valid tokens in the layout's order.
        starts, sizes: int64 ``[N]``, the blocks.
    """
    count = int(sizes.sum())
    key = torch.nn.functional.normalize(
        k[tokens[:count]].to(torch.promote_types(k.dtype, torch.float32)), dim=-1
    )
    block = torch.arange(sizes.numel(), device=k.device)
    block = block.repeat_interleave(sizes, output_size=count)
    inside = torch.arange(count, device=k.device) - starts[block]
    cosine = (key[:-1] * key[1:]).sum(-1)
    together = block[:-1] == block[1:]
    allowed = torch.zeros(sizes.numel(), LEVELS[-1] + 1, dtype=torch.int8, device=k.device)
    allowed[:, EXACT] = EXACT
    for level in LEVELS[1:]:
        pooled = together & (inside[:-1] // level == inside[1:] // level)
        total = cosine.new_zeros(sizes.shape).index_add_(0, block[:-1][pooled], cosine[pooled])
        pairs = torch.zeros_like(sizes).index_add_(0, block[:-1][pooled], together[pooled].long())
        # a block of one key is its own mean
        alike = (pairs == 0) | (total / pairs.clamp(min=1) >= CAPS[level])
        allowed[:, level] = torch.where(alike, level, allowed[:, level // 2])
    return allowed
