"""A tiny random pipeline of every family, whole: texts and images go in, frames come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from families import (
    PROMPTS,
    flux2,
    flux_dev,
    flux_schnell,
    hunyuan,
    hunyuan15,
    hunyuan15_i2v,
    hunyuan_i2v,
    klein,
    klein_kv,
    kontext,
    wan,
    wan_5b,
    wan_a14b,
    wan_i2v,
    wan_i2v_5b,
    wan_i2v_a14b,
    wan_vace,
)
from PIL import Image


@dataclass(frozen=True)
class Specimen:
    """One kind of checkpoint.

    Attributes:
        name: of the test.
        make: the pipeline.
        call: arguments of a small call, beside prompt, generator and the kind of output.
        branches: forwards in a step, each a guidance branch.
        layers: attention modules of one transformer that a method may replace.
        image: the pipeline wants one.
        video: clips come out, in place of images.
        short: attributes of the pipeline that make a test quick.
    """

    name: str
    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    branches: int = 1
    layers: int = 2
    image: bool = False
    video: bool = True
    short: dict[str, int] = field(default_factory=dict)

    def arguments(self, image: tuple[int, int] = (80, 64)) -> dict[str, Any]:
        """Of a call; an image of so many columns and rows where the pipeline wants one."""
        return {**self.call, **({"image": picture(*image)} if self.image else {})}


def picture(width: int, height: int) -> Image.Image:
    """Smooth, and nowhere the same."""
    made = Image.new("RGB", (width, height))
    made.putdata(
        [
            (255 * x // width, 255 * y // height, (7 * x + 3 * y) % 256)
            for y in range(height)
            for x in range(width)
        ]
    )
    return made


CLIP = {"height": 64, "width": 48, "num_frames": 5, "num_inference_steps": 2}
WAN_CALL = {**CLIP, "guidance_scale": 3.0, "max_sequence_length": 24}
# two steps for each transformer
A14B = {**WAN_CALL, "num_inference_steps": 4}
# what is left of the template, the prompt, and padding
LONG = {**CLIP, "num_frames": 9, "max_sequence_length": 96}
PICTURE = {"height": 96, "width": 80, "num_inference_steps": 2, "max_sequence_length": 24}
# its system message alone is more than a hundred tokens
FLUX2 = {**PICTURE, "max_sequence_length": 192}
HUNYUAN15 = {"num_frames": 9, "num_inference_steps": 2}
# in place of 1000 tokens of language, 256 of glyphs, and 729 that stand for an image
SHORT = {
    "tokenizer_max_length": 64, "tokenizer_2_max_length": 12, "vision_num_semantic_tokens": 9,
}  # fmt: skip

EVERY = {
    specimen.name: specimen
    for specimen in (
        Specimen("wan", wan, WAN_CALL, 2),
        Specimen("wan_a14b", wan_a14b, A14B, 2),
        Specimen("wan_5b", wan_5b, WAN_CALL, 2),
        Specimen("wan_i2v", wan_i2v, WAN_CALL, 2, image=True),
        Specimen("wan_i2v_a14b", wan_i2v_a14b, A14B, 2, image=True),
        Specimen("wan_i2v_5b", wan_i2v_5b, WAN_CALL, 2, image=True),
        Specimen("wan_vace", wan_vace, WAN_CALL, 2, layers=4),
        Specimen("hunyuan", hunyuan, {**LONG, "negative_prompt": "", "true_cfg_scale": 3.0}, 2),
        Specimen("hunyuan_i2v", hunyuan_i2v, LONG, image=True),
        Specimen("hunyuan15", hunyuan15, {**HUNYUAN15, "height": 96, "width": 64}, 2, short=SHORT),
        Specimen("hunyuan15_i2v", hunyuan15_i2v, HUNYUAN15, 2, image=True, short=SHORT),
        Specimen("flux_dev", flux_dev, PICTURE, video=False),
        Specimen("flux_schnell", flux_schnell, PICTURE, video=False),
        Specimen(
            "kontext",
            kontext,
            {**PICTURE, "max_area": 96 * 80, "_auto_resize": False},
            image=True,
            video=False,
        ),
        Specimen("flux2", flux2, FLUX2, video=False),
        Specimen("flux2_image", flux2, FLUX2, image=True, video=False),
        Specimen("klein", klein, {**PICTURE, "guidance_scale": 3.0}, 2, video=False),
        Specimen(
            "klein_image", klein, {**PICTURE, "guidance_scale": 3.0}, 2, image=True, video=False
        ),
        Specimen("klein_kv", klein_kv, PICTURE, video=False),
        Specimen("klein_kv_image", klein_kv, PICTURE, image=True, video=False),
    )
}


@cache
def built(make: Callable[[], Any]) -> Any:
    """A pipeline, made once."""
    torch.manual_seed(0)
    return make()


@torch.no_grad()
def go(
    pipe: Any, specimen: Specimen, prompt: Any = PROMPTS[0], seed: int = 0, **arguments: Any
) -> Any:
    """What a call of a pipeline returns: latents, unless told otherwise."""
    call = {**specimen.arguments(), "output_type": "latent", **arguments}
    made = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call)
    return made.frames if specimen.video else made.images


def models_of(pipe: Any) -> dict[str, Any]:
    """The transformers."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("transformer") and part is not None
    }


Call = tuple[str, dict[str, Any]]


def calls_of(pipe: Any, specimen: Specimen, **arguments: Any) -> list[Call]:
    """What a pipeline's call gives its transformers, in order: the name of one, and arguments."""
    calls: list[Call] = []
    handles = [
        model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append((name, copied(kwargs))),
            with_kwargs=True,
        )
        for name, model in models_of(pipe).items()
    ]
    try:
        go(pipe, specimen, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def copied(kwargs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Arguments with tensors of their own, floating ones in another dtype if one is given."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(x) for x in value]
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(dtype, copy=True) if dtype and value.is_floating_point() else value.clone()

    return {name: one(value) for name, value in kwargs.items()}


@torch.no_grad()
def replay(models: dict[str, Any], calls: list[Call]) -> list[torch.Tensor]:
    """The transformers' outputs for the calls of a pipeline."""
    outputs, cache = [], None
    for name, kwargs in calls:
        if "kv_cache" in kwargs:  # klein KV: what the first step made
            kwargs = {**kwargs, "kv_cache": cache}
        out = models[name](**{**kwargs, "return_dict": False})
        cache = out[1] if len(out) > 1 else cache
        outputs.append(out[0])
    return outputs


def joined(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """A batch of two, of the arguments of two."""

    def both(name: str, a: Any, b: Any) -> Any:
        if isinstance(a, list):
            return [both(name, x, y) for x, y in zip(a, b, strict=True)]
        # the positions of FLUX.1 are those of the whole batch, as is the scale of VACE
        if not isinstance(a, torch.Tensor) or (name.endswith("_ids") and a.ndim == 2):
            return a
        return a if name == "control_hidden_states_scale" else torch.cat([a, b])

    return {name: both(name, value, two[name]) for name, value in one.items()}
