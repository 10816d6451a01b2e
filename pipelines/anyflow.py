"""AnyFlow FAR: block diffusion, chunk by chunk, each chunk beside the KV cache of those before it.

What is relied on, in diffusers 0.42 (``AnyFlowFARPipeline``, ``AnyFlowFARTransformer3DModel``):

- Chunks are denoised one after the other, with new timesteps for each. A forward is given the
  chunk's latents ``[B, T, C, H, W]``, the frames of all chunks up to it (``chunk_partition``), and
  ``kv_cache_flag["num_cached_chunks"]``. Between chunks one more forward, ``is_cache_step``, takes
  all clean latents so far and writes the cache anew, under a causal mask; it denoises nothing.
- The cache holds keys before rotation, of older chunks by coarse patches (``compressed_cache``) and
  of the latest by fine ones (``full_cache``). Its keys are rotated with the chunk's own in every
  step, by ``rotary_emb["key"]``, which is cached context first; nothing of them changes from step
  to step of a chunk. There is no mask in these forwards.
- Guidance is one forward of a batch twice as large, unconditional half first.
- diffusers pads queries, keys and values with zeros to a multiple of 128 queries, and without a
  mask the padded keys take part: each adds 1 to the softmax normaliser. They are part of the model
  as it is run, so they are here, as ``Prefix.zeros``.
- No cache context is told, and no hook is reset at the end of a call; a call is over when its
  cache is freed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from diffusers.models.transformers.transformer_anyflow_far import (
    AnyFlowAttention,
    AnyFlowCausalAttnProcessor,
    AnyFlowCrossAttnProcessor,
    apply_rotary_emb,
)
from torch import Tensor, nn

from dit_accel.attend import dense_pairs
from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.pipelines.families import Chunk, Family
from dit_accel.pipelines.norms import Projected
from dit_accel.pipelines.session import MethodProcessor
from dit_accel.types import Geometry, Prefix, Report

_PADDED_TO = 128
_COMPILED = (
    "expected a transformer that is not compiled, got one under torch.compile, whose graphs do not "
    "pass the KV cache on to a method"
)


class AnyFlowProcessor(MethodProcessor, AnyFlowCausalAttnProcessor):
    """Runs a method inside the chunk being denoised; the cached context is the method's prefix.

    Cross-attention, forwards that fill the cache, and every step or layer that the method leaves
    dense run diffusers' own code. One instance may serve all modules.
    """

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self._cross = AnyFlowCrossAttnProcessor()

    def __call__(
        self,
        attn: AnyFlowAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: dict[str, Tensor] | None = None,
        kv_cache: dict[str, Tensor] | None = None,
        kv_cache_flag: dict[str, Any] | None = None,
    ) -> Tensor:
        """Attention as diffusers calls it.

        Args:
            attn: the module; its transformer must be prepared.
            hidden_states: the chunk ``[B, L, C]``; all chunks so far where the cache is filled.
            encoder_hidden_states: text, in cross-attention only.
            attention_mask: a causal block mask where the cache is filled, otherwise ``None``.
            rotary_emb: ``"query"`` complex ``[1, 1, L, D / 2]``, ``"key"`` the same for the cached
                context and the chunk after it.
            kv_cache: of this layer, ``"compressed_cache"`` and ``"full_cache"``, each keys and
                values ``[2, B, H, room, D]``, of which the flag says how much is used.
            kv_cache_flag: what the forward is about.

        Returns:
            ``[B, L, C]``.

        Raises:
            InputError: the transformer is not prepared or is compiled, there is no cache, or the
                sequence is sharded.
        """
        if encoder_hidden_states is not None:
            out: Tensor = self._cross(attn, hidden_states, encoder_hidden_states, attention_mask)
            return out
        if torch.compiler.is_compiling():
            # An error would break the graph here, and what follows would run uncompiled, unsaid.
            # The operation refuses when it runs; nothing is ever made of its arguments.
            query = hidden_states.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return self.attend(attn, query, query, query)
        stock = super().__call__
        binding, ctx = self.begin(attn)
        batch, length = hidden_states.shape[:2]
        if kv_cache is not None and kv_cache_flag is not None and kv_cache_flag["is_cache_step"]:
            every = torch.full(
                (batch, attn.heads), binding.session.filling, device=hidden_states.device
            )
            binding.record(ctx, Report(every, every))
            return stock(
                attn, hidden_states, None, attention_mask, rotary_emb, kv_cache, kv_cache_flag
            )
        if kv_cache is None or kv_cache_flag is None or rotary_emb is None:
            raise InputError(
                f"{self.method.name}: expected a forward with a KV cache (use_kv_cache=True), got "
                "one without, which is for training"
            )
        ctx = replace(
            ctx, prefix=_prefix(hidden_states, rotary_emb["key"], kv_cache, kv_cache_flag)
        )
        if self.method.is_dense(ctx):
            like = hidden_states.new_empty(()).expand(batch, attn.heads, length)
            every = dense_pairs(like, None, ctx.prefix)
            binding.record(ctx, Report(every, every))
            return stock(attn, hidden_states, None, None, rotary_emb, kv_cache, kv_cache_flag)
        query, key, value = self._project(attn, hidden_states, rotary_emb)
        result, report = self.method(query, key, value, ctx)
        binding.record(ctx, report)
        result = result.transpose(1, 2).flatten(2)
        projected: Tensor = attn.to_out[1](attn.to_out[0](result))
        return projected

    def _project(
        self, attn: AnyFlowAttention, hidden_states: Tensor, rotary_emb: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the chunk, ``[B, H, L, D]`` each."""
        query, key, value = (to(hidden_states) for to in (attn.to_q, attn.to_k, attn.to_v))
        parts = [x.unflatten(2, (attn.heads, -1)) for x in (query, key, value)]
        # the same angles for queries and keys: diffusers takes both from one tensor
        angles = torch.view_as_real(rotary_emb["query"][0, 0])
        made = self.normed(
            attn,
            [Projected.of(parts, attn.norm_q, attn.norm_k)],
            "token",
            (angles[..., 0], angles[..., 1]),
            hidden_states.dtype,
        )
        if made is not None:
            query, key, value = (x.transpose(1, 2) for x in made)
            return query, key, value
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.norm_q(query).to(hidden_states.dtype),
                attn.norm_k(key).to(hidden_states.dtype),
                value,
            )
        )
        query = apply_rotary_emb(query, rotary_emb["query"])
        key = apply_rotary_emb(key, rotary_emb["key"][:, :, -hidden_states.shape[1] :])
        return query, key, value

    def run(self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Raise an InputError: a compiled transformer alone comes here."""
        raise InputError(f"{self.method.name}: {_COMPILED}")


def _prefix(
    hidden_states: Tensor, angles: Tensor, cache: dict[str, Tensor], flag: dict[str, Any]
) -> Prefix:
    """The cached context of a chunk, rotated only if somebody asks for it."""
    parts = (
        (cache["compressed_cache"], flag["num_cached_compressed_tokens"]),
        (cache["full_cache"], flag["num_cached_full_tokens"]),
    )
    length = sum(used for _, used in parts)

    def load() -> tuple[Tensor, Tensor]:
        key, value = (
            torch.cat([part[which, :, :, :used] for part, used in parts], dim=2).to(
                hidden_states.dtype
            )
            for which in (0, 1)
        )
        return apply_rotary_emb(key, angles[:, :, :length]), value

    return Prefix(
        length, load, chunk=flag["num_cached_chunks"], zeros=-hidden_states.shape[1] % _PADDED_TO
    )


def _geometry(model: Any, given: Mapping[str, Any]) -> Geometry:
    latent = given["hidden_states"]
    if latent.ndim != 5:
        raise InputError(
            f"hidden_states: expected latents [B, T, C, H, W], got shape {list(latent.shape)}"
        )
    sizes = latent.shape[1], latent.shape[3], latent.shape[4]
    frames, rows, columns = (
        size // patch for size, patch in zip(sizes, model.config.patch_size, strict=True)
    )
    return Geometry((frames, rows, columns))


def _chunk(model: Any, given: Mapping[str, Any]) -> Chunk | None:
    cache, flag = given.get("kv_cache"), given.get("kv_cache_flag")
    if cache is None or flag is None:
        return None
    fills = flag["is_cache_step"]
    return Chunk(
        cache[0]["full_cache"],
        flag["num_cached_chunks"],
        _causal_pairs(model.config, given) if fills else None,
    )


def _causal_pairs(config: Any, given: Mapping[str, Any]) -> int:
    """What the causal mask of a forward that fills the cache lets through."""
    rows, columns = given["hidden_states"].shape[3:]
    coarse, fine = (
        (rows // patch[1]) * (columns // patch[2])
        for patch in (config.compressed_patch_size, config.patch_size)
    )
    frames = given["chunk_partition"]
    older = max(0, len(frames) - (config.full_chunk_limit - 1))
    tokens = [n * (coarse if chunk < older else fine) for chunk, n in enumerate(frames)]
    return sum(n * seen for n, seen in zip(tokens, accumulate(tokens), strict=True))


FAMILY = Family(
    name="AnyFlow FAR",
    processor=AnyFlowProcessor,
    processor_type=AnyFlowProcessor,
    self_attention=lambda model: [block.attn1 for block in model.blocks],
    geometry=_geometry,
    chunk=_chunk,
)
