"""What to generate, and how each pipeline of diffusers is asked for it.

A pipeline is a row of `_TABLE`, by the name of its class, which a checkpoint's ``model_index.json``
tells before any weight is read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from dit_accel.errors import InputError
from dit_accel.options import closest
from dit_accel.pipelines import embedded
from dit_accel.pipelines.families import models_of
from dit_accel.pipelines.plug import EMBEDDED

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate. ``None`` leaves a value to the model.

    Attributes:
        prompt, negative_prompt: texts.
        height, width: pixels.
        frames: of the clip.
        steps: denoising steps.
        guidance: scale of guidance, as the pipeline understands it; 1 turns classifier-free
            guidance off.
        seed: of the noise, drawn on the CPU, so that it is the same on every device.
        image: to start from, or to edit.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    image: Image | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """How a pipeline is asked.

    Attributes:
        name: of its class.
        video: whether clips come out, in place of an image.
        arguments: fields of a request, and the names that the pipeline's call has for them.
        refuses: fields that it has no use for, and why; what is in neither it does not know.
        needs_image: whether it does not work without one.
        unit: pixels that height and width must be a multiple of.
        more: further arguments that a request asks for.
        unguided: why a checkpoint has no use for a scale of guidance, if there is a reason.
    """

    name: str
    video: bool
    arguments: Mapping[str, str]
    refuses: Mapping[str, str]
    unit: Callable[[Any], int]
    needs_image: bool = False
    more: Callable[[Any, Request], dict[str, Any]] = lambda pipe, request: {}
    unguided: Callable[[Any], str | None] = lambda pipe: None

    def default(self, name: str) -> Any:
        """The pipeline's own value of a field; ``None`` where it goes by something else."""
        import diffusers

        call = getattr(diffusers, self.name).__call__
        theirs = self.arguments.get(name)
        return None if theirs is None else inspect.signature(call).parameters[theirs].default


_SIZE: Final = {"height": "height", "width": "width"}
_STEPS: Final = {"steps": "num_inference_steps"}
_GUIDANCE: Final = {"guidance": "guidance_scale"}
_NEGATIVE: Final = {"negative_prompt": "negative_prompt"}
_FRAMES: Final = {"frames": "num_frames"}
_IMAGE: Final = {"image": "image"}
_CLIP: Final = {**_FRAMES, **_STEPS}
_NO_IMAGE: Final = {"image": "it starts from text alone"}
_ONE: Final = {"frames": "it makes one image"}
_TRUE_CFG: Final = {
    "negative_prompt": "one counts only beside a true_cfg_scale, which is left at 1 here"
}
_NO_NEGATIVE: Final = {"negative_prompt": "it takes none"}


def _of_video(pipe: Any) -> int:
    """Multiples of a token; diffusers asks for 16 in any case."""
    patch = next(iter(models_of(pipe).values())).config.patch_size
    across = patch if isinstance(patch, int) else patch[-1]
    return math.lcm(16, pipe.vae_scale_factor_spatial * across)


def _of_image(pipe: Any) -> int:
    return 2 * int(pipe.vae_scale_factor)


def _not_embedded(pipe: Any) -> str | None:
    if pipe.transformer.config.guidance_embeds:
        return None
    return "this checkpoint was distilled to do without"


def _distilled(pipe: Any) -> str | None:
    return "this checkpoint was distilled to do without" if pipe.config.is_distilled else None


def _area(pipe: Any, request: Request) -> dict[str, Any]:
    """Kontext would take the ratio of the sizes alone, and a million pixels of its own."""
    if request.height is None and request.width is None:
        return {}
    own = pipe.default_sample_size * pipe.vae_scale_factor
    return {"max_area": (request.height or own) * (request.width or own)}


def _chunks(pipe: Any, request: Request) -> dict[str, Any]:
    """Block diffusion is told its chunks; those of the checkpoint fit one length only."""
    own = list(next(iter(models_of(pipe).values())).config.chunk_partition)
    assert request.frames is not None
    left = (request.frames - 1) // pipe.vae_scale_factor_temporal + 1
    if left == sum(own):
        return {}
    chunks = [min(own[0], left)]
    while sum(chunks) < left:
        chunks.append(min(max(own), left - sum(chunks)))
    return {"chunk_partition": chunks}


def _wan(name: str, *, image: bool = False) -> Kind:
    return Kind(
        name,
        video=True,
        arguments={**_SIZE, **_CLIP, **_GUIDANCE, **_NEGATIVE, **(_IMAGE if image else {})},
        refuses={} if image else _NO_IMAGE,
        unit=_of_video,
        needs_image=image,
    )


def _hunyuan(name: str, *, image: bool = False) -> Kind:
    return Kind(
        name,
        video=True,
        arguments={**_SIZE, **_CLIP, **_GUIDANCE, **(_IMAGE if image else {})},
        refuses={**_TRUE_CFG, **({} if image else _NO_IMAGE)},
        unit=_of_video,
        needs_image=image,
        unguided=_not_embedded,
    )


def _hunyuan15(name: str, *, image: bool = False) -> Kind:
    # the scale of guidance is not an argument: it belongs to a component, pipe.guider
    follows = dict.fromkeys(_SIZE, "it follows the image's shape, at the model's own size")
    return Kind(
        name,
        video=True,
        arguments={**_CLIP, **_NEGATIVE, **(_IMAGE if image else _SIZE)},
        refuses=follows if image else _NO_IMAGE,
        unit=_of_video,
        needs_image=image,
    )


