"""A picture of what each method computes, and how: one panel a method, queries down, keys across.

Every panel is one head of one layer at one denoising step, in the order of the method's layout, so
that a block of queries and a block of keys make a rectangle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.eval.calls import Call
from dit_accel.flashblock import KeptRest
from dit_accel.layout import Blocked, Gilbert, Layout
from dit_accel.method import Method
from dit_accel.pyramid import pooled_pairs
from dit_accel.rest import Drop
from dit_accel.state import State
from dit_accel.types import EXACT, REST, Blocks, Plan, TokenPlan

PIXELS: Final = 576
"""Height and width of a panel's map."""

# Dark is more work; hues that stay apart for red-green blindness too.
KINDS: Final = {
    "exact": (8, 48, 107),
    "mean of 2 keys": (49, 130, 189),
    "mean of 4 keys": (127, 184, 218),
    "mean of 8 keys": (198, 219, 239),
    "stand-in of the rest": (246, 207, 120),
    "kept from an earlier step": (221, 160, 196),
    "left out": (240, 240, 240),
}
"""What becomes of a pair, and its colour."""
_NAMES: Final = tuple(KINDS)
_LEVELS: Final = {2: 1, 4: 2, 8: 3}
_STAND_IN, _KEPT, _LEFT_OUT = 4, 5, 6


@dataclass(frozen=True, slots=True)
class Panel:
    """One method's map.

    Attributes:
        name: of the method.
        layout: its order and blocks, in words.
        kinds: uint8 ``[PIXELS, PIXELS]``, positions in `KINDS`.
        density: pairs computed exactly over all pairs, measured.
        pooled: pooled keys read over all pairs; 0 for methods that pool none.
        error: relative error of the output to dense attention, Frobenius norms.
    """

    name: str
    layout: str
    kinds: Tensor
    density: float
    pooled: float
    error: float


def panels(methods: Mapping[str, Method], captured: Mapping[int, Call]) -> list[Panel]:
    """Run methods over the captured steps, in order, and map the last one.

    Args:
        methods: by the name to show.
        captured: by denoising step, from `dit_accel.eval.calls.take`; methods with memory see
            all of them.

    Raises:
        InputError: a method is dense at the last step.
    """
    steps = sorted(captured)
    found = []
    for name, method in methods.items():
        if method.wants_all(captured[steps[-1]].ctx):
            raise InputError(f"plan: expected a method that is sparse at step {steps[-1]}: {name}")
        state = State()
        for step in steps:
            call = captured[step]
            ctx = replace(call.ctx, state=state)
            if method.wants_all(ctx):
                continue
            trace = method.trace(call.q, call.k, call.v, ctx, scale=call.scale)
        error = float((trace.partial.out - call.out).norm() / call.out.norm())
        assert method.layout is not None
        keeps = isinstance(method.rest, KeptRest) and method.rest.cycle.applies(call.ctx)
        absent = isinstance(method.rest, Drop)
        rest = _KEPT if keeps else _LEFT_OUT if absent else _STAND_IN
        found.append(
            Panel(
                name,
                _in_words(method.layout, trace.blocked, trace.plan),
                _kinds(trace.blocked, trace.plan, rest, keeps),
                trace.report.density,
                _pooled(trace.blocked, trace.plan),
                error,
            )
        )
    return found


def _in_words(layout: Layout, blocked: Blocked, plan: Plan | TokenPlan) -> str:
    name = type(getattr(layout, "inner", layout)).__name__.lower()
    rows = blocked.q.shape[2] if isinstance(plan, TokenPlan) else blocked.queries.num_blocks
    unit = " tokens" if isinstance(plan, TokenPlan) else ""
    return f"{name}, {rows:,}{unit} by {blocked.keys.num_blocks} blocks"


