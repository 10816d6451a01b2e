"""Block attention in plain torch: time and memory grow with the pairs that are computed.

One head at a time. Its keys and values are put into the order once, in the working dtype (two rows
of ``D`` for each token of *one* head). Query blocks are then taken in chunks, those with as many
keys together, so that padding is tight and a chunk stays within `WORKSPACE_BYTES`; a row with more
keys than that is taken in pieces, under the online softmax.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dit_accel.kernels.block_attention.api import POOLED, RestTerms
from dit_accel.kernels.ragged import (
    WORKSPACE_BYTES,
    Order,
    Workspace,
    chunks,
    order_of,
    pad_rows,
    pick,
    pool_of,
    positions,
    working_dtype,
)
from dit_accel.kernels.threads import Task, num_workers, run_tasks


@dataclass(frozen=True, slots=True)
class _Rest:
    """One head of `RestTerms`, ready for use."""

    keys: Tensor  # [Nk, D]
    values: Tensor  # [Nk, D]
    log_count: Tensor  # [Nk]
    count: Tensor  # [Nk], in the working dtype
    half_var: Tensor | None  # [Nk, D]
    second: bool
    cov: Tensor | None  # [D, D]
    centred: Tensor | None  # [M, D], keys less their block's mean, for cov_scope="rest"
    tokens: float
    num_video: int


class _Softmax:
    """The online softmax of a chunk: running peak, normaliser and numerator."""

    def __init__(self, rows: int, width: int, depth: int, like: Tensor) -> None:
        self.peak = like.new_full((rows, width, 1), -torch.inf)
        self.total = like.new_zeros((rows, width, 1))
        self.numerator = like.new_zeros((rows, width, depth))

    def weigh(self, logits: Tensor) -> Tensor:
        """Turn logits ``[G, n, m]`` into weights, in place; returns their sums ``[G, n, 1]``."""
        peak = torch.maximum(self.peak, logits.amax(-1, keepdim=True))
        # a row without any key so far keeps the peak -inf, but must not subtract it
        finite = peak.masked_fill(peak == -torch.inf, 0.0)
        fade = (self.peak - finite).exp_()
        logits.sub_(finite).exp_()
        sums = logits.sum(-1, keepdim=True)
        self.peak = peak
        self.total.mul_(fade).add_(sums)
        self.numerator.mul_(fade)
        return sums

    def result(self) -> tuple[Tensor, Tensor]:
        """``out`` ``[G, n, D]`` and ``lse`` ``[G, n]``."""
        out = self.numerator.div_(self.total.masked_fill(self.total == 0, 1.0))
        return out, self.total.log().add_(self.peak).squeeze(-1)


class _Head:
    """One head: its keys in order, its plan as lists, its rest."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        code: Tensor,
        queries: Order,
        keys: Order,
        space: Workspace,
    ) -> None:
        self.queries, self.order, self.code = queries, keys, code
        self.rest: _Rest | None = None
        work = working_dtype(k.dtype)
        count = keys.tokens.numel()
        levels = [level for level in POOLED if bool((code == level).any())]
        pools = [pool_of(keys.starts, keys.sizes, level) for level in levels]
        total = count + sum(pool.number.numel() for pool in pools)
        self.keys = space.take("all keys", total, k.shape[-1])
        self.values = space.take("all values", total, k.shape[-1])
        for source, target in ((k, self.keys), (v, self.values)):
            if source.dtype == work:
                torch.index_select(source, 0, keys.tokens, out=target[:count])
            else:
                target[:count].copy_(source.index_select(0, keys.tokens))
            at = count
            for pool in pools:
                end = at + pool.number.numel()
                target[at:end].zero_().index_add_(0, pool.group, target[:count])
                target[at:end].div_(pool.number.to(work).unsqueeze(-1))
                at = end

        # keys, and after them the pooled keys of each level that the plan asks for
        starts, sizes, bias = [keys.starts], [keys.sizes], [k.new_zeros(count, dtype=work)]
        at = count
        slot = torch.zeros(POOLED[-1] + 1, dtype=torch.int64, device=k.device)
        for number, (level, pool) in enumerate(zip(levels, pools, strict=True), start=1):
            slot[level] = number
            starts.append(pool.starts + at)
            sizes.append(pool.sizes)
            bias.append(pool.number.to(work).log())
            at += pool.number.numel()
        self.starts, self.sizes = torch.cat(starts), torch.cat(sizes)
        self.bias = torch.cat(bias) if levels else None

        # a compact list of blocks a row, at the level wanted, empty blocks left out
        listed = (code > 0) & (keys.sizes > 0)
        entries = listed.nonzero()
        wanted = slot[code[entries[:, 0], entries[:, 1]].long()]
        self.listed = wanted * keys.sizes.numel() + entries[:, 1]
        per_row = listed.sum(-1)
        self.first = torch.zeros(per_row.numel() + 1, dtype=torch.int64, device=k.device)
        torch.cumsum(per_row, 0, out=self.first[1:])
        self.num_keys = torch.zeros_like(per_row).index_add_(
            0, entries[:, 0], self.sizes[self.listed]
        )

    def rows(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions of the exact keys of some query blocks, ``[G, m]``, and their padding."""
        start, length = self.first[blocks], self.first[blocks + 1] - self.first[blocks]
        entries = self.listed[positions(start, length)]
        where = positions(self.starts[entries], self.sizes[entries])
        return pad_rows(where, self.num_keys[blocks])

    def attend(
        self, query: Tensor, blocks: Tensor, space: Workspace, budget: int
    ) -> tuple[Tensor, Tensor]:
        """Exact pairs and rest of a chunk of scaled queries ``[G, n, D]``."""
        rows, width, depth = query.shape
        softmax = _Softmax(rows, width, depth, query)
        where, padding = self.rows(blocks)
        # logits, and a gathered key and value, for each key of each row
        piece = max(64, budget // (rows * (width + 2 * depth) * query.itemsize))
        for start in range(0, where.shape[1], piece):
            columns = slice(start, start + piece)
            some = where[:, columns]
            flat = some.reshape(-1)
            count = some.shape[1]
            keys = space.take("keys", flat.numel(), depth)
            values = space.take("values", flat.numel(), depth)
            torch.index_select(self.keys, 0, flat, out=keys)
            torch.index_select(self.values, 0, flat, out=values)
            logits = space.take("logits", rows, width, count)
            torch.bmm(query, keys.view(rows, count, depth).transpose(1, 2), out=logits)
            if self.bias is not None:
                logits.add_(self.bias[flat].view(rows, 1, count))
            if padding is not None:
                logits.masked_fill_(padding[:, None, columns], -torch.inf)
            softmax.weigh(logits)
            softmax.numerator.baddbmm_(logits, values.view(rows, count, depth))
        if self.rest is not None:
            self._add_rest(softmax, query, blocks, self.rest, space, budget)
        return softmax.result()

    def _add_rest(
        self,
        softmax: _Softmax,
        query: Tensor,
        blocks: Tensor,
        rest: _Rest,
        space: Workspace,
        budget: int,
    ) -> None:
        chosen = self.code[blocks] == -1
        if not bool(chosen.any()):
            return
        rows, width, depth = query.shape
        flat = query.reshape(-1, depth)
        logits = space.take("rest", flat.shape[0], rest.keys.shape[0])
        torch.mm(flat, rest.keys.t(), out=logits)
        if rest.half_var is not None:
            shift = space.take("shift", *logits.shape)
            torch.mm(flat.square(), rest.half_var.t(), out=shift)
            logits.add_(shift.log1p_() if rest.second else shift)
        weights = logits.view(rows, width, -1)
        weights.add_(torch.where(chosen, rest.log_count, -torch.inf).unsqueeze(1))
        sums = softmax.weigh(weights)
        softmax.numerator.add_(torch.mm(logits, rest.values).view(query.shape))
        if rest.cov is None:
            return
        if rest.centred is None:
            first = torch.mm(flat, rest.cov).view(query.shape)
            softmax.numerator.addcmul_(first, sums.div_(max(rest.tokens, 1.0)))
        else:
            cov = self._rest_cov(blocks, chosen, rest, space, budget)
            tokens = (chosen * rest.count).sum(-1).clamp_(min=1).view(-1, 1, 1)
            softmax.numerator.addcmul_(torch.bmm(query, cov), sums.div_(tokens))

    def _rest_cov(
        self, blocks: Tensor, chosen: Tensor, rest: _Rest, space: Workspace, budget: int
    ) -> Tensor:
        """``C_i = C - Σ_{j∉R_i} C_j`` of each row, ``[G, D, D]``, from the keys outside ``R_i``."""
        assert rest.cov is not None
        assert rest.centred is not None
        depth = rest.cov.shape[0]
        cov = rest.cov.repeat(blocks.numel(), 1, 1)
        other = ~chosen & (self.order.sizes > 0)
        other[:, rest.num_video :] = False
        entries = other.nonzero()[:, 1]
        where = positions(self.order.starts[entries], self.order.sizes[entries])
        index, padding = pad_rows(where, (other * self.order.sizes).sum(-1))
        piece = max(64, budget // (index.shape[0] * 2 * depth * cov.itemsize))
        for start in range(0, index.shape[1], piece):
            some = index[:, start : start + piece]
            keys = space.take("keys", some.numel(), depth)
            values = space.take("values", some.numel(), depth)
            torch.index_select(rest.centred, 0, some.reshape(-1), out=keys)
            torch.index_select(self.values, 0, some.reshape(-1), out=values)
            keys, values = keys.view(*some.shape, depth), values.view(*some.shape, depth)
            if padding is not None:
                keys.masked_fill_(padding[:, start : start + piece].unsqueeze(-1), 0.0)
            cov.baddbmm_(keys.transpose(1, 2), values, alpha=-1)
        return cov


def _rest_of(
    rest: RestTerms, batch: int, head: int, keys: Order, ordered: Tensor, space: Workspace
) -> _Rest:
    values = rest.v_mean[batch, head].to(ordered.dtype)
    means = rest.k_mean[batch, head].to(ordered.dtype)
    count = pick(rest.count, batch, head)
    half_var = None
    if rest.weight != "plain":
        assert rest.k_var is not None
        half_var = rest.k_var[batch, head].to(ordered.dtype) * 0.5
    cov = centred = None
    if rest.cov_sum is not None:
        cov = rest.cov_sum[batch, head].to(ordered.dtype)
        if rest.cov_scope == "rest":
            centred = space.take("centred", keys.tokens.numel(), ordered.shape[1])
            torch.sub(
                ordered[: keys.tokens.numel()], means.repeat_interleave(keys.sizes, 0), out=centred
            )
    return _Rest(
        means,
        values,
        count.to(ordered.dtype).log(),
        count.to(ordered.dtype),
        half_var,
        rest.weight == "second",
        cov,
        centred,
        float(count[: rest.num_video].sum()),
        rest.num_video,
    )


@torch.no_grad()
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code: Tensor,
    *,
    q_perm: Tensor,
    q_offsets: Tensor,
    k_perm: Tensor,
    k_offsets: Tensor,
    key_valid: Tensor | None,
    scale: float,
    rest: RestTerms | None,
) -> tuple[Tensor, Tensor]:
    work = working_dtype(q.dtype)
    batch, heads, length = q.shape[:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=work, device=q.device)
    space = Workspace(work, q.device)
    spaces = [Workspace(work, q.device) for _ in range(num_workers(q.device))]
    with run_tasks(len(spaces)) as run:
        for b in range(batch):
            for h in range(heads):
                tasks: list[Task] = []

                def prepare(b: int = b, h: int = h, tasks: list[Task] = tasks) -> None:
                    queries = order_of(q_perm, q_offsets, None, b, h)
                    keys = order_of(k_perm, k_offsets, key_valid, b, h)
                    head = _Head(k[b, h], v[b, h], pick(code, b, h), queries, keys, space)
                    if rest is not None:
                        head.rest = _rest_of(rest, b, h, keys, head.keys, space)
                    tasks += _tasks(head, q[b, h], scale, out[b, h], lse[b, h], spaces)

                run([prepare])
                run(tasks)
    return out, lse


def _tasks(
    head: _Head, q: Tensor, scale: float, out: Tensor, lse: Tensor, spaces: list[Workspace]
) -> list[Task]:
    """All query blocks of one head, those with as many keys together, in tasks of many chunks."""
    sizes = head.queries.sizes
    ids = sizes.nonzero().squeeze(-1)
    if ids.numel() == 0:
        return []
    ids = ids[sizes[ids].argsort(stable=True)]
    ids = ids[head.num_keys[ids].argsort(stable=True)]
    depth, item, longest = q.shape[-1], lse.itemsize, int(sizes.max())
    budget = WORKSPACE_BYTES // len(spaces)
    # for each key of a row: its logits and, gathered, itself and its value
    cost = (longest + 2 * depth) * item
    fixed = depth * longest  # the query; then the logits of the rest, and its C_i
    if head.rest is not None:
        fixed += 2 * head.rest.keys.shape[0] * longest
        fixed += depth * depth if head.rest.centred is not None else 0
    widths = [width + fixed // (longest + 2 * depth) for width in head.num_keys[ids].tolist()]

    def attend(blocks: Tensor, space: Workspace) -> None:
        where = positions(head.queries.starts[blocks], sizes[blocks])
        index, padding = pad_rows(head.queries.tokens[where], sizes[blocks])
        query = q.index_select(0, index.reshape(-1)).to(lse.dtype).mul_(scale)
        result, norm = head.attend(query.view(*index.shape, depth), blocks, space, budget)
        if padding is not None:
            index, result, norm = index[~padding], result[~padding], norm[~padding]
        out.index_copy_(0, index.reshape(-1), result.reshape(-1, depth).to(out.dtype))
        lse.index_copy_(0, index.reshape(-1), norm.reshape(-1))

    todo = deque(ids[first:last] for first, last in chunks(widths, cost, budget))

    def work(space: Workspace) -> None:
        while todo:
            try:
                blocks = todo.pop()  # the longest first, so that workers end together
            except IndexError:
                return
            attend(blocks, space)

    return [partial(work, space) for space in spaces[: len(todo)]]
