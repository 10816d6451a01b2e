"""What a graph of ``torch.compile`` sees of us: two operations that it does not look into.

Step, branch and layer are numbers of Python that change all the time. Traced, each would be a guard
that fails at the next step, and each method's reading of sizes on the host a graph break. So both
stay behind operations that run as they are, whatever step it is: a compiled model has the same
graphs with a method as without, none of them broken. What an operation belongs to is told by a
number in a tensor, whose value no graph depends on; a number in Python would be one more guard, and
one more graph for every layer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from dit_accel.pipelines.norms import Task
from dit_accel.projections import Stream
from dit_accel.projections import norm_rotary as run_norm_rotary

_NUMBERS = itertools.count(1)
_KNOWN: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def scalar(value: int) -> Tensor:
    """An int64 scalar on the CPU, which graphs may change, in inference mode or out of it."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.int64, device="cpu")


def number_of(one: Any) -> Tensor:
    """A new number, as `scalar`, under which an operation finds ``one`` for as long as it lives."""
    number = next(_NUMBERS)
    _KNOWN[number] = one
    return scalar(number)


# The ticks of a session go into both operations, and the first one changes them: no compiler may
# then take an attention call out of the forward in which it stands.
@torch.library.custom_op(
    "dit_accel::enter", mutates_args=("ticks",), tags=(torch.Tag.cudagraph_unsafe,)
)
def enter(ticks: Tensor, hook: Tensor, names: str, given: list[Tensor]) -> None:
    """A forward begins: `RootHook.enter`, with the tensors among its arguments and their names."""
    _KNOWN[int(hook)].enter(dict(zip(names.split(), given, strict=True)))
    ticks.add_(1)


@enter.register_fake
def _(ticks: Tensor, hook: Tensor, names: str, given: list[Tensor]) -> None:
    return None


@torch.library.custom_op("dit_accel::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend(
    ticks: Tensor, binding: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """`MethodProcessor.run` of the module that has this binding: ``[B, H, L, D]`` each to
    ``[B, L, H * D]``.
    """
    attn = _KNOWN[int(binding)].module
    out: Tensor = attn.processor.run(attn, q, k, v, mask)
    return out.contiguous()


@attend.register_fake
def _(
    ticks: Tensor, binding: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


def norm_rotary(binding: Tensor, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """`norms.Task.run`, where a graph is traced; noted when it runs."""
    cos, sin = (None, None) if task.angles is None else task.angles
    weights = [w for s in task.streams for w in (s.q_weight, s.k_weight) if w is not None]
    q, k, v = _norm_rotary(
        binding,
        [x for stream in task.streams for x in (stream.q, stream.k, stream.v)],
        weights,
        [eps for stream in task.streams for eps in (stream.q_eps, stream.k_eps)],
        task.over or "",
        cos,
        sin,
        task.dtype,
    )
    # what an operation returns may be none of its arguments
    return q, k, v if len(task.streams) > 1 else task.streams[0].v


# it tells who computed the norms whenever it runs, which a replayed graph would not
@torch.library.custom_op(
    "dit_accel::norm_rotary", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _norm_rotary(
    binding: Tensor,
    projections: list[Tensor],
    weights: list[Tensor],
    eps: list[float],
    over: str,
    cos: Tensor | None,
    sin: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    streams = []
    for i in range(0, len(projections), 3):
        at = i // 3 * 2
        q_weight, k_weight = weights[at : at + 2] if weights else (None, None)
        streams.append(
            Stream(
                projections[i],
                projections[i + 1],
                projections[i + 2],
                q_weight,
                k_weight,
                eps[at],
                eps[at + 1],
            )
        )
    q, k, v = run_norm_rotary(
        streams, norm=over or None, cos=cos, sin=sin, dtype=dtype, backend="triton"
    )
    _KNOWN[int(binding)].norms = "triton"
    return q, k, v if len(streams) > 1 else v.new_empty(0)


@_norm_rotary.register_fake
def _(
    binding: Tensor,
    projections: list[Tensor],
    weights: list[Tensor],
    eps: list[float],
    over: str,
    cos: Tensor | None,
    sin: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, depth = projections[0].shape
    for x in projections[3::3]:
        length += x.shape[1]
    shape = (batch, length, heads, depth)
    like = projections[2]
    joined = len(projections) > 3
    q, k = (like.new_empty(shape, dtype=dtype) for _ in range(2))
    return q, k, like.new_empty(shape if joined else 0)
