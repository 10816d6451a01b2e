"""What a method does to the output of attention, on calls of which the dense output is known.

Beside the size of the error stands what tells harmless errors from harmful ones. Write
``e = ô − o`` for a method's output ``ô`` and the dense ``o``.

- *Shrinkage or noise*: ``gain`` is what ``o`` is multiplied by on the whole (the projection of
  ``ô`` on ``o``), ``along`` the share of the error's energy in the direction of each token's own
  output.
- *Bias or variance*: ``common``, the share of energy that is the same for all tokens;
  ``step_cosine``, between the errors of successive denoising steps; ``persistent``, the share of
  energy left after averaging over the steps. What persists adds up along the trajectory as ``n``,
  what does not as ``√n``.
- *Guidance*: it takes ``g·cond − (g−1)·uncond``. An error that both branches share passes once, one
  that they do not is multiplied by up to ``2g − 1``. ``branch_cosine`` and ``guided`` tell which.
- *The first-order term*: how much of the global ``C`` belongs to blocks that are computed exactly
  anyway (``selected``), how well the term points at what the zeroth order leaves
  (``term_cosine``), and how large it is beside that (``term_size``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dit_accel.attend import attend, direct
from dit_accel.eval.calls import Call
from dit_accel.kernels.rectangles import gather_blocks, rectangles
from dit_accel.layout import Blocked
from dit_accel.method import Method, Trace
from dit_accel.rest import Moment, Taylor
from dit_accel.state import State
from dit_accel.types import EXACT, Context, Plan


@dataclass(frozen=True, slots=True)
class CallError:
    """One call of one method.

    Attributes:
        layer, step, branch: which call.
        density: pairs computed exactly over all pairs.
        mass: share of the true attention on the pairs computed exactly, mean over the queries.
        error: ``‖e‖ / ‖o‖``, Frobenius over all heads.
        head_errors: the same by head, over the batch.
        cosine: between ``ô`` and ``o``, mean over tokens and heads.
        gain: ``⟨ô, o⟩ / ⟨o, o⟩``; 1 without shrinkage.
        along: share of ``‖e‖²`` in the direction of each token's own ``o``.
        common: share of ``‖e‖²`` that is the same for all tokens of a head.
        step_cosine: with the error of the step before, same branch; ``None`` if that was not
            measured.
        branch_cosine: with the error of the other guidance branch at this step.
        guided: ``‖g e_c − (g−1) e_u‖`` over the root mean square of ``‖e_c‖`` and ``‖e_u‖``.
        selected: ``‖Σ_S C_j‖ / ‖Σ C_j‖`` over the blocks ``S`` that a row computes exactly, mean
            over the rows; ``None`` where the rest has no first-order term.
        term_cosine, term_size: of the first-order term to what the zeroth order leaves.
    """

    layer: int
    step: int
    branch: str
    density: float
    mass: float
    error: float
    head_errors: tuple[float, ...]
    cosine: float
    gain: float
    along: float
    common: float
    step_cosine: float | None = None
    branch_cosine: float | None = None
    guided: float | None = None
    selected: float | None = None
    term_cosine: float | None = None
    term_size: float | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """One method on the calls of one layer.

    Attributes:
        calls: one by one, in the order of the steps.
        persistent: share of the error's energy that is left when it is averaged over the steps,
            ``‖mean_s e_s‖² / mean_s ‖e_s‖²``, mean over the branches; ``1/n`` for ``n`` independent
            errors. ``None`` for a single step.
        steps: how many there were.
    """

    calls: tuple[CallError, ...]
    persistent: float | None
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


COLUMNS = (
    "density",
    "mass",
    "error",
    "cosine",
    "gain",
    "along",
    "common",
    "step_cosine",
    "branch_cosine",
    "guided",
    "selected",
    "term_cosine",
    "term_size",
)
"""The numbers of a call that have a mean."""


@torch.inference_mode()
def replay(method: Method, steps: Iterable[list[Call]], guidance: float = 1.0) -> Replay:
    """Run a method on calls that were captured, with its memory from step to step.

    Args:
        method: what runs; dense calls of its schedule count as such.
        steps: the calls of one layer, the branches of each step together, the conditional one
            first.
        guidance: ``g``.
    """
    state = State()
    calls: list[CallError] = []
    before: dict[str, tuple[int, Tensor]] = {}
    sums: dict[str, Tensor] = {}
    energy: dict[str, float] = {}
    count = 0
    for group in steps:
        count += 1
        errors: list[Tensor] = []
        measured: list[CallError] = []
        for call in group:
            one, error = _measure(method, call, state)
            ctx = call.ctx
            last = before.get(ctx.branch)
            if last is not None and last[0] == ctx.step - 1:
                one = replace(one, step_cosine=_cosine(error, last[1]))
            before[ctx.branch] = ctx.step, error
            sums[ctx.branch] = sums[ctx.branch] + error if ctx.branch in sums else error
            energy[ctx.branch] = energy.get(ctx.branch, 0.0) + _square(error)
            errors.append(error)
            measured.append(one)
        if len(group) == 2:
            conditional, other = errors
            guided = guidance * conditional - (guidance - 1) * other
            size = (0.5 * (_square(conditional) + _square(other))) ** 0.5
            measured = [
                replace(
                    one,
                    branch_cosine=_cosine(conditional, other),
                    guided=_square(guided) ** 0.5 / size if size else None,
                )
                for one in measured
            ]
        calls += measured
    shares = [
        _square(sums[branch]) / count / energy[branch] for branch in sums if energy[branch] > 0
    ]
    return Replay(tuple(calls), fmean(shares) if shares and count > 1 else None, count)


def _measure(method: Method, call: Call, state: State) -> tuple[CallError, Tensor]:
    """A call's numbers, and its error ``[B, H, L, D]`` in fp32."""
    ctx = replace(call.ctx, state=state)
    term: _Term = (None, None, None)
    if method.wants_all(ctx):
        got, _ = method(call.q, call.k, call.v, ctx, scale=call.scale)
        density = mass = 1.0
    else:
        trace = method.trace(call.q, call.k, call.v, ctx, scale=call.scale)
        got, density = trace.partial.out, trace.report.density
        mass = covered(trace, call, ctx)
        term = _first_order(method, trace, call, ctx)
    true = call.out
    error = got.to(true.dtype) - true
    by_head = (0, 2, 3)
    energy, size = error.square().sum(by_head), true.square().sum(by_head)
    dot = (error * true).sum(-1)
    total = max(float(energy.sum()), 1e-300)
    along = (dot.square() / true.square().sum(-1).clamp(min=1e-30)).sum()
    common = error.mean(2).square().sum() * error.shape[2]
    cosine = torch.nn.functional.cosine_similarity(got.to(true.dtype), true, dim=-1)
    one = CallError(
        layer=ctx.layer,
        step=ctx.step,
        branch=ctx.branch,
        density=density,
        mass=mass,
        error=float((energy.sum() / size.sum()).sqrt()),
        head_errors=tuple((energy / size).sqrt().tolist()),
        cosine=float(cosine.mean()),
        gain=1 + float(dot.sum() / size.sum()),
        along=float(along) / total,
        common=float(common) / total,
        selected=term[0],
        term_cosine=term[1],
        term_size=term[2],
    )
    return one, error


