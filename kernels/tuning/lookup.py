"""Which setting a launch gets. The same one throughout a process, whatever happens to the files.

An entry must be of the same operation, architecture, head size and kind of dtype. Among those the
one with the least number of tokens that is not below the sequence's counts, and for longer
sequences the one with the most. Where there is none, it is the default of `spaces`: settings of
another architecture, or of another head size, may not even fit into the device's shared memory. The
user's entries take the place of all shipped ones of the same operation, head size and dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from dit_accel.kernels.tuning import files
from dit_accel.kernels.tuning.spaces import SPACES, Kind, Setting

_overrides: dict[str, tuple[Setting, list[str]]] = {}


def setting(op: str, like: Tensor, tokens: int) -> Setting:
    """How to launch a kernel.

    Args:
        op: a name of `SPACES`.
        like: an input ``[..., D]``; its device, its head size and its dtype count.
        tokens: of the sequence.

    Raises:
        ValueError: a file of settings is there and cannot be read; the message names it.
    """
    if _overrides and op in _overrides:
        chosen, asked = _overrides[op]
        asked.append(op)
        return chosen
    kind: Kind = "half" if like.dtype.itemsize <= 2 else "float"
    return _chosen(op, architecture_of(like.device), like.shape[-1], kind, tokens)


@contextlib.contextmanager
def overridden(op: str, chosen: Setting) -> Iterator[list[str]]:
    """Launch a kernel in this way, for measurements. For one thread.

    Gives a list that grows with every launch that asked: it stays empty where a device has another
    kernel for the operation, which is launched in a way of its own.
    """
    before = _overrides.get(op)
    asked: list[str] = []
    _overrides[op] = chosen, asked
    try:
        yield asked
    finally:
        del _overrides[op]
        if before is not None:
            _overrides[op] = before


def architecture_of(device: torch.device) -> int:
    """Compute capability of a device, 90 for 9.0; 0 of one that has none."""
    return 0 if device.type != "cuda" else _capability(device.index or 0)


@lru_cache(maxsize=8)
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache(maxsize=4096)
def _chosen(op: str, architecture: int, head_dim: int, kind: Kind, tokens: int) -> Setting:
    listed = _tables(architecture).get((op, head_dim, kind), ())
    for most, found in listed:
        if tokens <= most:
            return found
    return listed[-1][1] if listed else SPACES[op].default(kind)


@lru_cache(maxsize=8)
def _tables(architecture: int) -> Mapping[tuple[str, int, str], tuple[tuple[int, Setting], ...]]:
    found: dict[tuple[str, int, str], tuple[tuple[int, Setting], ...]] = {}
    for path in (files.shipped(architecture), files.own(architecture)):
        if architecture and path.exists():
            try:
                found |= files.settings(files.read(path, architecture))
            except OSError as error:
                raise ValueError(f"{path}: expected a file that can be read, got {error}") from None
    return found


def check(device: torch.device) -> None:
    """Raise a ValueError if a file of settings for a device is there and cannot be read."""
    _tables(architecture_of(device))


def forget() -> None:
    """Read the files again at the next launch."""
    _tables.cache_clear()
    _chosen.cache_clear()
