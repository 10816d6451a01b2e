"""Wan 2.1, 2.2 and VACE: self-attention over row-major video tokens, text in its own layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor

from dit_accel.errors import InputError
from dit_accel.pipelines.families import Family
from dit_accel.pipelines.norms import Angles, Projected, angles_of_channels
from dit_accel.pipelines.session import MethodProcessor
from dit_accel.types import Geometry


class WanProcessor(MethodProcessor, WanAttnProcessor):
    """Runs a method in the self-attention of a Wan transformer.

    Cross-attention, with the image branch of image-to-video, and every step or layer that the
    method leaves dense run diffusers' own code. One instance may serve all modules.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention as diffusers calls it.

        Args:
            attn: the module; its transformer must be prepared.
            hidden_states: ``[B, L, C]``.
            encoder_hidden_states: text, in cross-attention only.
            attention_mask: ``None``; diffusers never gives one to Wan's self-attention.
            rotary_emb: cosines and sines, ``[1, L, 1, D]`` each.

        Returns:
            ``[B, L, C]``.

        Raises:
            InputError: the transformer is not prepared, a mask came, or the sequence is sharded.
        """
        if attn.is_cross_attention or encoder_hidden_states is not None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        if attention_mask is not None:
            raise InputError(
                f"{self.method.name}: expected no mask in Wan's self-attention, got one of shape "
                f"{list(attention_mask.shape)}"
            )
        if self.steps_aside(attn, hidden_states):
            return super().__call__(attn, hidden_states, rotary_emb=rotary_emb)
        q, k, v = self._project(attn, hidden_states, rotary_emb)
        out = self.attend(attn, *(x.transpose(1, 2) for x in (q, k, v)))
        out = out.type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](out))

    def _project(
        self, attn: WanAttention, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[B, L, H, D]``."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (to(hidden_states) for to in (attn.to_q, attn.to_k, attn.to_v))
        parts = [x.unflatten(2, (attn.heads, -1)) for x in (query, key, value)]
        angles = None if rotary_emb is None else _angles(*rotary_emb, parts[0])
        made = self.normed(attn, [Projected.of(parts, attn.norm_q, attn.norm_k)], "token", angles)
        if made is None:
            query, key = attn.norm_q(query), attn.norm_k(key)
            query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
            if rotary_emb is not None:
                query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        else:
            query, key, value = made
        # the norms may come out wider than the projections
        return query, key, value.type_as(query)


def _angles(cos: Tensor, sin: Tensor, like: Tensor) -> Angles | str:
    """As `angles_of_channels`, of angles ``[1, L, 1, D]``."""
    if cos.ndim != 4 or cos.shape[0] != 1 or cos.shape[2] != 1 or cos.shape != sin.shape:
        return f"angles are {list(cos.shape)} and {list(sin.shape)}"
    return angles_of_channels(cos[0, :, 0], sin[0, :, 0], like)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of channel pairs ``(0, 1), (2, 3), …`` by angles given for every channel.

    Args:
        x: ``[B, L, H, D]``.
        cos, sin: ``[1, L, 1, D]``, each pair of channels alike.

    Returns:
        As ``x``; computed in the wider of the two dtypes.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = x.new_empty(x.shape)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def _self_attention(model: Any) -> list[Any]:
    # those of VACE, which run before all others
    control = getattr(model, "vace_blocks", ())
    return [block.attn1 for block in (*control, *model.blocks)]


def _geometry(model: Any, given: Mapping[str, Any]) -> Geometry:
    latent = given["hidden_states"]
    if latent.ndim != 5:
        raise InputError(
            f"hidden_states: expected latents [B, C, T, H, W], got shape {list(latent.shape)}"
        )
    frames, rows, columns = (
        size // patch for size, patch in zip(latent.shape[2:], model.config.patch_size, strict=True)
    )
    return Geometry((frames, rows, columns))


FAMILY = Family(
    name="Wan 2.1, 2.2 and VACE",
    processor=WanProcessor,
    processor_type=WanProcessor,
    self_attention=_self_attention,
    geometry=_geometry,
)