def covered(trace: Trace, call: Call, ctx: Context) -> float:
    """Share of the true attention that falls on the pairs a plan computes, mean over queries."""
    partial = direct(trace.blocked, trace.plan, ctx)
    return float((partial.lse.to(call.lse.dtype) - call.lse).exp().clamp(max=1).mean())


_Term = tuple[float | None, float | None, float | None]


def _first_order(method: Method, trace: Trace, call: Call, ctx: Context) -> _Term:
    """``selected``, ``term_cosine`` and ``term_size`` of a rest with a first-order term."""
    rest = method.rest
    if not isinstance(rest, Taylor | Moment) or rest.taylor is None:
        return None, None, None
    plain = attend(trace.blocked, trace.plan, replace(rest, taylor=None), ctx).out
    term = trace.partial.out.to(call.out.dtype) - plain
    left = call.out - plain
    size = _square(left) ** 0.5
    share = selected_share(trace.blocked, trace.plan) if isinstance(trace.plan, Plan) else None
    return share, _cosine(term, left), _square(term) ** 0.5 / size if size else None


def selected_share(blocked: Blocked, plan: Plan) -> float:
    """``‖Σ_S C_j‖_F / ‖Σ C_j‖_F`` over the video blocks ``S`` that a row computes, mean over rows.

    ``C_j = Σ_n (k_n − k̄_j) v_nᵀ``, as in PISA (arXiv 2602.01077).
    """
    keys, rows = blocked.keys, blocked.queries.num_video
    batch, heads = blocked.k.shape[:2]
    summary = blocked.summary()
    valid = blocked.geometry.key_valid
    columns = rectangles(keys.perm, keys.offsets, valid)
    code = plan.code.expand(batch, heads, -1, -1)[:, :, :rows, : keys.num_video]
    shares = []
    for h in range(heads):
        this = slice(h, h + 1)
        # [B, Nk, m, D] of one head; what is not kept is zero in the values
        k, v = (
            gather_blocks(x, columns, this, summary.k_mean.dtype)[:, 0]
            for x in (blocked.k, blocked.v)
        )
        spread = k - summary.k_mean[:, h].unsqueeze(2)
        blocks = (spread.mT @ v)[:, : keys.num_video].flatten(2)  # [B, Nk, D * D]
        whole = blocks.sum(1).norm(dim=-1).clamp(min=1e-30)
        exact = (code[:, h] == EXACT).to(blocks.dtype)
        shares.append(((exact @ blocks).norm(dim=-1) / whole.unsqueeze(1)).mean())
    return float(torch.stack(shares).mean())


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def _cosine(a: Tensor, b: Tensor) -> float | None:
    scale = (_square(a) * _square(b)) ** 0.5
    return float((a.double() * b.double()).sum()) / scale if scale else None


def means(calls: Iterable[CallError]) -> dict[str, float | None]:
    """Means of `COLUMNS` over calls; ``None`` for a column that none of them has.

    A column is averaged over the calls that have it.
    """
    listed = list(calls)
    found: dict[str, float | None] = {}
    for name in COLUMNS:
        values = [value for call in listed if (value := getattr(call, name)) is not None]
        found[name] = fmean(values) if values else None
    return found
