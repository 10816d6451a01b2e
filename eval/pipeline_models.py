"""Transformers of real dimensions with random weights, made where they run.

Nothing is downloaded. Weights are diffusers' own initialisation: shapes, dtypes and operations are
those of a loaded checkpoint, and what comes out means nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import InputError

Layers = Mapping[str, int]
"""How many layers of each kind, by the name that the transformer's config has for the number."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A transformer and what goes into one forward of it.

    Attributes:
        transformer: its class in diffusers.
        config: of the class, without the numbers of layers.
        layers: of the real model, by kind.
        grid: latent frames, rows and columns as the transformer is given them.
        text: tokens of text.
        forwards: of one denoising step as its pipeline runs it with guidance, batch 1 each.
        patch: rows, and columns, of latents that make one token.
        joint: whether text stands in the self-attention too.
        inputs: of a forward: ``inputs(spec, batch, dtype, device)``.
    """

    transformer: str
    config: Mapping[str, Any]
    layers: Layers
    grid: tuple[int, int, int]
    text: int
    forwards: int
    patch: int
    joint: bool
    inputs: Callable[[Spec, int, torch.dtype, str], dict[str, Any]]

    @property
    def tokens(self) -> int:
        """Of the self-attention."""
        frames, rows, columns = self.grid
        video = frames * (rows // self.patch) * (columns // self.patch)
        return video + self.text * self.joint


def _wan_inputs(spec: Spec, batch: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    channels = spec.config["in_channels"]
    return {
        "hidden_states": torch.randn(batch, channels, *spec.grid, dtype=dtype, device=device),
        "timestep": torch.full((batch,), 999, device=device),
        "encoder_hidden_states": torch.randn(
            batch, spec.text, spec.config["text_dim"], dtype=dtype, device=device
        ),
        "return_dict": False,
    }


def _flux_inputs(spec: Spec, batch: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    _, rows, columns = spec.grid
    config = spec.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    ids = torch.zeros(rows, columns, 3, dtype=dtype, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None]
    return {
        "hidden_states": noise(batch, rows * columns, config["in_channels"]),
        "encoder_hidden_states": noise(batch, spec.text, config["joint_attention_dim"]),
        "pooled_projections": noise(batch, config["pooled_projection_dim"]),
        "timestep": torch.full((batch,), 0.999, dtype=dtype, device=device),
        "guidance": torch.full((batch,), 3.5, device=device),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(spec.text, 3, dtype=dtype, device=device),
        "return_dict": False,
    }


def _hunyuan_inputs(spec: Spec, batch: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    config = spec.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    # a prompt that is half as long as there is room
    valid = torch.arange(spec.text, device=device) < spec.text // 2
    return {
        "hidden_states": noise(batch, config["in_channels"], *spec.grid),
        "timestep": torch.full((batch,), 999, device=device),
        "encoder_hidden_states": noise(batch, spec.text, config["text_embed_dim"]),
        "encoder_attention_mask": valid.expand(batch, -1),
        "pooled_projections": noise(batch, config["pooled_projection_dim"]),
        "guidance": torch.full((batch,), 6000.0, dtype=dtype, device=device),
        "return_dict": False,
    }


def _wan(heads: int, ffn: int, layers: int, grid: tuple[int, int, int], **other: int) -> Spec:
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": other.get("head_dim", 128),
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": other.get("text_dim", 4096),
        "freq_dim": 256,
        "ffn_dim": ffn,
        "cross_attn_norm": True,
    }
    return Spec(
        "WanTransformer3DModel",
        config,
        {"num_layers": layers},
        grid,
        other.get("text", 512),
        2,
        2,
        False,
        _wan_inputs,
    )


def _flux(heads: int, layers: tuple[int, int], grid: tuple[int, int, int], **other: Any) -> Spec:
    config = {
        "in_channels": 64,
        "num_attention_heads": heads,
        "attention_head_dim": other.get("head_dim", 128),
        "joint_attention_dim": other.get("text_dim", 4096),
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": other.get("axes", (16, 56, 56)),
    }
    return Spec(
        "FluxTransformer2DModel",
        config,
        dict(zip(("num_layers", "num_single_layers"), layers, strict=True)),
        grid,
        other.get("text", 512),
        1,
        1,
        True,
        _flux_inputs,
    )


def _hunyuan(heads: int, layers: tuple[int, int], grid: tuple[int, int, int], **other: Any) -> Spec:
    config = {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": heads,
        "attention_head_dim": other.get("head_dim", 128),
        "guidance_embeds": True,
        "text_embed_dim": other.get("text_dim", 4096),
        "pooled_projection_dim": 768,
        "rope_axes_dim": other.get("axes", (16, 56, 56)),
    }
    return Spec(
        "HunyuanVideoTransformer3DModel",
        config,
        dict(zip(("num_layers", "num_single_layers"), layers, strict=True)),
        grid,
        other.get("text", 256),
        1,
        2,
        True,
        _hunyuan_inputs,
    )


_AXES = {"head_dim": 64, "text_dim": 32, "text": 8, "axes": (16, 24, 24)}

MODELS: dict[str, Spec] = {
    "wan1.3b": _wan(12, 8960, 30, (21, 60, 104)),
    "wan14b": _wan(40, 13824, 40, (21, 90, 160)),
    "hunyuan": _hunyuan(24, (20, 40), (33, 90, 160)),
    "flux": _flux(24, (19, 38), (1, 64, 64)),
    "tiny": _wan(2, 64, 4, (3, 12, 20), head_dim=64, text_dim=32, text=8),
    "tiny-flux": _flux(2, (2, 3), (1, 12, 10), **_AXES),
    "tiny-hunyuan": _hunyuan(2, (2, 3), (3, 12, 20), **_AXES),
}
"""Wan 2.1 1.3B at 832 x 480 and 14B at 1280 x 720, 81 frames; HunyuanVideo at 1280 x 720, 129
frames; FLUX.1-dev at 1024 x 1024; and three for tests."""


def get(name: str) -> Spec:
    """The model of a name.

    Raises:
        InputError: there is none.
    """
    if name not in MODELS:
        raise InputError(f"models: expected some of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]


def build(spec: Spec, layers: Layers, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """The transformer with so many layers, in ``dtype``, on a device, in evaluation mode.

    As after ``from_pretrained``, the modules that diffusers keeps in fp32 are in fp32.
    """
    import diffusers

    made_by = getattr(diffusers, spec.transformer)
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        # weights of 14B parameters are made on the device, since the host would take minutes
        with torch.device(device):
            model = made_by(**spec.config, **layers)
    finally:
        torch.set_default_dtype(before)
    fine = getattr(made_by, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        wide = any(part in name.split(".") for part in fine)
        parameter.data = parameter.data.to(device, torch.float32 if wide else dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval().requires_grad_(False)


def widened(model: Any, dtype: torch.dtype) -> Any:
    """A copy with its weights in a wider dtype."""
    made = copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made


def parameters(model: Any) -> int:
    """How many numbers its weights are."""
    return sum(parameter.numel() for parameter in model.parameters())


def small(spec: Spec) -> Spec:
    """One of the same family and head size with two heads, few channels and odd sizes."""
    few = {"num_attention_heads": 2, "ffn_dim": 64}
    few |= dict.fromkeys(("text_dim", "joint_attention_dim", "text_embed_dim"), 48)
    config = {name: few.get(name, value) for name, value in spec.config.items()}
    # even for the patches of Wan, and blocks of no size fit
    grid = (5, 18, 26) if spec.grid[0] > 1 else (1, 18, 26)
    return replace(spec, config=config, grid=grid, text=12)