def _at(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """For every pixel of an axis: the position in the order, and the block."""
    offsets = blocks.offsets[0, 0].long()
    place = (torch.arange(PIXELS) * 2 + 1) * int(offsets[-1]) // (2 * PIXELS)
    return place, torch.searchsorted(offsets[1:].contiguous(), place, right=True)


def _kinds(blocked: Blocked, plan: Plan | TokenPlan, rest: int, keeps: bool) -> Tensor:
    (place, rows), (_, columns) = _at(blocked.queries), _at(blocked.keys)
    if isinstance(plan, TokenPlan):
        tokens = blocked.queries.perm[0, 0][place]
        chosen = plan.select[0, 0][tokens][:, columns]
        return torch.where(chosen, 0, rest).to(torch.uint8)
    code = plan.code[0, 0][rows][:, columns]
    kinds = torch.full(code.shape, rest if keeps else _LEFT_OUT, dtype=torch.uint8)
    kinds[code == EXACT] = 0
    kinds[code == REST] = rest
    for level, kind in _LEVELS.items():
        kinds[code == level] = kind
    return kinds


def _pooled(blocked: Blocked, plan: Plan | TokenPlan) -> float:
    if isinstance(plan, TokenPlan):
        return 0.0
    every = blocked.q.shape[2] * int(blocked.summary().count[0, 0].sum())
    return int(pooled_pairs(blocked, plan)[0, 0]) / every


def attention_map(captured: Call, layout: Layout | None = None) -> Tensor:
    """How much attention falls on each pixel: shares of a query over what an even one would give.

    Args:
        captured: one call.
        layout: of the order; a Hilbert curve by default.

    Returns:
        fp32 ``[PIXELS, PIXELS]``, 1 where attention is what it would be if it were even.
    """
    q, k = captured.q, captured.k
    blocked = (layout or Gilbert(1))(q, k, captured.v, captured.ctx)
    order = blocked.keys.perm[0, 0]
    place, _ = _at(blocked.queries)
    logits = q[0, 0][blocked.queries.perm[0, 0][place]] @ k[0, 0][order].mT * blocked.scale
    valid = captured.ctx.geometry.key_valid
    if valid is not None:
        logits = logits.masked_fill(~valid[0][order], -torch.inf)
    share = logits.softmax(-1) * logits.shape[-1]
    if share.shape[-1] < PIXELS:
        return share[:, place]
    return torch.nn.functional.adaptive_avg_pool1d(share, PIXELS)


# --- drawing --------------------------------------------------------------------------------------

_WIDE, _MARGIN, _GAP, _HEAD, _FOOT = 3, 24, 24, 92, 112
_PAPER, _INK, _GREY, _LINE = (255, 255, 255), (24, 24, 24), (96, 96, 96), (150, 150, 150)
_FAINT, _DEEP = (255, 255, 255), (20, 20, 20)
_SPAN = 6.0
"""Doublings of the even share between the faintest and the deepest grey, half of them below it."""


def draw(dense: Tensor, shown: Sequence[Panel], caption: str) -> Image.Image:
    """Panels on one sheet, dense attention first, with a legend; made to be shown at half size.

    Args:
        dense: from `attention_map`.
        shown: from `panels`.
        caption: one line below.
    """
    rows = -(-(len(shown) + 1) // _WIDE)
    width = 2 * _MARGIN + _WIDE * PIXELS + (_WIDE - 1) * _GAP
    height = _MARGIN + rows * (_HEAD + PIXELS + _GAP) + _FOOT
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(34), ImageFont.load_default(26)

    def place(number: int) -> tuple[int, int]:
        row, column = divmod(number, _WIDE)
        return _MARGIN + column * (PIXELS + _GAP), _MARGIN + row * (_HEAD + PIXELS + _GAP)

    def panel(number: int, picture: Image.Image, title: str, aside: str, below: str) -> None:
        x, y = place(number)
        pen.text((x, y + 40), title, _INK, large, anchor="ls")
        pen.text((x + PIXELS, y + 40), aside, _GREY, small, anchor="rs")
        pen.text((x, y + 78), below, _INK, small, anchor="ls")
        sheet.paste(picture, (x, y + _HEAD))
        pen.rectangle((x - 1, y + _HEAD - 1, x + PIXELS, y + _HEAD + PIXELS), outline=_LINE)

    grey = ((dense.clamp(min=1e-9).log2() + _SPAN / 2) / _SPAN).clamp(0, 1).unsqueeze(-1)
    shade = torch.tensor(_FAINT) + grey * (torch.tensor(_DEEP) - torch.tensor(_FAINT))
    panel(0, _image(shade), "attention", "gilbert", "darker is more, by its logarithm")
    colours = torch.tensor(list(KINDS.values()))
    for number, one in enumerate(shown, start=1):
        more = f" + {one.pooled:.2f} pooled" if one.pooled else ""
        below = f"density {one.density:.2f}{more}, error {one.error:.3f}"
        panel(number, _image(colours[one.kinds.long()]), one.name, one.layout, below)

    used = {int(kind) for one in shown for kind in one.kinds.unique()}
    x, y = _MARGIN, height - _FOOT
    for kind in sorted(used):
        pen.rectangle((x, y, x + 28, y + 28), fill=KINDS[_NAMES[kind]], outline=_LINE)
        pen.text((x + 38, y + 24), _NAMES[kind], _INK, small, anchor="ls")
        x += 38 + round(pen.textlength(_NAMES[kind], small)) + 34
    pen.text((_MARGIN, y + 74), caption, _GREY, small, anchor="ls")
    return sheet


def _image(rgb: Tensor) -> Image.Image:
    return Image.fromarray(rgb.round().to(torch.uint8).numpy())
