"""How the tiny random pipelines of `specimens` are made: one function each.

Every class is the one that a real checkpoint of the family has, or, for tokenizers, one that the
pipeline cannot tell from it.
"""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import torch
import transformers
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
