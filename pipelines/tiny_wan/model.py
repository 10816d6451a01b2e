"""The parts of ``tiny-wan`` before training: stock classes of diffusers and transformers, small.

Sizes are chosen so that all weights in half precision stay below 16 MiB, and so that the default
clip (17 frames of 128×128) is 9×16×16 = 2,304 tokens for the transformer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_accel.pipelines.tiny_wan import scenes

FRAMES: Final = 17
HEIGHT: Final = 128
WIDTH: Final = 128
FLOW_SHIFT: Final = 3.0
"""Shift of the noise schedule, in training and in sampling alike."""
TEXT_LENGTH: Final = 512
"""Text tokens that stock ``WanPipeline`` pads prompts to; trained with the same number."""

AUTOENCODER: Final[dict[str, Any]] = {
    "base_dim": 48,
    "z_dim": 16,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "is_residual": True,
    "in_channels": 48,
    "out_channels": 48,
    "patch_size": 4,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
TRANSFORMER: Final[dict[str, Any]] = {
    "patch_size": (1, 1, 1),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 256,
    "ffn_dim": 768,
    "num_layers": 6,
    "cross_attn_norm": True,
    "rope_max_seq_len": 256,
}
TEXT_ENCODER: Final[dict[str, Any]] = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the captions' vocabulary, lower-cased; punctuation is dropped."""
    special = ["<pad>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *scenes.vocabulary()])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(",", " "), normalizers.Replace(".", " ")]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
        padding_side="right",
    )


def text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """An untrained UMT5 encoder."""
    config = UMT5Config(vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, **TEXT_ENCODER)
    return UMT5EncoderModel(config)


def scheduler() -> UniPCMultistepScheduler:
    """The solver that Wan itself uses, for flow matching."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
    )


def untrained(
    autoencoder: dict[str, Any] | None = None, transformer: dict[str, Any] | None = None
) -> WanPipeline:
    """The whole pipeline with random weights; the arguments override single sizes."""
    words = tokenizer()
    return WanPipeline(
        tokenizer=words,
        text_encoder=text_encoder(len(words)),
        vae=AutoencoderKLWan(**{**AUTOENCODER, **(autoencoder or {})}),
        scheduler=scheduler(),
        transformer=WanTransformer3DModel(**{**TRANSFORMER, **(transformer or {})}),
    )


def save(pipe: WanPipeline, directory: Path, dtype: torch.dtype = torch.float16) -> int:
    """Write a stock pipeline directory in half precision; returns its size in bytes."""
    for module in (pipe.vae, pipe.transformer, pipe.text_encoder):
        module.to(dtype)
    pipe.save_pretrained(directory, safe_serialization=True)
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
