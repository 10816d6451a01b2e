"""Small random pipelines of three families without text encoders and autoencoders, how to run them,
and what watches them. Whole pipelines, of every family, are in `specimens`.
"""

from collections import Counter
from typing import ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from families import sharpened

from dit_accel import Method, Schedule
from dit_accel.layout import LAYOUTS
from dit_accel.rest import Centroid
from dit_accel.route import PooledScore

SPARSE = {"density": 0.25, "block_size": 4}


class Spy:
    """A route that remembers its first plan, and notes where it was called."""

    needs = ()

    def __init__(self):
        self.seen = []
        self.inner = PooledScore(density=0.3, bias=False)

    def __call__(self, blocked, rest, ctx):
        first = "plan" not in ctx.memory
        plan = ctx.memory.setdefault("plan", self.inner(blocked, rest, ctx))
        self.seen.append((ctx.step, ctx.layer, ctx.branch.split("/")[-1], ctx.num_steps, first))
        return plan

    def steps(self, layer, branch="cond"):
        """At which steps this layer was called, for this branch of guidance."""
        return [step for step, one, name, *_ in self.seen if (one, name) == (layer, branch)]


def spying(**schedule):
    return Method(LAYOUTS["raster"](4), Spy(), Centroid(), Schedule(**schedule), name="spy")


class Family:
    """One family: a pipeline without text encoders and autoencoder, and how to call it."""

    layers = 4
    shallow: ClassVar = {"num_layers": 1, "num_single_layers": 1}
    guided: ClassVar = {}  # what turns guidance on, in two calls a step

    def pipe(self, **changes):
        torch.manual_seed(0)
        made = self.cls(transformer=sharpened(self.model(**changes)), **self.parts())
        made.set_progress_bar_config(disable=True)
        return made

    def go(self, pipe, steps=4, seed=0, batch=1, dtype=torch.float32, **arguments):
        """Latents of a call; texts and noise are those of the seed."""
        draw = torch.Generator().manual_seed(seed)
        call = {
            name: value.to(pipe._execution_device, dtype if value.is_floating_point() else None)
            for name, value in self.texts(draw, batch).items()
        }
        call |= self.size | {"num_inference_steps": steps, "output_type": "latent"}
        call["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
        return pipe(**{**call, **arguments})[0]


class Wan(Family):
    name, cls, layers = "Wan", WanPipeline, 3
    shallow: ClassVar = {"num_layers": 2}
    size: ClassVar = {"height": 64, "width": 48, "num_frames": 9}
    guided: ClassVar = {"guidance_scale": 3.0}
    unguided: ClassVar = {"guidance_scale": 1.0}

    def model(self, **changes):
        return WanTransformer3DModel(
            **{
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4,
                "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3,
                **changes,
            }
        )  # fmt: skip

    def parts(self):
        nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
        return {"scheduler": FlowMatchEulerDiscreteScheduler(), **nothing}

    def texts(self, draw, batch):
        return {
            name: torch.randn(batch, 5, 16, generator=draw)
            for name in ("prompt_embeds", "negative_prompt_embeds")
        }

    def given(self, batch=1, dtype=torch.float32):
        draw = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(batch, 4, 3, 8, 6, generator=draw, dtype=dtype),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": torch.randn(batch, 5, 16, generator=draw, dtype=dtype),
        }


class HunyuanVideo(Family):
    name, cls = "HunyuanVideo", HunyuanVideoPipeline
    size: ClassVar = {"height": 64, "width": 48, "num_frames": 9}
    guided: ClassVar = {"true_cfg_scale": 2.0}
    unguided: ClassVar = {}

    def model(self, **changes):
        return HunyuanVideoTransformer3DModel(
            **{
                "in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
                "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2,
                "num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 8,
                "rope_axes_dim": (4, 6, 6), **changes,
            }
        )  # fmt: skip

    def parts(self):
        nothing = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")
        return {"scheduler": FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(nothing)}

    def texts(self, draw, batch):
        made = {}
        for name, length in (("", 7), ("negative_", 4)):
            made[f"{name}prompt_embeds"] = torch.randn(batch, 10, 24, generator=draw)
            made[f"{name}pooled_prompt_embeds"] = torch.randn(batch, 8, generator=draw)
            mask = (torch.arange(10) < length).expand(batch, -1)
            made[f"{name}prompt_attention_mask"] = mask
        return made

    def given(self, batch=1, dtype=torch.float32):
        draw = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(batch, 4, 3, 8, 6, generator=draw, dtype=dtype),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": torch.randn(batch, 10, 24, generator=draw, dtype=dtype),
            "encoder_attention_mask": (torch.arange(10) < 7).expand(batch, -1).to(dtype),
            "pooled_projections": torch.randn(batch, 8, generator=draw, dtype=dtype),
            "guidance": torch.full((batch,), 6000.0),
        }


class Flux(Family):
    name, cls = "FLUX.1", FluxPipeline
    size: ClassVar = {"height": 96, "width": 80}
    guided: ClassVar = {"true_cfg_scale": 2.0}
    unguided: ClassVar = {}

    def model(self, **changes):
        return FluxTransformer2DModel(
            **{
                "in_channels": 64, "num_layers": 2, "num_single_layers": 2,
                "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
                "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), **changes,
            }
        )  # fmt: skip

    def parts(self):
        nothing = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae")
        return {"scheduler": FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(nothing)}

    def texts(self, draw, batch):
        made = {}
        for name in ("", "negative_"):
            made[f"{name}prompt_embeds"] = torch.randn(batch, 10, 32, generator=draw)
            made[f"{name}pooled_prompt_embeds"] = torch.randn(batch, 32, generator=draw)
        return made

    def given(self, batch=1, dtype=torch.float32):
        draw = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(batch, 30, 64, generator=draw, dtype=dtype),
            "timestep": torch.full((batch,), 0.5),
            "encoder_hidden_states": torch.randn(batch, 10, 32, generator=draw, dtype=dtype),
            "pooled_projections": torch.randn(batch, 32, generator=draw, dtype=dtype),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(5.0)),
            "txt_ids": torch.zeros(10, 3),
        }


FAMILIES = {one.name: one for one in (Wan(), HunyuanVideo(), Flux())}


class Graphs:
    """Counts what dynamo makes: graphs, their breaks, and how often the code was compiled again."""

    def __init__(self, backend="eager"):
        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.backend = CompileCounterWithBackend(backend)

    @property
    def made(self):
        return self.backend.frame_count

    @property
    def breaks(self):
        return sum(torch._dynamo.utils.counters["graph_break"].values())

    @property
    def skipped(self):
        """Frames that dynamo gave up on, such as at the limit of recompilations."""
        known: Counter = torch._dynamo.utils.counters["unimplemented"]
        return sum(known.values())
