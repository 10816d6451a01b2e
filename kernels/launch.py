"""Launching a kernel without what Triton does at every launch to find the binary of the last one.

``kernel[grid](...)`` types and specialises every argument, makes a key of text, builds a record for
hooks, and asks the driver about every pointer, which may take longer than the kernel of a short
sequence does. A call whose integers, types and alignment were seen before needs none of that.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

_LOOKED_AT = ("3.6.", "3.9.")
"""Releases of Triton whose launchers take what `launch` gives them; others launch as usual."""
_DIRECT = triton.__version__.startswith(_LOOKED_AT)
_MOST = 4096
"""Launches that are remembered; beyond that all are forgotten, and remembered anew."""

_RUN = triton.JITFunction.run
"""How Triton launches; while somebody has put something else in its place, that is used."""

_known: dict[Any, tuple[Any, ...]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], pointers: Any, sizes: tuple[Any, ...] = (), **constants: Any
) -> None:
    """``kernel[grid](*pointers, *sizes, **constants)``, on the device of the first pointer.

    Args:
        kernel: of Triton or Gluon; its constants come last in its signature.
        grid: programs along one to three axes.
        pointers: tensors, tensor descriptors and ``None``, which the signature has first.
        sizes: integers and floats, which follow.
        constants: constants of the kernel, and options of the launch.
    """
    replaced = triton.JITFunction.run is not _RUN
    if not _DIRECT or replaced or not isinstance(kernel, triton.JITFunction):
        kernel[grid](*pointers, *sizes, **constants)
        return
    device = pointers[0].get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, pointers, sizes, **constants)
        return
    given: list[Any] = []
    kinds: list[Any] = []
    bits = 0
    for one in pointers:
        if isinstance(one, torch.Tensor):
            address = one.data_ptr()
            bits |= address
            given.append(address)
            kinds.append(one.dtype)
        else:
            given.append(one)
            kinds.append(None if one is None else (one.base.dtype, *one.block_shape))
    if bits & 15 or _watched():
        kernel[grid](*pointers, *sizes, **constants)
        return
    key = id(kernel), device, grid, sizes, tuple(kinds), tuple(constants.items())
    found = _known.get(key)
    if found is None:
        binary = kernel[grid](*pointers, *sizes, **constants)
        names = kernel.arg_names[len(pointers) + len(sizes) :]
        tail = *sizes, *(constants[name] for name in names)
        shape = *grid, *(1,) * (3 - len(grid))
        if len(_known) >= _MOST:
            _known.clear()
        # the kernel itself, so that its id stays its own
        _known[key] = kernel, binary, binary.run, binary.function, shape, tail
        return
    _, binary, run, function, shape, tail = found
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(*shape, stream, function, binary.packed_metadata, None, None, None, *given, *tail)


def _watched() -> bool:
    """Whether somebody, such as a profiler of Triton's, wants to be told of launches."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)