_TABLE: Final = {
    kind.name: kind
    for kind in (
        _wan("WanPipeline"),
        _wan("WanImageToVideoPipeline", image=True),
        _wan("WanVACEPipeline"),
        replace(_wan("AnyFlowFARPipeline"), more=_chunks),
        _hunyuan("HunyuanVideoPipeline"),
        _hunyuan("HunyuanVideoImageToVideoPipeline", image=True),
        _hunyuan15("HunyuanVideo15Pipeline"),
        _hunyuan15("HunyuanVideo15ImageToVideoPipeline", image=True),
        Kind(
            "FluxPipeline",
            video=False,
            arguments={**_SIZE, **_STEPS, **_GUIDANCE},
            refuses={**_ONE, **_TRUE_CFG, **_NO_IMAGE},
            unit=_of_image,
            unguided=_not_embedded,
        ),
        Kind(
            "FluxKontextPipeline",
            video=False,
            arguments={**_SIZE, **_STEPS, **_GUIDANCE, **_IMAGE},
            refuses={**_ONE, **_TRUE_CFG},
            unit=_of_image,
            more=_area,
            unguided=_not_embedded,
        ),
        Kind(
            "Flux2Pipeline",
            video=False,
            arguments={**_SIZE, **_STEPS, **_GUIDANCE, **_IMAGE},
            refuses={**_ONE, **_NO_NEGATIVE},
            unit=_of_image,
            unguided=_not_embedded,
        ),
        Kind(
            "Flux2KleinPipeline",
            video=False,
            arguments={**_SIZE, **_STEPS, **_GUIDANCE, **_IMAGE},
            refuses={**_ONE, **_NO_NEGATIVE},
            unit=_of_image,
            unguided=_distilled,
        ),
        Kind(
            "Flux2KleinKVPipeline",
            video=False,
            arguments={**_SIZE, **_STEPS, **_IMAGE},
            refuses={**_ONE, **_NO_NEGATIVE, "guidance": "it was distilled to do without"},
            unit=_of_image,
        ),
    )
}


def kind_named(name: str) -> Kind:
    """How the pipeline of a class is asked.

    Raises:
        InputError: this module does not know.
    """
    if name not in _TABLE:
        raise InputError(
            f"generate: expected one of {', '.join(_TABLE)}, got a {name}{closest(name, _TABLE)}; "
            "what accelerate takes can be called from Python all the same"
        )
    return _TABLE[name]


def kind_of(pipe: Any) -> Kind:
    """How a pipeline is asked; subclasses are asked like their bases.

    Raises:
        InputError: this module does not know.
    """
    names = [cls.__name__ for cls in type(pipe).__mro__]
    return kind_named(next((name for name in names if name in _TABLE), names[0]))


def check(kind: Kind, request: Request) -> None:
    """What can be said without the weights.

    Raises:
        InputError: the pipeline has no use for something, lacks something, or cannot be meant.
    """
    for name, reason in kind.refuses.items():
        value = getattr(request, name)
        if value is not None:
            got = "one" if name == "image" else repr(value)
            raise InputError(f"{name}: expected none for a {kind.name}, since {reason}, got {got}")
    if kind.needs_image and request.image is None:
        raise InputError(f"image: expected one, which a {kind.name} starts from, got none")
    for name in ("height", "width", "frames", "steps"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise InputError(f"{name}: expected a positive integer, got {value}")
    one_size = (request.height is None) != (request.width is None)
    if kind.video and one_size and kind.default("height") is None:
        raise InputError(
            f"height, width: expected both or neither for a {kind.name}, got {request.height} and "
            f"{request.width}"
        )
    guidance = request.guidance
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise InputError(f"guidance: expected a number, 0 or more, got {guidance}")
    if not 0 <= request.seed < 2**63:
        raise InputError(f"seed: expected an integer from 0 to 2^63 - 1, got {request.seed}")
    if not request.prompt.strip():
        raise InputError("prompt: expected some words, got none")


def effective(pipe: Any, request: Request) -> Request:
    """The request with the model's own values where none were given, all checked.

    What the pipeline itself takes from elsewhere, such as a size from an image, stays ``None``.

    Raises:
        InputError: a value does not fit the model.
    """
    kind = kind_of(pipe)
    check(kind, request)
    unguided = kind.unguided(pipe)
    if unguided is not None and request.guidance is not None:
        raise InputError(
            f"guidance: expected none for this {kind.name}, since {unguided}, got "
            f"{request.guidance:g}"
        )
    name = getattr(next(iter(models_of(pipe).values())), EMBEDDED, None)
    suggested = embedded.defaults(name) if name else {}
    missing = {
        mine: suggested.get(theirs, kind.default(mine))
        for mine, theirs in kind.arguments.items()
        if getattr(request, mine) is None and not (mine == "guidance" and unguided)
    }
    full = replace(request, **missing)
    guider = guider_of(pipe)
    if guider is not None and full.guidance is None:
        full = replace(full, guidance=float(guider.config.guidance_scale))
    unit = kind.unit(pipe)
    for name in _SIZE:
        value = getattr(full, name)
        if value is not None and value % unit:
            raise InputError(f"{name}: expected a multiple of {unit}, got {value}")
    if full.frames is not None:
        unit = pipe.vae_scale_factor_temporal
        if (full.frames - 1) % unit:
            raise InputError(
                f"frames: expected one more than a multiple of {unit}, got {full.frames}"
            )
    return full


def guider_of(pipe: Any) -> Any:
    """The component that holds the scale of guidance, where it is no argument of the call."""
    return pipe.components.get("guider")


def call_of(pipe: Any, request: Request) -> dict[str, Any]:
    """Arguments of the pipeline's call, for an effective request; not the generator."""
    kind = kind_of(pipe)
    given = {theirs: getattr(request, mine) for mine, theirs in kind.arguments.items()}
    return {
        "prompt": request.prompt,
        **{name: value for name, value in given.items() if value is not None},
        **kind.more(pipe, request),
    }
