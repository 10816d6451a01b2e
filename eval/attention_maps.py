"""What became of every pair of blocks in one attention call, and the error each left.

The output of a query is a sum of contributions, one a key block: ``c_nj = Σ_m p_nm v_m`` for the
true attention ``p``. A method puts ``ĉ_nj`` in its place: the same sum under its own normaliser for
an exact pair, one weight times a mean value for a block left to its rest, a few for a pooled one,
nothing for a dropped one. One that was kept is the sum of the step that computed it, by that step's
queries, keys and values, at the weight that it has in the merged softmax. The error that a pair
leaves is ``‖ĉ_nj − c_nj‖``, root mean square over the block's queries, over that of the whole
output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.eval.calls import Call
from dit_accel.kernels.rectangles import Rectangles, gather_blocks, rectangles, some_heads
from dit_accel.method import Method, Trace
from dit_accel.pipelines import media
from dit_accel.rest import Drop
from dit_accel.state import State
from dit_accel.types import EXACT, REST, Blocks, TokenPlan

KINDS: Final = (
    "dropped",
    "exact",
    "exact for some queries",
    "averaged by 2",
    "averaged by 4",
    "averaged by 8",
    "approximated",
    "cached",
)
"""What can become of a pair; a map holds indices into this."""
_POOLED: Final = {2: 3, 4: 4, 8: 5}
_CHUNK_BYTES: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Maps:
    """All heads of one attention call.

    Attributes:
        candidate, layer, step, branch: which call of which method.
        kind: uint8 ``[H, Nq, Nk]``, indices into `KINDS`.
        error: fp16 ``[H, Nq, Nk]``, the error each pair leaves.
        row: fp16 ``[H, Nq]``, relative error of each query block's output, everything included.
    """

    candidate: str
    layer: int
    step: int
    branch: str
    kind: Tensor
    error: Tensor
    row: Tensor


@torch.inference_mode()
def maps(
    candidate: str, method: Method, steps: Iterable[list[Call]], wanted: Collection[int]
) -> Iterator[Maps]:
    """Maps of the first guidance branch at some steps; batch element 0.

    Args:
        candidate: name of the method.
        method: what runs, with its memory from step to step.
        steps: calls of one layer, step by step.
        wanted: steps to map.
    """
    state = State()
    # by branch, the call that computed what is kept
    refreshed: dict[str, Call] = {}
    for group in steps:
        for number, call in enumerate(group):
            ctx = replace(call.ctx, state=state)
            if method.wants_all(ctx):
                continue
            # asked before the call, which may change the answer
            settled = getattr(method.rest, "settled", None)
            if settled is not None and not settled(ctx, call.q):
                refreshed.pop(ctx.branch, None)
            source = refreshed.get(ctx.branch)
            trace = method.trace(call.q, call.k, call.v, ctx, scale=call.scale)
            if settled is not None and source is None and settled(ctx, call.q):
                refreshed[ctx.branch] = call
            if number == 0 and ctx.step in wanted:
                yield _map(candidate, method, trace, call, source)


def _map(candidate: str, method: Method, trace: Trace, call: Call, source: Call | None) -> Maps:
    """``source`` is the call that computed what this one keeps; ``None`` where it keeps nothing."""
    blocked, ctx, cached = trace.blocked, call.ctx, source is not None
    heads = blocked.q.shape[1]
    kinds = _kinds(method, trace, cached)
    whole = getattr(method.rest, "computes_all", None)
    if whole is not None and not cached and trace.report.density == 1:
        kinds = torch.full_like(kinds, KINDS.index("exact"))
    errors, rows = zip(
        *(_errors(method, trace, call, source, h, kinds[h]) for h in range(heads)), strict=True
    )
    return Maps(
        candidate,
        ctx.layer,
        ctx.step,
        ctx.branch,
        kinds.cpu(),
        torch.stack(errors).half().cpu(),
        torch.stack(rows).half().cpu(),
    )


def _kinds(method: Method, trace: Trace, cached: bool) -> Tensor:
    """uint8 ``[H, Nq, Nk]`` of batch element 0."""
    plan, blocked = trace.plan, trace.blocked
    heads = blocked.q.shape[1]
    inner = getattr(method.rest, "inner", method.rest)
    left = "dropped" if isinstance(inner, Drop) else "approximated"
    left_kind = KINDS.index("cached" if cached else left)
    if isinstance(plan, TokenPlan):
        select = plan.select.expand(1, heads, -1, -1)[0].float()
        share = _by_block(select, blocked.queries)
        kind = torch.full(share.shape, KINDS.index("exact for some queries"), dtype=torch.uint8)
        kind[share == 0] = left_kind
        kind[share == 1] = KINDS.index("exact")
        return kind
    code = plan.code.expand(plan.code.shape[0], heads, -1, -1)[0].cpu()
    kind = torch.zeros(code.shape, dtype=torch.uint8)
    kind[code == EXACT] = KINDS.index("exact")
    kind[code == REST] = left_kind
    if cached:
        kind[code == 0] = left_kind
    for level, index in _POOLED.items():
        kind[code == level] = index
    return kind


def _by_block(x: Tensor, blocks: Blocks) -> Tensor:
    """Means over each block's tokens: ``[H, L, N]`` to ``[H, Nq, N]``, on the CPU."""
    found = []
    for h in range(x.shape[0]):
        pick = h if blocks.perm.shape[1] > 1 else 0
        cut = h if blocks.offsets.shape[1] > 1 else 0
        sizes = blocks.offsets[0, cut].long().diff()
        row = torch.repeat_interleave(sizes, output_size=x.shape[1])
        total = x.new_zeros(len(sizes), x.shape[2])
        total.index_add_(0, row, x[h, blocks.perm[0, pick]])
        found.append(total / sizes.clamp(min=1).unsqueeze(1))
    return torch.stack(found).cpu()


