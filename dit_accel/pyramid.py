"""Routing to pyramid levels: PSA, pyramid sparse attention (arXiv 2512.04025)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import torch
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.kernels.block_importance import block_importance
from dit_accel.kernels.order import valid_order
from dit_accel.kernels.packed import remembered
from dit_accel.kernels.rank_levels import rank_levels
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
_CHUNK_BYTES = 64 * 2**20


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
        min_exact: least share of a row's blocks that is exact, the best ones, whatever the bounds
            say; 0.08 in the public code, with ``mode="threshold"``.
        pools: its plans have pooled levels.
    """

    pools: ClassVar[bool] = True

    ratios: tuple[float, float, float, float] = RATIOS["wan-14b"]
    mode: Literal["threshold", "topk"] = "threshold"
    sample: Literal["stride", "random"] = "stride"
    similarity_cap: bool = False
    seed: int = 0
    min_exact: float = 0.0

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
        if not 0 <= self.min_exact <= 1:
            raise InputError(f"Pyramid: min_exact: expected 0 to 1, got {self.min_exact!r}")
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
        shape = (*blocked.q.shape[:2], blocked.queries.num_blocks, blocked.keys.num_blocks)
        code = torch.empty(shape, dtype=torch.int8, device=blocked.q.device)
        if not (rows and columns and self.ratios[0] < 1):
            return Plan(code.fill_(EXACT), LEVELS[1:])
        keys, queries = blocked.keys, blocked.queries
        tokens, bounds = valid_order(keys.perm, keys.offsets, blocked.geometry.key_valid)
        bounds = bounds[..., : columns + 1]
        q_blocks = queries.offsets[..., : rows + 1]
        q_tokens, q_bounds = remembered(
            queries.perm,
            queries.offsets,
            ("sampled", rows, self.sample, self.seed),
            lambda: self._sampled(queries.perm, q_blocks, queries.longest),
        )

        def sampled_keys() -> tuple[Tensor, Tensor]:
            return self._sampled(tokens, bounds, keys.longest)

        if blocked.geometry.key_valid is None:
            what = ("sampled", columns, self.sample, self.seed)
            k_tokens, k_bounds = remembered(keys.perm, keys.offsets, what, sampled_keys)
        else:
            k_tokens, k_bounds = sampled_keys()
        importance = block_importance(
            blocked.q,
            blocked.k,
            q_tokens=q_tokens,
            q_bounds=q_bounds,
            k_tokens=k_tokens,
            k_bounds=k_bounds,
            scale=blocked.scale,
            k_longest=None if keys.longest is None else -(-keys.longest // _SHARE),
        )
        self._rank(importance, self._full(blocked, bounds), code)
        level = code[:, :, :rows, :columns]
        # a few heads at a time, whose indices take what the importance of all does
        heads = blocked.q.shape[1]
        step = max(1, _CHUNK_BYTES // (importance[:, :1].numel() * 8))
        for h in range(0, heads if self.similarity_cap else 0, step):
            some = slice(h, h + step)
            allowed = allowed_levels(blocked.k[:, some], _heads(tokens, some), _heads(bounds, some))
            level[:, some] = allowed.gather(-1, level[:, some].mT.long()).mT
        return Plan(code, LEVELS[1:])

    def _sampled(
        self, tokens: Tensor, bounds: Tensor, longest: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A quarter of every block's tokens, at least one, and where those of each block lie.

        There are as many places as samples could be, since how many there are is not known to the
        host; those behind the last sample hold some token.
        """
        bounds = bounds.long()
        lead = tuple(max(a, b) for a, b in zip(tokens.shape[:2], bounds.shape[:2], strict=True))
        tokens, bounds = tokens.expand(*lead, -1), bounds.expand(*lead, -1)
        sizes = bounds.diff(dim=-1)
        counts = -(-sizes // _SHARE)
        ends = counts.cumsum(-1)
        places = (tokens.shape[-1] + (_SHARE - 1) * sizes.shape[-1]) // _SHARE
        if longest is not None:
            places = min(places, sizes.shape[-1] * -(-longest // _SHARE))
        place = torch.arange(places, device=tokens.device).expand(*lead, -1).contiguous()
        block = torch.searchsorted(ends, place, right=True).clamp_(max=sizes.shape[-1] - 1)
        inside = place - (ends - counts).gather(-1, block)
        size, number = sizes.gather(-1, block), counts.gather(-1, block).clamp(min=1)
        if self.sample == "stride":
            inside = ((2 * inside + 1) * size) // (2 * number)
        else:
            # one token of each run of four, so that a block is still covered evenly
            shift = _shifts(places, self.seed, tokens.device)
            inside = torch.minimum(inside * _SHARE + shift, size - 1)
        where = (bounds.gather(-1, block) + inside).clamp_(0, tokens.shape[-1] - 1)
        return tokens.gather(-1, where), torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)

    @staticmethod
    def _full(blocked: Blocked, bounds: Tensor) -> Tensor:
        """bool ``[B|1, H|1, 1, Nk]``: blocks with keys, by where they lie."""

        def full() -> Tensor:
            return (bounds.diff(dim=-1) > 0).unsqueeze(-2)

        keys = blocked.keys
        if blocked.geometry.key_valid is not None:
            return full()
        return remembered(keys.perm, keys.offsets, ("full", keys.num_video), full)

    def _rank(self, importance: Tensor, full: Tensor, code: Tensor) -> None:
        """Fill in the level of every pair, int8 ``[B, H, N, N]``; text, behind them, is exact.

        A block without keys (not ``full``) takes up no room, and what its level is makes no
        difference.
        """
        worth = importance if self.mode == "threshold" else full
        shares = _on(self.ratios, torch.float64, importance.device).view(1, 1, 1, -1)
        # within all bounds is the finest level
        codes = (DROP, *reversed(LEVELS))
        rank_levels(importance, worth, shares, shares=True, codes=codes, out=code, beyond=EXACT)
        if self.min_exact:
            least = _on((self.min_exact,), torch.float64, importance.device).view(1, 1, 1, 1)
            level = code[:, :, : importance.shape[2], : importance.shape[3]]
            level.masked_fill_(rank_levels(importance, full, least, shares=True) > 0, EXACT)


def pooled_pairs(blocked: Blocked, plan: Plan) -> Tensor:
    """int64 ``[B, H]``: pairs of a query and a mean that a plan computes beside its exact ones.

    With those they are the plan's work, in products of a query and a row of keys.
    """
    batch, heads = blocked.q.shape[:2]
    padded = blocked.geometry.key_valid is not None
    count = blocked.summary().count if padded else blocked.keys.sizes
    count = count.expand(batch, heads, -1)
    sizes = blocked.queries.sizes.expand(batch, heads, -1)
    pairs = torch.zeros(batch, heads, dtype=torch.int64, device=count.device)
    for h in range(heads):
        code = _heads(plan.code, slice(h, h + 1)).expand(batch, -1, -1, -1)[:, 0]
        for level in LEVELS[1:]:
            means = -(-count[:, h] // level)
            # a row's means are below 2**24, so fp32 counts them exactly
            read = (code == level).float() @ means.float().unsqueeze(-1)
            pairs[:, h] += (read.squeeze(-1).double() * sizes[:, h]).sum(-1).long()
    return pairs


def _heads(tensor: Tensor, heads: slice) -> Tensor:
    """``tensor[:, heads]``, where the second dimension may be 1."""
    return tensor if tensor.shape[1] == 1 else tensor[:, heads]


@lru_cache(maxsize=64)
def _on(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Constants where they are used, copied once: a copy waits for the device."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used outside
        return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=8)
def _shifts(length: int, seed: int, device: torch.device) -> Tensor:
    """int64 ``[length]`` below `_SHARE`, the same on every device."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used outside
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, _SHARE, (length,), generator=generator).to(device)


def allowed_levels(k: Tensor, tokens: Tensor, bounds: Tensor) -> Tensor:
    """int8 ``[B, H, N, 9]``: by block and level, the level that its keys are alike enough for.

    Args:
        k: ``[B, H, L, D]``.
        tokens: int64 ``[B|1, H|1, L]``, the layout's order, valid tokens first.
        bounds: int32 ``[B|1, H|1, N + 1]``, the blocks.
    """
    batch, heads, length, _ = k.shape
    tokens, bounds = (x.long().expand(batch, heads, -1) for x in (tokens, bounds))
    starts, ends = bounds[..., :-1], bounds[..., 1:].contiguous()
    place = torch.arange(length, device=k.device).expand(batch, heads, -1).contiguous()
    block = torch.searchsorted(ends, place, right=True)
    within = block < ends.shape[-1]
    block.clamp_(max=ends.shape[-1] - 1)
    inside = place - starts.gather(-1, block)
    key = k.gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, k.shape[3]))
    key = torch.nn.functional.normalize(key.to(torch.promote_types(k.dtype, torch.float32)), dim=-1)
    cosine = (key[:, :, :-1] * key[:, :, 1:]).sum(-1)
    together = (block[..., :-1] == block[..., 1:]) & within[..., 1:]
    first = block[..., :-1]
    allowed = torch.zeros(*starts.shape, LEVELS[-1] + 1, dtype=torch.int8, device=k.device)
    allowed[..., EXACT] = EXACT
    for level in LEVELS[1:]:
        pooled = together & (inside[..., :-1] // level == inside[..., 1:] // level)
        total = cosine.new_zeros(starts.shape)
        total.scatter_add_(-1, first, torch.where(pooled, cosine, 0.0))
        pairs = torch.zeros_like(starts).scatter_add_(-1, first, pooled.long())
        # a block of one key is its own mean
        alike = (pairs == 0) | (total / pairs.clamp(min=1) >= CAPS[level])
        allowed[..., level] = torch.where(alike, level, allowed[..., level // 2])
    return allowed
