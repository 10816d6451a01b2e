"""The grids of images, read from the positions that the transformers of FLUX are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.errors import InputError
from dit_accel.types import Grid

# of positions that a pipeline makes once and gives at every step: the version they had, the grids
_known: Any = WeakTensorKeyDictionary()


def grids_of(ids: Any, axes: int) -> tuple[Grid, ...]:
    """Images as grids of one frame, in the order of the sequence; a reference is one more image.

    Waits for the GPU once for each tensor.

    Args:
        ids: ``[L, axes]`` or ``[B, L, axes]``, any dtype; equal throughout the batch. The first
            axis tells images apart, the next two are row and column.
        axes: 3 for FLUX.1, 4 for FLUX.2.

    Raises:
        InputError: they are no such positions, or not of whole images, row by row.
    """
    if not isinstance(ids, Tensor) or ids.ndim not in (2, 3) or ids.shape[-1] != axes:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"img_ids: expected positions [L, {axes}], got {got}")
    version = None if ids.is_inference() else ids._version
    if ids not in _known or _known[ids][0] != version:
        _known[ids] = version, _grids((ids if ids.ndim == 2 else ids[0]).cpu())
    found: tuple[Grid, ...] = _known[ids][1]
    return found


def _grids(ids: Tensor) -> tuple[Grid, ...]:
    """Of positions ``[L, axes]`` on the CPU."""
    starts = (ids[1:, 0] != ids[:-1, 0]).nonzero().flatten() + 1
    return tuple(_grid(image) for image in ids.tensor_split(starts))


def _grid(ids: Tensor) -> Grid:
    """Of one image. Half precision runs neighbours together: large positions need not differ."""
    # a row ends where the columns begin again
    back = (ids[1:, 2] < ids[:-1, 2]).nonzero().flatten()
    columns = int(back[0]) + 1 if len(back) else len(ids) // max(1, len(ids[:, 1].unique()))
    rows, left = divmod(len(ids), max(1, columns))
    whole = rows > 0 and not left
    if whole:
        image = ids.unflatten(0, (rows, columns))
        whole = (
            torch.equal(image[..., 2], image[:1, :, 2].expand(rows, columns))
            and torch.equal(image[..., 1], image[:, :1, 1].expand(rows, columns))
            and bool((image[0, :, 2].diff() >= 0).all() and (image[:, 0, 1].diff() >= 0).all())
            and torch.equal(image[..., 3:], image[:1, :1, 3:].expand_as(image[..., 3:]))
        )
    if not whole:
        raise InputError(
            "img_ids: expected the positions of whole images, each row by row, got "
            f"{len(ids)} of one image that make no grid"
        )
    return 1, rows, columns
