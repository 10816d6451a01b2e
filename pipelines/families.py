"""The families of transformers that can be accelerated: one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.types import Geometry


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a forward of block diffusion is about.

    Attributes:
        cache: a tensor of the KV cache, which lives as long as the call of the pipeline.
        index: how many chunks are in the cache.
        filling: pairs of a query and a key, for each head and element of the batch, of a forward
            that fills the cache and denoises nothing; ``None`` for one that denoises.
    """

    cache: Tensor
    index: int
    filling: int | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """How a transformer of diffusers is taken apart.

    Attributes:
        name: in words.
        processor: makes the attention processor that runs a method.
        processor_type: its class, by which ours are told from others.
        self_attention: the modules whose attention a method may replace, by layer.
        geometry: what the tokens are, from the model and the named arguments of its forward.
        refuses: the reason why a model cannot be accelerated as it stands, if there is one.
        chunk: in block diffusion, which chunk a forward is about, from the same as `geometry`.
    """

    name: str
    processor: Callable[[Method], Any]
    processor_type: type
    self_attention: Callable[[Any], list[Any]]
    geometry: Callable[[Any, Mapping[str, Any]], Geometry]
    refuses: Callable[[Any], str | None] = lambda model: None
    chunk: Callable[[Any, Mapping[str, Any]], Chunk | None] | None = None


# class name of the transformer -> module that holds its family; imported on first use
_TABLE: Final = {
    "AnyFlowFARTransformer3DModel": "anyflow",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan",
}


def supported() -> tuple[str, ...]:
    """Class names of the transformers that can be accelerated."""
    return tuple(sorted(_TABLE))


def family_of(model: object) -> Family | None:
    """The family of a transformer, subclasses included; ``None`` if there is none."""
    for cls in type(model).__mro__:
        if cls.__name__ in _TABLE and cls.__module__.startswith("diffusers."):
            family: Family = import_module(f"dit_accel.pipelines.{_TABLE[cls.__name__]}").FAMILY
            return family
    return None


def models_of(target: object) -> dict[str, Any]:
    """The transformers of a pipeline that can be accelerated, by name; or the transformer itself.

    Raises:
        InputError: there is none.
    """
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        components = {"transformer": target}
    found = {}
    for name, component in components.items():
        component = getattr(component, "_orig_mod", component)  # torch.compile's wrapper
        if family_of(component) is not None:
            found[name] = component
    if not found:
        raise unsupported(type(target).__name__)
    return found


def unsupported(what: str) -> InputError:
    """The error for a pipeline or transformer that is in no family."""
    return InputError(f"pipeline: expected one with a {' or '.join(supported())}, got {what}")
