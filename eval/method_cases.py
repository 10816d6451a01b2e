"""Whole attention calls of methods, as `bench_kernels` times them: layout, route and the order
restored, and what is kept from the step before where a method keeps something."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from dit_accel import presets
from dit_accel.eval.kernel_cases import Case, Shape, inputs
from dit_accel.kernels.block_attention import groups
from dit_accel.kernels.dense_attention import dense_attention
from dit_accel.method import Method
from dit_accel.pyramid import pooled_pairs
from dit_accel.state import State
from dit_accel.types import Context, Geometry, Plan

METHODS: dict[str, Callable[[], Method]] = {
    "pisa": lambda: presets.pisa(density=0.15),
    "pisa, 64 queries a block": lambda: presets.pisa(density=0.15, block_q=64),
    "pisa, moment": lambda: presets.pisa(density=0.15, rest="moment"),
    "pisa, drop": lambda: presets.pisa(density=0.15, rest="drop"),
    "svg_ear": lambda: presets.svg_ear(density=0.22),
    "psa, work 0.15": lambda: presets.psa(mode="topk", ratios=(0.05, 0.15, 0.25, 0.45)),
    "psa, 4-step": lambda: presets.psa(mode="topk"),
    "psa, wan-14b": lambda: presets.psa(),
    "vmoba": lambda: presets.vmoba(threshold=0.25),
    "flashblock": lambda: presets.flashblock(inner="pisa", density=0.15),
}
"""The settings that are timed. PSA's ranks compute as much as a density of 0.15, means counted as
keys: 0.05 + 0.1 / 2 + 0.1 / 4 + 0.2 / 8; those of its paper's 4-step models 0.156; its thresholds
whatever the inputs make of them."""
_FULL: dict[str, Callable[[], Method]] = {
    "pisa": lambda: presets.pisa(density=1.0),
    "pisa, moment": lambda: presets.pisa(density=1.0, rest="moment"),
    "svg_ear": lambda: presets.svg_ear(density=1.0),
    "psa": lambda: presets.psa(ratios=(1.0, 1.0, 1.0, 1.0)),
    "vmoba": lambda: presets.vmoba(threshold=1.0),
    "flashblock": lambda: presets.flashblock(inner="pisa", density=0.15),
}
_LAYERS = {"vmoba": (0, 1, 2)}
"""Layers that a method treats differently; one of any other."""


def method_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """Every method, in a step after its first, with its density and its error to dense."""
    q, k, v = parts
    exact = dense_attention(q, k, v).float()
    pairs = 4.0 * q.shape[1] * q.shape[2] ** 2 * q.shape[3]
    moved = 4.0 * q.numel() * q.element_size()
    for name, make in METHODS.items():
        for layer in _LAYERS.get(name, (0,)):
            method, state = make(), State()

            def context(step: int, layer: int = layer, state: State = state) -> Context:
                where = shape.context.geometry
                return Context(where, step=step, num_steps=50, layer=layer, state=state)

            method(q, k, v, context(0))
            out, report = method(q, k, v, context(1))
            error = float((out.float() - exact).norm() / exact.norm())
            density = report.density
            work = _work(method, parts, context(1)) if name.startswith("psa") else ""
            del out
            yield Case(
                f"{name}{f', layer {layer}' if name in _LAYERS else ''}",
                lambda method=method, now=context(1): method(q, k, v, now),  # type: ignore[misc]
                pairs * density,
                moved,
                f"density {density:.3f}{work}, error {error:.3f}",
            )


def head_group_cases(shape: Shape, parts: tuple[Tensor, ...]) -> Iterator[Case]:
    """``pisa`` as it runs, some heads at a time where their copies take much memory, and with all
    heads at once."""
    q, k, v = parts
    method, now = presets.pisa(density=0.15), Context(shape.context.geometry, state=State())
    pairs = 4.0 * q.shape[1] * q.shape[2] ** 2 * q.shape[3]

    def call(most: float) -> Tensor:
        before, groups.COPY_BYTES = groups.COPY_BYTES, most
        try:
            return method(q, k, v, now)[0]
        finally:
            groups.COPY_BYTES = before

    usual = groups.COPY_BYTES
    count = sum(1 for _ in groups.groups_of(k))
    wanted, got = call(usual), call(math.inf)
    same = "the same bits" if torch.equal(wanted, got) else "other bits"
    density = method(q, k, v, now)[1].density
    del wanted, got
    for name, most, note in (
        (f"groups of heads: {count}", usual, ""),
        ("all heads at once", math.inf, same),
    ):
        yield Case(
            name,
            lambda most=most: call(most),  # type: ignore[misc]
            pairs * density,
            4.0 * q.numel() * q.element_size(),
            note,
        )


def check_head_groups(dtype: torch.dtype, depth: int, device: str) -> None:
    """`check_methods` of what `head_group_cases` times."""
    check_methods(dtype, depth, device, ("pisa",))


def _work(method: Method, parts: tuple[Tensor, ...], ctx: Context) -> str:
    """Keys and means that queries meet, over what dense attention computes."""
    q, k, v = parts
    trace = method.trace(q, k, v, ctx)
    assert isinstance(trace.plan, Plan)
    pairs = trace.report.exact_pairs + pooled_pairs(trace.blocked, trace.plan)
    return f", with means {float(pairs.sum() / trace.report.all_pairs.sum()):.3f}"


def check_methods(
    dtype: torch.dtype, depth: int, device: str, names: Collection[str] | None = None
) -> None:
    """At full density every method is dense attention, within twice the error of dense attention
    in this dtype, on ragged blocks beside text and padding; all of them, or some.

    Raises:
        AssertionError: one is not.
    """
    shape = Shape((5, 9, 13), 2, 12, depth)
    q, k, v = (x.expand(2, -1, -1, -1) for x in inputs(shape, dtype, device, seed=1))
    valid = torch.ones(2, shape.tokens, dtype=torch.bool, device=device)
    valid[1, -5:] = False
    video = math.prod(shape.grid)
    where = Geometry(shape.grid, slice(video, shape.tokens), valid)
    exact = dense_attention(q.double(), k.double(), v.double(), key_valid=valid)
    low = dense_attention(q, k, v, key_valid=valid)
    bound = 2 * float((low - exact).abs().max()) + 4 * torch.finfo(dtype).eps
    for name, make in _FULL.items():
        if names is not None and name not in names:
            continue
        for layer in _LAYERS.get(name, (0,)):
            out, _ = make()(q, k, v, Context(where, layer=layer, state=State()))
            worst = float((out - exact).abs().max())
            if not worst <= bound:
                raise AssertionError(
                    f"{name}: expected dense attention within {bound:.2g}, got {worst:.2g}"
                )
