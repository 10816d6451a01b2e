"""Queries, keys and values of a real generation, in memory or on disk.

A generation runs densely, and the attention calls that were chosen are taken as they come, with the
dense output beside them: the reference of everything measured on them later. On disk each is a
safetensors file.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.attend import attend
from dit_accel.errors import InputError
from dit_accel.layout import Raster, default_scale
from dit_accel.method import Method
from dit_accel.partial import accumulate_dtype
from dit_accel.pipelines import accelerate, media, restore
from dit_accel.pipelines.families import family_of, models_of
from dit_accel.pipelines.generate import Generation, generate
from dit_accel.pipelines.plug import prepare
from dit_accel.pipelines.request import Request, effective
from dit_accel.rest import Drop
from dit_accel.route import Everything
from dit_accel.types import Context, Geometry, Report


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call of a dense generation, with its result.

    Attributes:
        q, k, v: ``[B, H, L, D]``, as the model made them, positions embedded.
        out: ``[B, H, L, D]``, dense attention in fp32 (fp64 for fp64).
        lse: ``[B, H, L]``, the logarithm of its normaliser, likewise.
        scale: of the logits.
        ctx: where it happened; without a state.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    ctx: Context


@dataclass(frozen=True, slots=True)
class Tap(Method):
    """Dense attention that shows the calls it is asked to.

    Attributes:
        wanted: which calls.
        see: is shown ``q``, ``k``, ``v``, where they belong, and the scale.
    """

    wanted: Callable[[Context], bool] = lambda ctx: False
    see: Callable[[Tensor, Tensor, Tensor, Context, float], None] = lambda *shown: None

    def is_dense(self, ctx: Context) -> bool:
        """Whether diffusers' own code runs: for every call that is not shown."""
        return not self.wanted(ctx)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, *, scale: float | None = None
    ) -> tuple[Tensor, Report]:
        """Dense attention, as `Method`."""
        if self.wanted(ctx):
            self.see(q, k, v, ctx, default_scale(q, scale))
        # every part of it is None, which is dense attention
        return Method(None, None, None)(q, k, v, ctx, scale=scale)


def solved(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None = None) -> Call:
    """A call with its dense result, in fp32 or better.

    Args:
        q, k, v: ``[B, H, L, D]``.
        ctx: where; its state is not looked at.
        scale: of the logits; ``D ** -0.5`` by default.
    """
    work = accumulate_dtype(q.dtype)
    layout = Raster(128)
    blocked = layout(q.to(work), k.to(work), v.to(work), ctx, default_scale(q, scale))
    whole = attend(blocked, Everything()(blocked, Drop(), ctx), Drop(), ctx)
    return Call(q, k, v, whole.out, whole.lse, blocked.scale, replace(ctx, state=None))


