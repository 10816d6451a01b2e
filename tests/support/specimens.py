"""A tiny random pipeline of every family, whole: texts and images go in, frames come out.

Every class is the one that a real checkpoint of the family has, or, for tokenizers, one that the
pipeline cannot tell from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from dit_accel.pipelines.tiny_wan import model as tiny_wan

PROMPTS = ("a red circle moves right", 'two blue "stars" spin')
SPECIAL = (
    "<pad>", "</s>", "<unk>", "<s>", "<image>", "\n\n",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
# pieces of four letters: about as many tokens as real tokenizers make of the pipelines' templates
PIECE = r"[a-z]{1,4}|[0-9]+|[^\sa-z0-9]"
CHAT = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|eot_id|>{% endfor %}"
)


def tokenizer(length: int = 512, begin: str = "", end: str = "</s>") -> Any:
    """Pieces of words; what no prompt has is unknown."""
    import re

    pieces = sorted({piece for text in PROMPTS for piece in re.findall(PIECE, text.lower())})
    words = {word: i for i, word in enumerate([*SPECIAL, *pieces])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}".strip(),
        special_tokens=[(word, words[word]) for word in SPECIAL],
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        additional_special_tokens=list(SPECIAL[4:]),
        model_max_length=length,
        padding_side="right",
    )
    made.chat_template = CHAT
    return made


WORDS = len(tokenizer())
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}


def decoder(layers: int) -> dict[str, Any]:
    """Of a language model."""
    return {
        **SMALL, **TOKENS, "num_hidden_layers": layers, "num_key_value_heads": 1,
        "head_dim": 8, "max_position_embeddings": 2048,
    }  # fmt: skip


def t5(kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=max(WORDS, 384), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip_text() -> Any:
    config = transformers.CLIPTextConfig(
        **SMALL, **TOKENS, num_hidden_layers=1, max_position_embeddings=77, projection_dim=16
    )
    return transformers.CLIPTextModel(config)


def clip_vision(size: int, patch: int) -> dict[str, Any]:
    return {
        **SMALL, "num_hidden_layers": 2, "image_size": size, "patch_size": patch,
        "projection_dim": 16,
    }  # fmt: skip


def clip_images(size: int) -> Any:
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def euler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def sharpened(model: Any) -> Any:
    """Attention of fresh weights is all but flat: sharpen it, so that what is dropped shows."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and any(f".norm_{x}." in name for x in ("q", "k", "added_q")):
            torch.nn.init.normal_(weight, mean=2.0, std=0.5)
    return model.eval()


# Wan


WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32,
    "in_channels": 16, "out_channels": 16, "text_dim": 16, "freq_dim": 16, "num_layers": 2,
    "rope_max_seq_len": 64,
}  # fmt: skip


def wan_parts(cls: str = "WanTransformer3DModel", **config: Any) -> dict[str, Any]:
    made = getattr(diffusers, cls)(**{**WAN, **config})
    return {
        "tokenizer": tokenizer(),
        "text_encoder": t5("UMT5"),
        "vae": diffusers.AutoencoderKLWan(**{**tiny_wan.AUTOENCODER, "base_dim": 8}),
        "scheduler": tiny_wan.scheduler(),
        "transformer": sharpened(made),
    }


def wan_vae_of_images() -> Any:
    """Image-to-video hands pixels, so its autoencoder has no patches."""
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, False, True], scale_factor_temporal=2,
        latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    )  # fmt: skip


def other(model: Any) -> Any:
    """A model of the same sizes with other weights."""
    made = copy.deepcopy(model)
    for weight in made.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.1)
    return made


def wan() -> Any:
    return diffusers.WanPipeline(**wan_parts())


def wan_a14b() -> Any:
    parts = wan_parts()
    return diffusers.WanPipeline(
        **parts, transformer_2=other(parts["transformer"]), boundary_ratio=0.8
    )


def wan_5b() -> Any:
    return diffusers.WanPipeline(**wan_parts(), expand_timesteps=True)


def wan_i2v() -> Any:
    parts = wan_parts(in_channels=34, image_dim=16, added_kv_proj_dim=48)
    vision = transformers.CLIPVisionConfig(**clip_vision(32, 8))
    return diffusers.WanImageToVideoPipeline(
        **{**parts, "vae": wan_vae_of_images()},
        image_encoder=transformers.CLIPVisionModel(vision),
        image_processor=clip_images(32),
    )


def wan_i2v_a14b() -> Any:
    parts = {**wan_parts(in_channels=34), "vae": wan_vae_of_images()}
    return diffusers.WanImageToVideoPipeline(
        **parts, transformer_2=other(parts["transformer"]), boundary_ratio=0.8
    )


def wan_i2v_5b() -> Any:
    parts = {**wan_parts(), "vae": wan_vae_of_images()}
    return diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)


