"""HunyuanVideo 1.5: joint attention over video, then image, glyphs and text, padding last.

Its transformer puts the valid tokens of all three texts first, so that the mask says how many there
are. diffusers makes a mask ``[B, 1, L, L]`` of it in every layer: about 12 GiB for a clip of 121
frames at 720p. Here it never is larger than ``[B, 1, 1, L]``, in dense steps and layers too. Only
queries that are padding can tell the difference, and nothing reads those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dit_accel.pipelines.families import Family
from dit_accel.pipelines.hunyuan_video import HunyuanVideoProcessor, joint_geometry
from dit_accel.types import Geometry


class HunyuanVideo15Processor(HunyuanVideoProcessor):
    """Runs a method in the joint attention of a HunyuanVideo 1.5 transformer.

    The mask that diffusers gives, ``[B, L_text]``, is known to the geometry already. The refiner of
    the text runs diffusers' own code. One instance may serve all modules.
    """

    def steps_aside(self, attn: Any, hidden_states: Tensor, beside: int = 0) -> bool:
        """Never: dense steps go by `run`, which asks diffusers for attention, and not for masks."""
        return False

    def run(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As in the base, with a mask of the keys in place of one of the text."""
        valid = self.begin(attn)[1].geometry.key_valid
        return super().run(attn, q, k, v, None if valid is None else valid[:, None, None, :])


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
