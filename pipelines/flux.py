"""FLUX.1: joint attention over text, then image tokens in row-major order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.pipelines.families import Family
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
            attn, *self._project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        )
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)

    @staticmethod
    def _project(
        attn: FluxAttention,
        hidden_states: Tensor,
        text: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[B, H, L, D]``, a view of ``[B, L, H, D]``."""
        fused = attn.fused_projections
        apart = None if fused else (attn.to_q, attn.to_k, attn.to_v)
        joint = _three(hidden_states, apart or attn.to_qkv, attn)
        query, key, value = attn.norm_q(joint[0]), attn.norm_k(joint[1]), joint[2]
        if text is not None:
            apart = None if fused else (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            added = _three(text, apart or attn.to_added_qkv, attn)
            query = torch.cat([attn.norm_added_q(added[0]), query], dim=1)
            key = torch.cat([attn.norm_added_k(added[1]), key], dim=1)
            value = torch.cat([added[2], value], dim=1)
        if rotary_emb is not None:
            query = apply_rotary_emb(query, rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, rotary_emb, sequence_dim=1)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _three(x: Tensor, to: Any, attn: FluxAttention) -> list[Tensor]:
    """Three projections, or one that is fused, by heads: ``[B, L, H, D]`` each."""
    made = [one(x) for one in to] if isinstance(to, tuple) else to(x).chunk(3, dim=-1)
    # by the head size: under tensor parallelism there are fewer heads than attn.heads
    return [one.unflatten(-1, (-1, attn.head_dim)) for one in made]


def _self_attention(model: Any) -> list[Any]:
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


# of positions that a pipeline makes once and gives at every step: the version they had, the grid
_known: Any = WeakTensorKeyDictionary()


def _geometry(model: Any, given: Mapping[str, Any]) -> Geometry:
    ids = given.get("img_ids")
    if not isinstance(ids, Tensor) or ids.ndim not in (2, 3) or ids.shape[-1] != 3:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"img_ids: expected positions [L, 3], got {got}")
    version = None if ids.is_inference() else ids._version
    if ids not in _known or _known[ids][0] != version:
        _known[ids] = version, _grid(ids if ids.ndim == 2 else ids[0])
    return Geometry(_known[ids][1], text=slice(0, given["encoder_hidden_states"].shape[1]))


def _grid(ids: Tensor) -> tuple[int, int, int]:
    """Images, rows, columns of positions ``[L, 3]``, which must make a grid in row-major order.

    A reference image of Kontext counts as one more frame.
    """
    ids = ids.cpu()  # one wait for the GPU in place of several
    axes = [ids[:, i].unique() for i in range(3)]
    images, rows, columns = (len(axis) for axis in axes)
    whole = math.prod((images, rows, columns)) == len(ids)
    if not whole or not torch.equal(torch.cartesian_prod(*axes), ids):
        raise InputError(
            "img_ids: expected the positions of one image, or of several that are equally large "
            f"(for Kontext: height and width as the reference's), row by row, got {len(ids)} of "
            f"{images} image(s), {rows} rows and {columns} columns"
        )
    return images, rows, columns


def _refuses(model: Any) -> str | None:
    adapted = any(
        isinstance(attn.processor, FluxIPAdapterAttnProcessor) for attn in _self_attention(model)
    )
    return _IP_ADAPTER if adapted else None


FAMILY = Family(
    name="FLUX.1",
    processor=FluxProcessor,
    processor_type=FluxProcessor,
    self_attention=_self_attention,
    geometry=_geometry,
    refuses=_refuses,
)
