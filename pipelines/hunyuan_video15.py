"""HunyuanVideo 1.5: joint attention over video, then image, glyphs and text, padding last.

Its transformer puts the valid tokens of all three texts first, so that the mask says how many there
are. diffusers makes a mask ``[B, 1, L, L]`` of it in every layer: about 12 GiB for a clip of 121
frames at 720p. Here it never is larger than ``[B, 1, 1, L]``, in dense steps and layers too. Only
queries that are padding can tell the difference, and nothing reads those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor

from dit_accel.pipelines.families import Family
from dit_accel.pipelines.hunyuan_video import HunyuanVideoProcessor, joint_geometry
from dit_accel.types import Context, Geometry


class HunyuanVideo15Processor(HunyuanVideoProcessor):
    """Runs a method in the joint attention of a HunyuanVideo 1.5 transformer.

    The mask that diffusers gives, ``[B, L_text]``, is known to the geometry already. The refiner of
    the text runs diffusers' own code. One instance may serve all modules.
    """

    def _dense(
        self,
        attn: Attention,
        video: Tensor,
        text: Tensor,
        mask: Tensor | None,
        rotary_emb: tuple[Tensor, Tensor] | None,
        ctx: Context,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers, by the backend that it was told to use, without its mask of all pairs."""
        valid = ctx.geometry.key_valid
        query, key, value = self._project(attn, video, text, rotary_emb)
        out = dispatch_attention_fn(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if valid is None else valid[:, None, None, :],
            backend=self._attention_backend,
        )
        return self._project_out(attn, out.type_as(query), text.shape[1])


def _geometry(model: Any, given: Mapping[str, Any]) -> Geometry:
    image = given["image_embeds"]
    masks = given["encoder_attention_mask"], given["encoder_attention_mask_2"]
    # without an image its tokens are zeros, all of them in the whole batch
    valid = (image != 0).any() * image.shape[1] + sum(mask.bool().sum(dim=1) for mask in masks)
    num_text = image.shape[1] + sum(mask.shape[1] for mask in masks)
    return joint_geometry(model, given["hidden_states"], num_text, valid)


FAMILY = Family(
    name="HunyuanVideo 1.5",
    processor=HunyuanVideo15Processor,
    processor_type=HunyuanVideo15Processor,
    self_attention=lambda model: [block.attn for block in model.transformer_blocks],
    geometry=_geometry,
)
