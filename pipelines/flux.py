"""FLUX.1: joint attention over text, then images in row-major order: the result, references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.pipelines.families import Family
from dit_accel.pipelines.norms import Projected, angles_of_channels
from dit_accel.pipelines.positions import grids_of
from dit_accel.pipelines.session import MethodProcessor
from dit_accel.types import Geometry

_IP_ADAPTER = (
    "expected no IP-adapter, got one: its attention to images is part of diffusers' processor, "
    "whose place ours would take (pipe.unload_ip_adapter() takes it out)"
)


class FluxProcessor(MethodProcessor, FluxAttnProcessor):
    """Runs a method in the joint attention of a FLUX.1 transformer, in both kinds of block.

    Every step or layer that the method leaves dense runs diffusers' own code. One instance may
    serve all modules.
    """

    def __init__(self, method: Method | None = None) -> None:
        if method is None:
            # as diffusers calls the class of every processor when it loads or unloads an IP-adapter
            raise InputError(
                "FluxProcessor: expected a Method, got none; call dit_accel.restore before an "
                "IP-adapter is loaded or unloaded"
            )
        super().__init__(method)

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as diffusers calls it.

        Args:
            attn: the module; its transformer must be prepared.
            hidden_states: image ``[B, L_image, C]``; text and image ``[B, L, C]`` in single blocks.
            encoder_hidden_states: text ``[B, L_text, C]``; ``None`` in single blocks.
            attention_mask: ``None``; FLUX attends to the padding of its texts.
            image_rotary_emb: cosines and sines of text and image, ``[L, D]`` each.
            ip_hidden_states: ``None`` in blocks with text; single blocks have no use for it.

        Returns:
            ``[B, L, C]``, or image ``[B, L_image, C]`` and text ``[B, L_text, C]``.

        Raises:
            InputError: the transformer is not prepared, a mask or an IP-adapter's images came, or
                the sequence is sharded.
        """
        if ip_hidden_states is not None and encoder_hidden_states is not None:
            raise InputError(f"{self.method.name}: {_IP_ADAPTER}")
        if attention_mask is not None:
            raise InputError(
                f"{self.method.name}: expected no mask in FLUX's attention, got one of shape "
                f"{list(attention_mask.shape)}"
            )
        if self.steps_aside(attn, hidden_states):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb
            )
        out = self.attend(
            attn, *project(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        )
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def project(
    ours: MethodProcessor,
    attn: Any,
    hidden_states: Tensor,
    text: Tensor | None,
    rotary_emb: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of images and text, as `normed` has them. For FLUX.2 too."""
    fused = attn.fused_projections
    own = attn.to_qkv if fused else (attn.to_q, attn.to_k, attn.to_v)
    joint = _three(hidden_states, own, attn)
    if text is None:
        return normed(ours, attn, joint, None, rotary_emb)
    added = attn.to_added_qkv if fused else (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return normed(ours, attn, joint, _three(text, added, attn), rotary_emb)


def normed(
    ours: MethodProcessor,
    attn: Any,
    joint: Sequence[Tensor],
    added: Sequence[Tensor] | None,
    rotary_emb: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values after norms and rotation, text before images.

    Args:
        ours: the processor.
        attn: the module.
        joint: projections ``[B, L, H, D]`` of images, or of everything in single blocks.
        added: projections of text; ``None`` in single blocks.
        rotary_emb: cosines and sines of all tokens, ``[L, D]`` each.

    Returns:
        ``[B, H, L, D]`` each, a view of ``[B, L, H, D]``.
    """
    parts = [Projected.of(joint, attn.norm_q, attn.norm_k)]
    if added is not None:
        parts.insert(0, Projected.of(added, attn.norm_added_q, attn.norm_added_k))
    angles = None if rotary_emb is None else angles_of_channels(*rotary_emb, joint[0])
    made = ours.normed(attn, parts, "head", angles)
    if made is not None:
        query, key, value = (x.transpose(1, 2) for x in made)
        return query, key, value
    query, key, value = attn.norm_q(joint[0]), attn.norm_k(joint[1]), joint[2]
    if added is not None:
        query = torch.cat([attn.norm_added_q(added[0]), query], dim=1)
        key = torch.cat([attn.norm_added_k(added[1]), key], dim=1)
        value = torch.cat([added[2], value], dim=1)
    if rotary_emb is not None:
        query = apply_rotary_emb(query, rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, rotary_emb, sequence_dim=1)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def by_heads(projections: Iterable[Tensor], attn: Any) -> list[Tensor]:
    """``[B, L, H, D]`` of ``[B, L, C]``; by the head size, since tensor parallelism cuts heads."""
    return [one.unflatten(-1, (-1, attn.head_dim)) for one in projections]


def _three(x: Tensor, to: Any, attn: Any) -> list[Tensor]:
    """Three projections, or one that is fused, by heads."""
    made = (one(x) for one in to) if isinstance(to, tuple) else to(x).chunk(3, dim=-1)
    return by_heads(made, attn)


def self_attention(model: Any) -> list[Any]:
    """Of both kinds of block, in the order in which they run."""
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


def _geometry(model: Any, given: Mapping[str, Any]) -> Geometry:
    grid, *references = grids_of(given.get("img_ids"), 3)
    text = slice(0, given["encoder_hidden_states"].shape[1])
    return Geometry(grid, text=text, more=tuple(references))


def _refuses(model: Any) -> str | None:
    adapted = any(
        isinstance(attn.processor, FluxIPAdapterAttnProcessor) for attn in self_attention(model)
    )
    return _IP_ADAPTER if adapted else None


FAMILY = Family(
    name="FLUX.1",
    processor=FluxProcessor,
    processor_type=FluxProcessor,
    self_attention=self_attention,
    geometry=_geometry,
    refuses=_refuses,
)