def _errors(
    method: Method, trace: Trace, call: Call, source: Call | None, head: int, kind: Tensor
) -> tuple[Tensor, Tensor]:
    """``error`` ``[Nq, Nk]`` and ``row`` ``[Nq]`` of one head."""
    blocked = trace.blocked
    work = call.out.dtype
    this = slice(head, head + 1)
    valid = blocked.geometry.key_valid
    columns = rectangles(
        blocked.keys.perm[:1],
        blocked.keys.offsets[:1],
        None if valid is None else valid[:1],
    )
    keys, values = _blocks(call, columns, this)
    before = None if source is None else _blocks(source, columns, this)
    keep = some_heads(columns.keep, this)[0, 0]
    true = call.out[0, head]
    got = trace.partial.out[0, head].to(work)
    norm = true.square().sum(-1).mean().sqrt().clamp(min=1e-30)
    pooled = {level: _pool(keys, values, keep, level) for level in _POOLED}
    stand_in = _stand_in(method)
    perm = blocked.queries.perm[0, head if blocked.queries.perm.shape[1] > 1 else 0]
    cut = blocked.queries.offsets[0, head if blocked.queries.offsets.shape[1] > 1 else 0]
    cut = cut.long()
    row_of = torch.repeat_interleave(cut.diff(), output_size=len(perm))
    count, width, depth = keys.shape
    square = true.new_zeros(cut.numel() - 1, count)
    row_error, row_size = true.new_zeros(cut.numel() - 1), true.new_zeros(cut.numel() - 1)
    row_error.index_add_(0, row_of, (got - true)[perm].square().sum(-1))
    row_size.index_add_(0, row_of, true[perm].square().sum(-1))
    step = max(1, _CHUNK_BYTES // (count * (2 * width + 3 * depth) * keys.itemsize))
    for first in range(0, len(perm), step):
        tokens, rows = perm[first : first + step], row_of[first : first + step]
        query = blocked.q[0, head, tokens].to(work)
        logits = (query * blocked.scale) @ keys.mT  # [Nk, n, m]
        logits = logits.masked_fill(~keep.unsqueeze(1), -torch.inf)
        truth = (logits - call.lse[0, head, tokens, None]).exp() @ values  # [Nk, n, D]
        lse = trace.partial.lse[0, head, tokens].to(work)
        exact = (logits - lse[:, None]).exp() @ values
        left = exact.new_zeros(exact.shape)
        if source is not None and before is not None:
            old = (source.q[0, head, tokens].to(work) * blocked.scale) @ before[0].mT
            old = old.masked_fill(~keep.unsqueeze(1), -torch.inf)
            left = (old - lse[:, None]).exp() @ before[1]
        elif stand_in is not None:
            left = _rest_of(stand_in, trace, query, head, lse)
        if isinstance(trace.plan, TokenPlan):
            select = trace.plan.select[0, head if trace.plan.select.shape[1] > 1 else 0, tokens]
            made = torch.where(select.mT.unsqueeze(-1), exact, left)
        else:
            code = kind[rows.cpu()].to(exact.device).mT  # [Nk, n]
            made = torch.where((code == KINDS.index("exact")).unsqueeze(-1), exact, left)
            for level, index in _POOLED.items():
                if bool((code == index).any()):
                    mean_k, mean_v, log_number = pooled[level]
                    weight = (query * blocked.scale) @ mean_k.mT + log_number.unsqueeze(1)
                    part = (weight - lse[:, None]).exp() @ mean_v
                    made = torch.where((code == index).unsqueeze(-1), part, made)
        square.index_add_(0, rows, (made - truth).square().sum(-1).mT)
    error = (square / cut.diff().clamp(min=1).unsqueeze(1)).sqrt() / norm
    return error.cpu(), (row_error / row_size.clamp(min=1e-30)).sqrt().cpu()


def _blocks(call: Call, columns: Rectangles, head: slice) -> tuple[Tensor, Tensor]:
    """Keys and values ``[Nk, m, D]`` of one head of batch element 0, zero where not valid."""
    keys, values = (
        gather_blocks(x[:1], columns, head, call.out.dtype)[0, 0] for x in (call.k, call.v)
    )
    return keys, values


def _stand_in(method: Method) -> object | None:
    """The rest whose weights stand in for a block; ``None`` where nothing does."""
    inner = getattr(method.rest, "inner", method.rest)
    return None if isinstance(inner, Drop) else inner


def _rest_of(rest: object, trace: Trace, query: Tensor, head: int, lse: Tensor) -> Tensor:
    """``[Nk, n, D]``: what stands in for every block, the first-order term excluded."""
    blocked = trace.blocked
    heads = blocked.q.shape[1]
    queries = query.expand(blocked.q.shape[0], heads, -1, -1)
    logs = rest.log_weight(blocked, queries)[0, head]  # type: ignore[attr-defined]
    summary = blocked.summary()
    number = summary.count[0, head if summary.count.shape[1] > 1 else 0].to(query.dtype)
    weight = (logs - lse[:, None]).exp() * number  # [n, Nk]
    return weight.mT.unsqueeze(-1) * summary.v_mean[0, head].to(query.dtype).unsqueeze(1)


def _pool(keys: Tensor, values: Tensor, keep: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of ``level`` valid keys of each block: means ``[Nk, g, D]``, and log of their number.

    Valid keys go first, as the kernels have it.
    """
    order = keep.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    width = -(-keep.shape[1] // level) * level
    pad = width - keep.shape[1]
    kept = torch.nn.functional.pad(keep.gather(1, order), (0, pad))
    number = kept.view(len(keep), -1, level).sum(-1)
    means = []
    for part in (keys, values):
        rows = part.gather(1, order.unsqueeze(-1).expand(part.shape))
        rows = torch.nn.functional.pad(rows, (0, 0, 0, pad))
        total = rows.view(len(keep), -1, level, part.shape[-1]).sum(2)
        means.append(total / number.clamp(min=1).unsqueeze(-1))
    return means[0], means[1], number.to(keys.dtype).log()


def file_of(folder: Path, candidate: str) -> Path:
    """Where a candidate's maps lie."""
    return folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', candidate)}.safetensors"


def save(made: Iterable[Maps], folder: Path) -> None:
    """Write all maps of one candidate, whole or not at all; nothing where there is none."""
    tensors: dict[str, Tensor] = {}
    told = []
    candidate = ""
    for one in made:
        candidate = one.candidate
        told.append({"layer": one.layer, "step": one.step, "branch": one.branch})
        for name in ("kind", "error", "row"):
            tensors[f"{len(told) - 1}.{name}"] = getattr(one, name).contiguous()
    if not told:
        return
    metadata = {"maps": json.dumps({"candidate": candidate, "calls": told})}
    media.replace_with(
        file_of(folder, candidate), lambda part: save_file(tensors, part, metadata=metadata)
    )


def load(path: Path) -> list[Maps]:
    """Read what `save` wrote."""
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["maps"])
        return [
            Maps(
                told["candidate"],
                call["layer"],
                call["step"],
                call["branch"],
                *(file.get_tensor(f"{i}.{name}") for name in ("kind", "error", "row")),
            )
            for i, call in enumerate(told["calls"])
        ]
