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
