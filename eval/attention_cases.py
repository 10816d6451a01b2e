"""Block attention by plans that are already there, its plan by pooled scores, and the merge, as
`bench_kernels` times and checks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_accel import presets
from dit_accel.attend import attend, room_for_pairs
from dit_accel.cluster import KMeans
from dit_accel.eval.kernel_cases import Case, Shape
from dit_accel.eval.kernel_checks import IncorrectError, Problem, within
from dit_accel.kernels.block_attention import RestTerms, block_attention
from dit_accel.kernels.block_summary import block_summary
from dit_accel.kernels.merge import merge
from dit_accel.kernels.pooled_topk import pooled_topk
from dit_accel.method import Method
from dit_accel.rest import Drop, Rest
from dit_accel.state import State
from dit_accel.types import Context, Plan


def _clustered() -> Method:
    """``svg_ear`` without waiting for its first clusters to settle."""
    return replace(presets.svg_ear(density=0.22), layout=KMeans(first_iterations=6))


_PLANS: dict[str, Callable[[], Method]] = {
    "exact blocks alone": lambda: presets.pisa(density=0.15, rest="drop"),
    "with centroids": lambda: presets.pisa(density=0.15, rest="centroid"),
    "with the first-order term": lambda: presets.pisa(density=0.15),
    "with moments": lambda: presets.pisa(density=0.15, rest="moment"),
    "clusters, exact alone": lambda: replace(_clustered(), rest=Drop()),
    "clusters, with centroids": _clustered,
    "pooled levels": lambda: presets.psa(mode="topk", ratios=(0.05, 0.15, 0.25, 0.45)),
}
"""Whose plans are timed, with what stands in for the rest."""


def block_attention_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """What a plan asks for: keys and values in order, lists of tiles, and the kernel. Products are
    those of exact pairs; layout, statistics and the plan were made before."""
    q, k, v = parts
    for name, make in _PLANS.items():
        method, now = make(), Context(shape.context.geometry, state=State())
        trace = method.trace(q, k, v, now)
        assert isinstance(trace.plan, Plan)
        assert method.rest is not None
        share = trace.report.density
        pairs = room_for_pairs(trace.plan, q)

        def call(
            blocked: Any = trace.blocked,
            plan: Plan = trace.plan,
            rest: Rest = method.rest,
            now: Context = now,
            pairs: Tensor | None = pairs,
        ) -> Any:
            return attend(blocked, plan, rest, now, pairs)

        flops = 4 * shape.head_dim * shape.heads * shape.tokens**2 * share
        moved = 4 * q.numel() * q.element_size()
        del trace
        yield Case(name, call, flops, moved, note=f"density {share:.3f}")


def plan_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """PISA's choice among the means of blocks, which are there."""
    q, k, v = parts
    method, now = presets.pisa(density=0.15), Context(shape.context.geometry, state=State())
    assert method.route is not None
    route = method.route
    blocked = method.trace(q, k, v, now).blocked
    rows, columns = blocked.queries.num_video, blocked.keys.num_video
    products = 2.0 * shape.heads * rows * columns * shape.head_dim
    least = shape.heads * (4.0 * shape.head_dim * (rows + columns) + rows * columns)
    yield Case(f"{rows} x {columns}", lambda: route(blocked, Drop(), now), products, least)


def merge_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """Two partials of all tokens."""
    q, _, v = parts
    logs = [part[..., 0].float() for part in parts[:2]]
    least = 3.0 * (q.numel() * q.element_size() + logs[0].numel() * 4)
    yield Case("two partials", lambda: merge(q, logs[0], v, logs[1]), 0, least)