@torch.inference_mode()
def capture(
    pipe: Any,
    request: Request,
    folder: Path,
    *,
    layers: Iterable[int],
    steps: Iterable[int],
    on_step: Callable[[int, int], None] | None = None,
    on_latents: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Generation:
    """Generate densely, and write the chosen attention calls, those of every guidance branch.

    Args:
        pipe: from `dit_accel.pipelines.load`.
        request: what to generate.
        folder: exists; one file a call is written there.
        layers, steps: which; see `chosen_layers` and `chosen_steps`.
        on_step, on_latents: as in `dit_accel.pipelines.generate.generate`.
    """

    def see(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float) -> None:
        save(solved(q, k, v, ctx, scale), folder)

    wanted = _within(layers, steps)
    return _tapped(pipe, request, wanted, see, on_step, on_latents)


class _Enough(Exception):
    """Everything asked for was seen."""


def check_place(pipe: Any, request: Request, layer: int, head: int, steps: Collection[int]) -> int:
    """How many layers there are, or an InputError as `take` raises it."""
    attention = _attention(pipe)
    count = len(attention)
    if not -count <= layer < count:
        raise InputError(f"layer: expected one of {count}, from 0, got {layer}")
    heads = attention[layer].heads
    if not 0 <= head < heads:
        raise InputError(f"head: expected one of {heads}, from 0, got {head}")
    last = effective(pipe, request).steps or 0
    for step in steps:
        if not 0 <= step < last:
            raise InputError(f"step: expected one of {last}, from 0, got {step}")
    return count


@torch.inference_mode()
def take(
    pipe: Any,
    request: Request,
    layer: int,
    head: int,
    steps: Collection[int],
    on_step: Callable[[int, int], None] | None = None,
) -> dict[int, Call]:
    """Generate densely as far as the last of some steps, and take one head's calls.

    Args:
        pipe: from `dit_accel.pipelines.load`.
        request: what to generate.
        layer: number of the self-attention layer; negative ones count from the last.
        head: of that layer.
        steps: denoising steps, from 0.
        on_step: called after every step with how many are done, and of how many.

    Returns:
        By step, the first guidance branch (the prompt's own) and element of the batch: fp32
        ``[1, 1, L, D]``.

    Raises:
        InputError: there is no such layer, head or step, or the request does not fit the model.
    """
    count = check_place(pipe, request, layer, head, steps)
    found: dict[int, Call] = {}

    def see(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float) -> None:
        if ctx.step in found:
            return
        valid = ctx.geometry.key_valid
        where = replace(ctx.geometry, key_valid=None if valid is None else valid[:1].clone())
        q1, k1, v1 = (x[:1, head : head + 1].to(torch.float32, copy=True) for x in (q, k, v))
        found[ctx.step] = solved(q1, k1, v1, replace(ctx, geometry=where), scale)

    def after(done: int, total: int) -> None:
        if on_step is not None:
            on_step(done, total)
        if len(found) == len(frozenset(steps)):
            raise _Enough

    with contextlib.suppress(_Enough):
        _tapped(pipe, request, _within({layer % count}, steps), see, after)
    return found


def _within(layers: Iterable[int], steps: Iterable[int]) -> Callable[[Context], bool]:
    layers, steps = frozenset(layers), frozenset(steps)
    return lambda ctx: ctx.layer in layers and ctx.step in steps


def _tapped(
    pipe: Any,
    request: Request,
    wanted: Callable[[Context], bool],
    see: Callable[[Tensor, Tensor, Tensor, Context, float], None],
    on_step: Callable[[int, int], None] | None = None,
    on_latents: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Generation:
    """Generate densely and be shown calls; the pipeline is left with its own processors."""
    accelerate(pipe, Tap(None, None, None, name="capture", wanted=wanted, see=see))
    try:
        return generate(pipe, request, on_step, on_latents=on_latents)
    finally:
        restore(pipe)
        prepare(pipe)


def _attention(pipe: Any) -> list[Any]:
    """The self-attention modules of a pipeline's first transformer.

    Raises:
        InputError: the family is not supported.
    """
    model = next(iter(models_of(pipe).values()))
    family = family_of(model)
    if family is None:
        raise InputError(f"capture: expected a supported pipeline, got a {type(pipe).__name__}")
    return list(family.self_attention(model))


def num_layers(pipe: Any) -> int:
    """How many self-attention layers a pipeline's transformers have, in the first of them.

    Raises:
        InputError: the family is not supported.
    """
    return len(_attention(pipe))


def chosen_layers(text: str, count: int) -> tuple[int, ...]:
    """Layers by a list such as ``0,2,-1``, ``all``, or ``auto``: the first, middle and last.

    Raises:
        InputError: a layer does not exist, or the text is none of these.
    """
    if text == "auto":
        return tuple(sorted({0, count // 2, count - 1}))
    return _chosen("layers", text, count)


def chosen_steps(text: str, count: int) -> tuple[int, ...]:
    """Steps by a list, ``all``, or ``auto``: four pairs of steps that follow each other.

    Pairs, since how an error goes on from one step to the next is part of what is measured.

    Raises:
        InputError: a step does not exist, or the text is none of these.
    """
    if text == "auto":
        starts = {round(i * max(0, count - 2) / 3) for i in range(4)}
        return tuple(sorted({min(s + i, count - 1) for s in starts for i in (0, 1)}))
    return _chosen("at", text, count)


def _chosen(name: str, text: str, count: int) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(count))
    try:
        wanted = [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(
            f"{name}: expected auto, all or a list such as 0,2,-1, got {text!r}"
        ) from None
    for number in wanted:
        if not -count <= number < count:
            raise InputError(f"{name}: expected numbers from {-count} to {count - 1}, got {number}")
    return tuple(sorted({number % count for number in wanted}))


def save(call: Call, folder: Path) -> Path:
    """Write a call, whole or not at all; returns its file."""
    ctx, where = call.ctx, call.ctx.geometry
    told = {
        "grid": where.grid,
        "text": None if where.text is None else (where.text.start, where.text.stop),
        "step": ctx.step,
        "num_steps": ctx.num_steps,
        "layer": ctx.layer,
        "num_layers": ctx.num_layers,
        "branch": ctx.branch,
        "scale": call.scale,
    }
    tensors = {name: getattr(call, name).contiguous().cpu() for name in _TENSORS}
    if where.key_valid is not None:
        tensors["key_valid"] = where.key_valid.contiguous().cpu()
    branch = re.sub(r"[^A-Za-z0-9]+", "-", ctx.branch)
    path = folder / f"layer{ctx.layer:02d}-step{ctx.step:03d}-{branch}.safetensors"
    media.replace_with(
        path, lambda part: save_file(tensors, part, metadata={"call": json.dumps(told)})
    )
    return path


_TENSORS = ("q", "k", "v", "out", "lse")


def load(path: Path, device: str = "cpu") -> Call:
    """Read a call that `save` wrote."""
    with safe_open(path, framework="pt", device=device) as file:
        told = json.loads(file.metadata()["call"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = None if told["text"] is None else slice(*told["text"])
    geometry = Geometry(tuple(told["grid"]), text, tensors.pop("key_valid", None))
    ctx = Context(
        geometry,
        step=told["step"],
        num_steps=told["num_steps"],
        layer=told["layer"],
        num_layers=told["num_layers"],
        branch=told["branch"],
    )
    return Call(**tensors, scale=told["scale"], ctx=ctx)


def layers_in(folder: Path) -> tuple[int, ...]:
    """The layers of which a folder holds calls."""
    return tuple(sorted({int(path.name[5:].split("-")[0]) for path in _files(folder)}))


def steps_in(folder: Path) -> tuple[int, ...]:
    """The denoising steps of which a folder holds calls."""
    return tuple(sorted({int(path.name.split("-")[1][4:]) for path in _files(folder)}))


def steps_of(folder: Path, layer: int, device: str = "cpu") -> Iterator[list[Call]]:
    """The calls of a layer, step by step, the guidance branches of one step together."""
    groups: dict[str, list[Path]] = {}
    for path in _files(folder):
        if path.name.startswith(f"layer{layer:02d}-"):
            groups.setdefault(path.name.split("-")[1], []).append(path)
    for key in sorted(groups, key=lambda word: int(word[4:])):
        yield [load(path, device) for path in groups[key]]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("layer*-step*-*.safetensors"))
