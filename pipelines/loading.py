"""Load a pipeline by path, hub id or embedded name, ready to take a processor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dit_accel.errors import InputError
from dit_accel.options import closest
from dit_accel.pipelines import embedded, families, plug


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Any:
    """A diffusers pipeline whose attention can be swapped.

    It is the stock pipeline with one more method, ``pipe.set_attn_processor(name | Method |
    processor, **options)``.

    Args:
        model: an embedded model's name (``tiny-wan``), a directory, or a hub id (``owner/name``).
        dtype: of the weights, or one for each component; by default fp32 on a CPU, and bf16 on a
            GPU, with the autoencoder of Wan and HunyuanVideo in fp32 (as Wan recommends).
        device: where to put it; by default it stays on the CPU, where offloading can be chosen,
            and ``dtype`` goes by whether there is a GPU.
        options: for diffusers' ``from_pretrained``, such as ``variant`` or ``revision``. Only
            safetensors are read unless ``use_safetensors`` says otherwise.

    Raises:
        InputError: there is no such model, it cannot be fetched, its family is not supported, or
            the device is not there.

    Example:
        >>> import dit_accel
        >>> pipe = dit_accel.pipelines.load("tiny-wan")
        >>> pipe.set_attn_processor("pisa", density=0.15)
    """
    where = _device(device)
    source, inside = _locate(model)
    kind = _check_family(source, options)
    if dtype is None:
        gpu = where.type == "cuda" if where else torch.cuda.is_available()
        dtype = torch.bfloat16 if gpu else torch.float32
        # their pipelines hand latents to the autoencoder in its own dtype; FLUX's does not
        if gpu and inside is None and kind.startswith(("Wan", "HunyuanVideo")):
            dtype = {"default": torch.bfloat16, "vae": torch.float32}
    options.setdefault("use_safetensors", True)
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, **options)
    except OSError as error:
        raise InputError(f"model: {_one_line(error)}") from error
    if where is not None:
        pipe.to(where)
    # no bound method: that could not be pickled with the pipeline
    pipe.set_attn_processor = partial(plug.set_attn_processor, pipe)
    if inside is not None:
        embedded.warn_of_unknown_words(pipe, inside.name)
        for transformer in families.models_of(pipe).values():
            setattr(transformer, plug.EMBEDDED, inside.name)
    plug.prepare(pipe)
    return pipe


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: expected one such as cpu or cuda:0, got {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device: expected one of cpu and {torch.cuda.device_count()} CUDA devices, got "
            f"{str(found)!r}"
        )
    return found


def _locate(model: str | Path) -> tuple[str, embedded.Embedded | None]:
    """What diffusers is to be asked for, and the embedded model that it is, if any."""
    inside = embedded.find(str(model))
    if inside is not None:
        return str(inside.directory), inside
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise InputError(
                f"model: expected a pipeline directory with a model_index.json, got {str(path)!r}"
            )
        return str(path), None
    parts = str(model).split("/")
    if isinstance(model, Path) or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise InputError(
            f"model: expected {' or '.join(embedded.names())}, an existing directory or a hub id "
            f"such as owner/name, got {str(model)!r}{closest(str(model), embedded.names())}"
        )
    return str(model), None


def _check_family(source: str, options: dict[str, Any]) -> str:
    """The pipeline's class; what cannot be accelerated is refused before any weight is fetched."""
    keys = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
    try:
        index = DiffusionPipeline.load_config(
            source, **{key: options[key] for key in keys if key in options}
        )
    except OSError as error:
        raise InputError(f"model: {_one_line(error)}") from error
    classes = [entry[1] for entry in index.values() if isinstance(entry, list | tuple)]
    if not set(classes) & set(families.supported()):
        transformers = [name for name in classes if name and "Transformer" in name]
        what = " with a ".join([str(index.get("_class_name")), *transformers[:1]])
        raise families.unsupported(what)
    return str(index.get("_class_name"))


def _one_line(error: Exception) -> str:
    """The first sentence of what diffusers says, which goes on over many lines."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
