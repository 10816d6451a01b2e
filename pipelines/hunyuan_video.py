"""HunyuanVideo: joint attention over video tokens in row-major order, then text with padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.pipelines.families import Family
from dit_accel.pipelines.norms import Projected, angles_of_channels
from dit_accel.pipelines.session import MethodProcessor
from dit_accel.types import Geometry


class HunyuanVideoProcessor(MethodProcessor, HunyuanVideoAttnProcessor2_0):
    """Runs a method in the joint attention of a HunyuanVideo transformer, in both kinds of block.

    The refiner of the text, and every step or layer that the method leaves dense, run diffusers'
    own code. One instance may serve all modules.
    """

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self._refine = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as diffusers calls it.

        Args:
            attn: the module; its transformer must be prepared.
            hidden_states: video ``[B, L_video, C]``; text in the refiner.
            encoder_hidden_states: text ``[B, L_text, C]``; ``None`` in the refiner.
            attention_mask: bool ``[B, 1, 1, L]``, which keys are not padding; the geometry has the
                same, and a method reads it there. In the refiner it is ``[B, 1, L_text, L_text]``.
            image_rotary_emb: cosines and sines of the video, ``[L_video, D]`` each.

        Returns:
            Video ``[B, L_video, C]`` and text ``[B, L_text, C]``; in the refiner text alone.

        Raises:
            InputError: the transformer is not prepared, or the sequence is sharded.
        """
        if encoder_hidden_states is None:
            return self._refine(attn, hidden_states, attention_mask=attention_mask)
        if self.steps_aside(attn, hidden_states):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        projected = self._project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        out = self.attend(attn, *projected, mask=attention_mask)
        video, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        # single blocks project outside of the attention
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if attn.to_add_out is not None:
            text = attn.to_add_out(text)
        return video, text

    def _project(
        self,
        attn: Attention,
        video: Tensor,
        text: Tensor,
        rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[B, H, L, D]``, a view of ``[B, L, H, D]``."""
        own = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        added = own
        if attn.add_q_proj is not None:
            added = (
                (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                (attn.norm_added_q, attn.norm_added_k),
            )
        parts = [
            Projected.of((to(x).unflatten(2, (attn.heads, -1)) for to in projections), *norms)
            for x, (projections, norms) in ((video, own), (text, added))
        ]
        angles = None if rotary_emb is None else angles_of_channels(*rotary_emb, parts[0].q)
        joined = self.normed(attn, parts, "head", angles) or _joined(parts, rotary_emb)
        query, key, value = (x.transpose(1, 2) for x in joined)
        return query, key, value


def _joined(
    parts: Sequence[Projected], rotary_emb: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    """Video and text after their norms, the video rotated: ``[B, L, H, D]``."""
    streams = []
    for number, part in enumerate(parts):
        made = [part.q, part.k, part.v]
        for i, norm in enumerate((part.norm_q, part.norm_k)):
            if norm is not None:
                made[i] = norm(made[i])
            if number == 0 and rotary_emb is not None:
                made[i] = apply_rotary_emb(made[i], rotary_emb, sequence_dim=1)
        streams.append(made)
    return tuple(torch.cat(both, dim=1) for both in zip(*streams, strict=True))


def _self_attention(model: Any) -> list[Any]:
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


def _geometry(model: Any, given: Mapping[str, Any]) -> Geometry:
    mask = given["encoder_attention_mask"]
    # as diffusers has it: the valid tokens are taken to come first, wherever the mask has them
    valid = mask.sum(dim=1, dtype=torch.int)
    return joint_geometry(
        model, given["hidden_states"], given["encoder_hidden_states"].shape[1], valid
    )


def joint_geometry(model: Any, latent: Tensor, num_text: int, valid: Tensor) -> Geometry:
    """Of video tokens, and then text of which the first are valid.

    Args:
        model: the transformer.
        latent: ``[B, C, T, H, W]``.
        num_text: text tokens, padding included.
        valid: int ``[B]`` or ``[1]``, how many of them are not padding.

    Raises:
        InputError: the latents have another rank.
    """
    if latent.ndim != 5:
        raise InputError(
            f"hidden_states: expected latents [B, C, T, H, W], got shape {list(latent.shape)}"
        )
    patch = model.config.patch_size_t, model.config.patch_size, model.config.patch_size
    frames, rows, columns = (
        size // step for size, step in zip(latent.shape[2:], patch, strict=True)
    )
    start = math.prod((frames, rows, columns))
    stop = start + num_text
    # one mask for several videos of a prompt
    valid = (start + valid).expand(latent.shape[0])
    return Geometry(
        (frames, rows, columns),
        text=slice(start, stop),
        key_valid=torch.arange(stop, device=valid.device) < valid.unsqueeze(1),
    )


FAMILY = Family(
    name="HunyuanVideo",
    processor=HunyuanVideoProcessor,
    processor_type=HunyuanVideoProcessor,
    self_attention=_self_attention,
    geometry=_geometry,
)
