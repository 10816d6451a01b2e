"""Listens to a pipeline: time by part and by layer, memory at the peak, operations.

Hooks on the transformers, on their self-attention and on their linear layers open the spans of a
`dit_accel.recorder.Recorder`; a method's own parts open theirs. What dense attention of diffusers
spends is seen where it calls ``F.scaled_dot_product_attention``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dit_accel.errors import InputError
from dit_accel.eval.peak_memory import status
from dit_accel.eval.samples import Flops
from dit_accel.pipelines.dense_choice import choice_of, head_dim_of
from dit_accel.pipelines.families import family_of, models_of
from dit_accel.pipelines.plug import session_of
from dit_accel.pipelines.session import MethodProcessor, binding_of
from dit_accel.recorder import Recorder, recording


class DenseSpans(TorchFunctionMode):
    """Charges torch's attention to ``attend``."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with self._recorder.span("attend"):
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def listening(pipe: Any) -> Iterator[Recorder]:
    """Record one generation of a prepared pipeline.

    Afterwards ``parts()`` of the recorder are seconds of the transformers' forwards by part, and
    ``layers("linear", operations.SPAN)`` seconds of self-attention by layer, projections excluded.
    """
    with contextlib.ExitStack() as hooks, recording(pipe._execution_device) as recorder:

        def around(module: nn.Module, begin: Callable[..., None], end: Callable[..., None]) -> None:
            before = module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(end).remove)

        def opens(name: str, layer: int | None = None) -> Callable[..., None]:
            return lambda *_: recorder.begin(name, layer)

        def closes(*_: Any) -> None:
            recorder.end()

        for model in models_of(pipe).values():
            family = family_of(model)
            assert family is not None
            around(model, opens("other"), closes)
            for layer, attn in enumerate(family.self_attention(model)):
                _watch_attention(attn, layer, recorder, around)
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    around(module, opens("linear"), closes)
        yield recorder


def _watch_attention(
    attn: Any, layer: int, recorder: Recorder, around: Callable[..., None]
) -> None:
    modes: list[DenseSpans] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.begin("other", layer)
        # the mode sees every function of torch, which a sparse method calls by the thousand
        if is_dense(attn, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]):
            modes.append(DenseSpans(recorder))
            modes[-1].__enter__()

    def end(*_: Any) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)
        recorder.end()

    around(attn, begin, end)


def is_dense(attn: Any, tokens: torch.Tensor) -> bool:
    processor = attn.processor
    if not isinstance(processor, MethodProcessor):
        return True
    ctx, depth = binding_of(attn).context(), head_dim_of(attn, tokens)
    if processor.method.is_dense(ctx):
        return True
    return choice_of(processor, ctx, tokens, attn.heads, depth) is not None


# -- operations -----------------------------------------------------------------------------------


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch counts its attention kernels on a GPU only
_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}


@contextlib.contextmanager
def counting(pipe: Any) -> Iterator[dict[str, float]]:
    """Count the operations of one forward of every transformer, without self-attention's products.

    The pipeline must be dense meanwhile. What has no entry in torch's table of operations, such as
    the kernels of other packages, does not count.

    Yields:
        Operations by the transformer's name, filled in by the first forward of each.
    """
    found: dict[str, float] = {}
    with contextlib.ExitStack() as hooks:
        for name, model in models_of(pipe).items():
            family = family_of(model)
            assert family is not None
            _count(name, model, family.self_attention(model), found, hooks)
        yield found


def _count(
    name: str, model: Any, attention: list[Any], found: dict[str, float], hooks: Any
) -> None:
    whole: list[FlopCounterMode] = []
    inner: list[FlopCounterMode] = []
    products = [0.0]

    def begin(*_: Any) -> None:
        if name not in found:
            whole.append(_enter())

    def end(*_: Any) -> None:
        if whole:
            counter = whole.pop()
            counter.__exit__(None, None, None)
            found[name] = counter.get_total_flops() - products[0]

    def begin_attention(*_: Any) -> None:
        if whole:
            inner.append(_enter())

    def end_attention(*_: Any) -> None:
        if inner:
            counter = inner.pop()
            counter.__exit__(None, None, None)
            counts = counter.get_flop_counts().get("Global", {})
            products[0] += sum(
                value for op, value in counts.items() if "scaled_dot_product" in str(op)
            )

    for module, before, after in (
        (model, begin, end),
        *((attn, begin_attention, end_attention) for attn in attention),
    ):
        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after).remove)


def _enter() -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=_CPU)
    counter.__enter__()
    return counter


@contextlib.contextmanager
def forwards(pipe: Any) -> Iterator[dict[str, int]]:
    """Count the forwards of every transformer, by name."""
    counts = dict.fromkeys(models_of(pipe), 0)
    with contextlib.ExitStack() as hooks:
        for name, model in models_of(pipe).items():

            def more(*_: Any, name: str = name) -> None:
                counts[name] += 1

            hooks.callback(model.register_forward_pre_hook(more).remove)
        yield counts


def flops_of(
    pipe: Any, other: dict[str, float], counts: dict[str, int], beside: dict[str, float]
) -> Flops:
    """Operations of the latest generation.

    Args:
        pipe: whose session knows the pairs that were computed.
        other: of one forward of every transformer, from `counting`.
        counts: of forwards, from `forwards`.
        beside: what the method computed beside its exact pairs, from
            `dit_accel.eval.operations.Tally`.

    Raises:
        InputError: a transformer ran whose operations were not counted.
    """
    for name, count in counts.items():
        if count and name not in other:
            raise InputError(f"operations: expected {name} to be counted, got no forward of it")
    attention = dense = 0.0
    sizes = {name: model.config.attention_head_dim for name, model in models_of(pipe).items()}
    for record in session_of(pipe).log.records:
        # two products, each a multiplication and an addition for every channel
        attention += 4.0 * sizes[record.model] * float(record.exact)
        dense += 4.0 * sizes[record.model] * float(record.every)
    around = sum(other.get(name, 0) * n for name, n in counts.items())
    return Flops(attention, dense, around, **beside)


# -- memory ---------------------------------------------------------------------------------------


class Peak:
    """Memory at the peak since `start`: CUDA's allocated, or a CPU process's resident memory."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)

    def start(self) -> None:
        """The peak counts from here."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """Bytes at the peak, everything that the process holds included.

        Raises:
            OSError: the system does not tell.
        """
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return status("VmHWM")
