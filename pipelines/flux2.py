"""FLUX.2: joint attention over text, then images in row-major order; blocks of two kinds.

FLUX.2 klein KV computes its references once: in the first step they attend to themselves alone,
and their keys and values are kept. A method there runs over text and result, and the references
beside them are computed exactly, as a partial of their own: see `Flux2Processor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2KVAttnProcessor,
    Flux2KVLayerCache,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttention,
)
from torch import Tensor

from dit_accel.attend import attend_all
from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.partial import merge
from dit_accel.pipelines.families import Family
from dit_accel.pipelines.flux import by_heads, normed, project, self_attention
from dit_accel.pipelines.positions import grids_of
from dit_accel.pipelines.session import MethodProcessor
from dit_accel.types import Geometry, Report

_QKV = tuple[Tensor, Tensor, Tensor]


class _Base:
    _attention_backend: Any = None
    _parallel_config: Any = None


class Flux2Processor(MethodProcessor, _Base):
    """Runs a method in the joint attention of a FLUX.2 transformer, in both kinds of block.

    Every step or layer that the method leaves dense runs diffusers' own code, that of klein KV,
    which is the same without references. One instance may serve all modules.
    """

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self._dual, self._single = Flux2KVAttnProcessor(), Flux2KVParallelSelfAttnProcessor()

    def __call__(
        self,
        attn: Flux2Attention | Flux2ParallelSelfAttention,
        hidden_states: Tensor,
        *inputs: Any,
        kv_cache: Flux2KVLayerCache | None = None,
        kv_cache_mode: str | None = None,
        num_txt_tokens: int = 0,
        num_ref_tokens: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as diffusers calls it.

        Args:
            attn: the module; its transformer must be prepared.
            hidden_states: images ``[B, L_image, C]``; text and images ``[B, L, C]`` in single
                blocks.
            inputs: text ``[B, L_text, C]``, in dual blocks alone; a mask, which must be ``None``;
                cosines and sines of all tokens, ``[L, D]`` each.
            kv_cache, kv_cache_mode: klein KV's memory of the references, and what to do with it:
                ``"extract"``, where they are in the sequence, between text and result, or
                ``"cached"``.
            num_txt_tokens: in single blocks with a ``kv_cache_mode``; unused, the geometry knows.
            num_ref_tokens: of the references, in the sequence or in the cache.

        Returns:
            ``[B, L, C]``, or images ``[B, L_image, C]`` and text ``[B, L_text, C]``.

        Raises:
            InputError: the transformer is not prepared, a mask came, or the sequence is sharded.
        """
        single = isinstance(attn, Flux2ParallelSelfAttention)
        text, mask, rotary_emb = (None, *inputs) if single else inputs
        if mask is not None:
            raise InputError(
                f"{self.method.name}: expected no mask in FLUX.2's attention, got one of shape "
                f"{list(mask.shape)}"
            )
        extract = kv_cache_mode == "extract"
        refs = num_ref_tokens if extract or kv_cache_mode == "cached" else 0
        own = hidden_states.shape[1] + (0 if text is None else text.shape[1])
        own -= refs if extract else 0
        # pairs with references as keys, and among themselves
        beside = own * refs + (refs * refs if extract else 0)
        if self.steps_aside(attn, hidden_states, beside):
            stock = self._single if single else self._dual
            stock._attention_backend = self._attention_backend
            texts = {"num_txt_tokens": num_txt_tokens} if single else {}
            made: Tensor | tuple[Tensor, Tensor] = stock(
                attn,
                hidden_states,
                *inputs,
                kv_cache=kv_cache,
                kv_cache_mode=kv_cache_mode,
                num_ref_tokens=num_ref_tokens,
                **texts,
            )
            return made
        mlp = None
        if single:
            joint, mlp = _split(attn, attn.to_qkv_mlp_proj(hidden_states))
            qkv = normed(self, attn, by_heads(joint.chunk(3, dim=-1), attn), None, rotary_emb)
        else:
            qkv = project(self, attn, hidden_states, text, rotary_emb)
        if refs:
            out = self._beside_references(attn, qkv, kv_cache, refs, extract, beside)
        else:
            out = self.attend(attn, *qkv)
        if mlp is not None:
            return attn.to_out(torch.cat([out, attn.mlp_act_fn(mlp)], dim=-1))
        assert text is not None
        words, images = out.split([text.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](images)), attn.to_add_out(words)

    def _beside_references(
        self,
        attn: Any,
        qkv: _QKV,
        cache: Flux2KVLayerCache | None,
        refs: int,
        extract: bool,
        beside: int,
    ) -> Tensor:
        """``[B, L, H * D]``: the method over text and result, merged with exact references."""
        compiled = InputError(
            f"{self.method.name}: expected klein KV's references outside of a compiled model, got "
            "them inside of one, whose graphs tell nothing of the references"
        )
        if torch.compiler.is_compiling():
            raise compiled
        binding, ctx = self.begin(attn)
        if ctx.geometry.more:
            # the graph broke before it came here, and its beginning knew no better
            raise compiled
        kept = None
        if extract:
            # [text, references, result]
            parts = [x.split([ctx.geometry.num_text, refs, ctx.geometry.num_video], 2) for x in qkv]
            _, key, value = kept = tuple(part[1] for part in parts)
            if cache is not None:
                cache.store(key.transpose(1, 2).clone(), value.transpose(1, 2).clone())
            query, own_key, own_value = (torch.cat([part[0], part[2]], 2) for part in parts)
        else:
            assert cache is not None
            key, value = (x.transpose(1, 2) for x in cache.get())
            query, own_key, own_value = qkv
        own, report = self.method.partial(query, own_key, own_value, ctx)
        out = merge(own, attend_all(query, key, value)).out
        if kept is not None:
            words, result = out.split([ctx.geometry.num_text, ctx.geometry.num_video], 2)
            # diffusers holds heads after tokens
            alone = dispatch_attention_fn(
                *(x.transpose(1, 2) for x in kept), backend=self._attention_backend
            )
            out = torch.cat([words, alone.transpose(1, 2), result], 2)
        binding.record(ctx, Report(report.exact_pairs + beside, report.all_pairs + beside))
        return out.transpose(1, 2).flatten(2)


def _split(attn: Flux2ParallelSelfAttention, projected: Tensor) -> tuple[Tensor, Tensor]:
    """The fused projection of a single block: queries, keys and values; what the MLP takes.

    By their share of the channels: under tensor parallelism there are fewer of each.
    """
    qkv, mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
    channels = projected.shape[-1] * qkv // (qkv + mlp)
    first, second = projected.split([channels, projected.shape[-1] - channels], dim=-1)
    return first, second


def _geometry(model: Any, given: Mapping[str, Any]) -> Geometry:
    images = grids_of(given.get("img_ids"), 4)
    text = slice(0, given["encoder_hidden_states"].shape[1])
    if given.get("kv_cache_mode") == "extract" and given.get("num_ref_tokens", 0):
        # references come first here, and stand beside the method's sequence
        return Geometry(images[-1], text=text)
    return Geometry(images[0], text=text, more=images[1:])


FAMILY = Family(
    name="FLUX.2",
    processor=Flux2Processor,
    processor_type=Flux2Processor,
    self_attention=self_attention,
    geometry=_geometry,
)