def check_block_attention(dtype: torch.dtype, depth: int, device: str) -> None:
    """At most twice the error of plain torch in this dtype, for every rest and with levels, on
    ragged blocks, with padding and without."""
    p = Problem(dtype, depth, device)
    draw = torch.rand(2, 3, p.blocks, p.blocks, generator=p.generator, device=device)
    code = (draw < 0.4).to(torch.int8) * 2 - 1
    code[:, :, 3] = -1
    code[:, 1] = 1
    pooled = torch.where(draw < 0.8, 2 ** (5 * draw).long().clamp(max=3), 0).to(torch.int8)
    ways = ((dtype, "auto"), (dtype, "reference"), (torch.float64, "reference"))
    for padded in (False, True):
        valid = p.valid if padded else None
        keys, values = (p.holes(p.k), p.holes(p.v)) if padded else (p.k, p.v)
        orders: dict[str, Any] = {
            **{"q_perm": p.perm, "q_offsets": p.offsets},
            **{"k_perm": p.perm.flip(-1), "k_offsets": p.offsets, "key_valid": valid},
        }
        for name, plan, levels in (
            *((rest, code, ()) for rest in ("drop", "plain", "taylor", "gaussian")),
            ("levels", pooled, (2, 4, 8)),
        ):
            found = []
            for kind, backend in ways:
                q, k, v = (x.to(kind) for x in (p.q, keys, values))
                terms = None if name in ("drop", "levels") else _terms(name, k, v, orders, p.blocks)
                found.append(
                    block_attention(
                        *(q, k, v, plan), rest=terms, levels=levels, backend=backend, **orders
                    )
                )
            for what, got, low, exact in zip(("out", "lse"), *found, strict=True):
                some = exact.isfinite()
                if not torch.equal(got.isfinite(), some):
                    raise IncorrectError(
                        f"block_attention {name} {what}: expected -inf where nothing is selected"
                    )
                error = float((low.double() - exact)[some].abs().max())
                floor = 2 * torch.finfo(dtype).eps * float(exact[some].abs().max())
                within(f"block_attention {name} {what}", got[some], exact[some], 2 * error + floor)


def _terms(kind: str, k: Tensor, v: Tensor, orders: dict[str, Any], blocks: int) -> RestTerms:
    found = block_summary(
        *(k, v),
        perm=orders["k_perm"],
        offsets=orders["k_offsets"],
        num_video=blocks,
        key_valid=orders["key_valid"],
        k_var=kind == "gaussian",
        cov=kind == "taylor",
        backend="reference",
    )
    return RestTerms(
        *(found.k_mean, found.v_mean, found.count),
        k_var=found.k_var if kind == "gaussian" else None,
        weight="gaussian" if kind == "gaussian" else "plain",
        cov_sum=found.cov_sum if kind == "taylor" else None,
        num_video=blocks,
    )


def check_plan(dtype: torch.dtype, depth: int, device: str) -> None:
    """What plain torch chooses in fp64, of scores that fp32 tells apart, ties and empty blocks
    among them; means are fp32 whatever is timed."""
    p = Problem(dtype, depth, device)
    queries, keys = (p.noise(2, 3, count, depth).round() for count in (70, 130))
    count = torch.randint(0, 3, (2, 1, 130), generator=p.generator, device=device)
    options: dict[str, Any] = {"rows": 68, "columns": 127, "scale": 0.125}
    for density in (0.05, 0.5):
        got = pooled_topk(queries, keys, count, None, density=density, **options)
        exact = pooled_topk(
            *(queries.double(), keys.double(), count, None),
            density=density,
            backend="reference",
            **options,
        )
        if not torch.equal(got, exact):
            raise IncorrectError(
                f"plan: expected fp64's choice, got {int((got != exact).sum())} others"
            )


def check_merge(dtype: torch.dtype, depth: int, device: str) -> None:
    """At most twice the error of plain torch in this dtype; rows that are empty on either side."""
    p = Problem(dtype, depth, device)
    logs = [3 * p.noise(2, 3, p.length) for _ in range(2)]
    empty = [torch.rand(2, 3, p.length, generator=p.generator, device=device) < 0.2 for _ in logs]
    logs = [log.masked_fill(none, -torch.inf) for log, none in zip(logs, empty, strict=True)]
    outs = [x.masked_fill(none.unsqueeze(-1), 0) for x, none in zip((p.q, p.k), empty, strict=True)]
    given = (outs[0], logs[0], outs[1], logs[1])
    got, low = merge(*given), merge(*given, backend="reference")
    exact = merge(*(x.double() for x in given), backend="reference")
    none = empty[0] & empty[1]
    if not torch.equal(got[1] == -torch.inf, none):
        raise IncorrectError("merge: expected -inf where both are empty, and nowhere else")
    for what, mine, theirs, wanted in zip(("out", "lse"), got, low, exact, strict=True):
        some = wanted.isfinite()
        error = float((theirs.double() - wanted)[some].abs().max())
        floor = torch.finfo(mine.dtype).eps * float(wanted[some].abs().max())
        within(f"merge {what}", mine[some], wanted[some], 2 * error + floor)


ATTENTION_CASES: dict[str, Callable[[Shape, tuple[Tensor, ...]], Iterator[Case]]] = {
    "block_attention": block_attention_cases,
    "plan": plan_cases,
    "merge": merge_cases,
}
ATTENTION_CHECKS: dict[str, Callable[[torch.dtype, int, str], None]] = {
    "block_attention": check_block_attention,
    "plan": check_plan,
    "merge": check_merge,
}
