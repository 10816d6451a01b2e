"""The first call of a method: all of its kernels are compiled at once, not one after the other.

Triton compiles a kernel when it is launched first, which takes up to five seconds for the largest.
Most of that is LLVM's and ptxas' and needs no Python, so that threads help; but nothing says
beforehand which kernels a call will launch, and with which types and alignments. So the call is
gone through once without launching anything. What kernels would have written is zero then, and
nothing that depends on it is kept.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_THREADS = 16
"""As many as kernels that a call has mostly: the largest comes last, and should not wait."""
_rehearsing: ContextVar[bool] = ContextVar("dit_accel_rehearsing", default=False)
_lock = threading.Lock()
_known: set[Hashable] = set()
_log = logging.getLogger(__name__)


def rehearsing() -> bool:
    """Whether kernels are compiled and not launched: no result may be kept."""
    return _rehearsing.get()


def once(key: Hashable, call: Callable[[], Any]) -> None:
    """Compile together what a call will launch, the first time that it comes with this key.

    Without effect where Triton cannot compile in the background, where there is no Triton, and
    while a CUDA graph is captured. What goes wrong here goes wrong again in the call itself, which
    tells it.

    Args:
        key: whatever calls with the same kernels have in common.
        call: without effects of its own; its host code must not read what kernels write.
    """
    if key in _known or rehearsing() or importlib.util.find_spec("triton") is None:
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    _known.add(key)
    try:
        with rehearsal():
            call()
    except Exception:
        _log.debug("kernels could not be compiled together", exc_info=True)


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, kernels launched by this thread are compiled in the background, and not launched.

    Leaving it waits for all of them. Kernels that do not compile are left to the real launch, which
    raises.
    """
    from triton.runtime.jit import JITFunction

    # what it takes for Triton's own launch must not be what stands in for it here
    importlib.import_module("dit_accel.kernels.launch")
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:  # an older or a newer Triton
        raise RuntimeError("Triton: expected its AsyncCompileMode, got a release without") from None
    workers = _Workers(min(_THREADS, os.cpu_count() or 1))
    with _lock, workers:
        launch = JITFunction.run

        def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            # other threads may launch meanwhile
            return launch(self, *args, grid=grid, warmup=warmup or rehearsing(), **options)

        JITFunction.run = compiled
        token = _rehearsing.set(True)
        try:
            with AsyncCompileMode(workers, ignore_errors=True), _Zeros():
                yield
        finally:
            _rehearsing.reset(token)
            JITFunction.run = launch


class _Workers(ThreadPoolExecutor):
    """Threads that compile a kernel, and the few lines of C that launch it, which Triton keeps on
    disk too and would compile at the launch."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        def compiled() -> Any:
            from triton.runtime import driver

            kernel = work(*args, **options)
            with contextlib.suppress(Exception):  # as said by the launch itself
                driver.active.launcher_cls(kernel.src, kernel.metadata)
            return kernel

        return super().submit(compiled)


class _Zeros(TorchFunctionMode):
    """Memory that a kernel would have written is zero: a valid index, and a valid number."""

    _EMPTY = frozenset((torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.empty_strided))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in self._EMPTY else made
