"""The one function: attention on tensors, without any pipeline."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel import presets
from dit_accel.errors import InputError
from dit_accel.method import Method, check_tensors
from dit_accel.state import State
from dit_accel.types import Context, Geometry, Prefix, Report


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method | str,
    *,
    grid: tuple[int, int, int],
    text: slice | None = ...,
    key_valid: Tensor | None = ...,
    scale: float | None = ...,
    layer: int = ...,
    step: int = ...,
    state: State | None = ...,
    return_report: Literal[False] = ...,
    num_steps: int | None = ...,
    num_layers: int | None = ...,
    branch: str = ...,
    prefix: Prefix | None = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method | str,
    *,
    grid: tuple[int, int, int],
    text: slice | None = ...,
    key_valid: Tensor | None = ...,
    scale: float | None = ...,
    layer: int = ...,
    step: int = ...,
    state: State | None = ...,
    return_report: Literal[True],
    num_steps: int | None = ...,
    num_layers: int | None = ...,
    branch: str = ...,
    prefix: Prefix | None = ...,
) -> tuple[Tensor, Report]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method | str,
    *,
    grid: tuple[int, int, int],
    text: slice | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    layer: int = 0,
    step: int = 0,
    state: State | None = None,
    return_report: bool = False,
    num_steps: int | None = None,
    num_layers: int | None = None,
    branch: str = "",
    prefix: Prefix | None = None,
) -> Tensor | tuple[Tensor, Report]:
    """Self-attention over video tokens (and text, in a joint sequence) by a sparse method.

    Args:
        q, k, v: ``[B, H, L, D]``, one dtype of fp16, bf16, fp32 or fp64, any strides.
        method: a `Method`, or the name of a preset with its defaults.
        grid: latent frames, rows, columns; their product is the number of video tokens, which
            stand in row-major order.
        text: where the text tokens stand, in a joint sequence.
        key_valid: bool ``[B, L]``; ``False`` marks padding, which contributes nothing as a key.
        scale: of the logits; ``D ** -0.5`` by default.
        layer, step, num_steps, num_layers: for schedules and for layouts that change by layer.
        state: what methods remember between steps; give the same one at every step.
        return_report: also return what was computed.
        branch: guidance branch, so that two of them never share memory.
        prefix: cached keys that all queries see beside their own, in block diffusion.

    Returns:
        ``[B, H, L, D]`` in ``q``'s dtype; with ``return_report`` also a `Report`, whose ``density``
        and ``head_density`` are the pairs computed exactly over all pairs. The row of a query
        without any valid key is 0.

    Raises:
        InputError: what was given does not fit. NaNs are looked for on the CPU only, since on a GPU
            that would make the host wait for it.

    Example:
        >>> import torch, dit_accel
        >>> q, k, v = torch.randn(3, 1, 2, 512, 32, generator=torch.Generator().manual_seed(0))
        >>> method = dit_accel.presets.pisa(density=0.25)
        >>> out, report = dit_accel.attention(
        ...     q, k, v, method, grid=(8, 8, 8), return_report=True
        ... )
        >>> tuple(out.shape), report.density
        ((1, 2, 512, 32), 0.25)
    """
    if isinstance(method, str):
        method = presets.build(method)
    elif not isinstance(method, Method):
        raise InputError(
            f"method: expected a Method or a preset's name, got {type(method).__name__}"
        )
    for name, number in (("layer", layer), ("step", step)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise InputError(f"{name}: expected an integer, 0 or more, got {number!r}")
    if prefix is not None and not isinstance(prefix, Prefix):
        raise InputError(f"prefix: expected a Prefix or None, got {type(prefix).__name__}")
    if text is not None and not isinstance(text, slice):
        raise InputError(f"text: expected a slice or None, got {type(text).__name__}")
    ctx = Context(
        Geometry(grid, text, key_valid),
        step=step,
        num_steps=num_steps,
        layer=layer,
        num_layers=num_layers,
        branch=branch,
        state=state,
        prefix=prefix,
    )
    check_tensors(q, k, v, ctx)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.device.type == "cpu" and _has_nan(tensor):
            raise InputError(f"{name}: expected numbers, got NaN among them")
    out, report = method(q, k, v, ctx, scale=scale)
    return (out, report) if return_report else out


def _has_nan(tensor: Tensor) -> bool:
    """Whether there is a NaN: one sum, and a closer look only if that is not finite."""
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return not bool(total.isfinite()) and bool(tensor.isnan().any())