def wan_vace() -> Any:
    parts = wan_parts("WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=96)
    return diffusers.WanVACEPipeline(**{**parts, "vae": wan_vae_of_images()})


# HunyuanVideo


HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16,
    "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip


def hunyuan_parts(**config: Any) -> dict[str, Any]:
    made = diffusers.HunyuanVideoTransformer3DModel(**{**HUNYUAN, **config})
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return {
        "tokenizer": tokenizer(begin="<s>", end=""),
        "transformer": sharpened(made),
        "vae": vae,
        "scheduler": euler(shift=7.0),
        "text_encoder_2": clip_text(),
        "tokenizer_2": tokenizer(77),
    }


def hunyuan() -> Any:
    text = transformers.LlamaModel(transformers.LlamaConfig(**decoder(3)))
    return diffusers.HunyuanVideoPipeline(text_encoder=text, **hunyuan_parts())


def hunyuan_i2v() -> Any:
    text = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**decoder(3)),
            vision_config=transformers.CLIPVisionConfig(**clip_vision(48, 2)),
            image_token_index=SPECIAL.index("<image>"),
            pad_token_id=0,
            vision_feature_layer=-1,
        )
    )
    # as the published weights have it: the first frame is kept, and its tokens are modulated apart
    parts = hunyuan_parts(image_condition_type="token_replace", guidance_embeds=True)
    return diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=text, image_processor=clip_images(48), **parts
    )


def hunyuan15_parts(channels: int, **config: Any) -> dict[str, Any]:
    made = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=2 * channels + 1, out_channels=channels, num_attention_heads=2,
        attention_head_dim=16, num_layers=2, num_refiner_layers=1, text_embed_dim=16,
        text_embed_2_dim=16, image_embed_dim=16, rope_axes_dim=(4, 6, 6), target_size=64, **config,
    )  # fmt: skip
    text = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig(
        **decoder(3), rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=channels, block_out_channels=(8, 8, 16, 16, 16), layers_per_block=1
    )
    return {
        "text_encoder": transformers.Qwen2_5_VLTextModel(text),
        "tokenizer": tokenizer(),
        "transformer": sharpened(made),
        "vae": vae,
        "scheduler": euler(shift=5.0),
        "text_encoder_2": t5(),
        "tokenizer_2": transformers.ByT5Tokenizer(),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    }


def hunyuan15() -> Any:
    return diffusers.HunyuanVideo15Pipeline(**hunyuan15_parts(4))


def hunyuan15_i2v() -> Any:
    vision = transformers.SiglipVisionConfig(
        **SMALL, num_hidden_layers=1, image_size=6, patch_size=2
    )
    return diffusers.HunyuanVideo15ImageToVideoPipeline(
        **hunyuan15_parts(4),
        image_encoder=transformers.SiglipVisionModel(vision),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 6, "width": 6}),
    )


# FLUX


FLUX = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
}  # fmt: skip


def images(cls: Any, **config: Any) -> Any:
    return cls(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        **config,
    )  # fmt: skip


def flux_parts(**config: Any) -> dict[str, Any]:
    made = diffusers.FluxTransformer2DModel(
        **FLUX, in_channels=16, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), **config,
    )  # fmt: skip
    vae = images(
        diffusers.AutoencoderKL, scaling_factor=0.36, shift_factor=0.1, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    return {
        "scheduler": euler(use_dynamic_shifting=True),
        "vae": vae,
        "text_encoder": clip_text(),
        "tokenizer": tokenizer(77),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(),
        "transformer": sharpened(made),
    }


def flux_dev() -> Any:
    return diffusers.FluxPipeline(**flux_parts(guidance_embeds=True))


def flux_schnell() -> Any:
    return diffusers.FluxPipeline(**{**flux_parts(), "scheduler": euler(shift=1.0)})


def kontext() -> Any:
    return diffusers.FluxKontextPipeline(**flux_parts(guidance_embeds=True))


def flux2_parts(text_layers: int, **config: Any) -> dict[str, Any]:
    made = diffusers.Flux2Transformer2DModel(
        **FLUX, in_channels=16, joint_attention_dim=3 * 16, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), **config,
    )  # fmt: skip
    return {
        "scheduler": euler(use_dynamic_shifting=True),
        "vae": images(diffusers.AutoencoderKLFlux2),
        "tokenizer": tokenizer(),
        "transformer": sharpened(made),
    }


def flux2() -> Any:
    text = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**decoder(30)),
        vision_config=transformers.PixtralVisionConfig(**SMALL, num_hidden_layers=1),
        image_token_index=SPECIAL.index("<image>"),
    )
    return diffusers.Flux2Pipeline(
        text_encoder=transformers.Mistral3ForConditionalGeneration(text), **flux2_parts(30)
    )


def klein(cls: str = "Flux2KleinPipeline", **config: Any) -> Any:
    text = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**decoder(27)))
    return getattr(diffusers, cls)(
        text_encoder=text, **flux2_parts(27, guidance_embeds=False), **config
    )


def klein_kv() -> Any:
    return klein("Flux2KleinKVPipeline")


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
