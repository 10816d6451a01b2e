import copy

import pytest
import torch

from dit_accel.pipelines.tiny_wan import model

SMALL = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "ffn_dim": 32,
    "patch_size": (1, 2, 2),
}


def random_pipe(**transformer):
    """A stock Wan pipeline with random weights: clips of 5 frames and 64x48 are 3x4x3 tokens."""
    torch.manual_seed(0)
    pipe = model.untrained(autoencoder={"base_dim": 8}, transformer={**SMALL, **transformer})
    # attention of fresh weights is all but flat: sharpen it, so that what is dropped shows
    for block in pipe.transformer.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.normal_(norm.weight, mean=2.0, std=0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def _built():
    return random_pipe()


@pytest.fixture(scope="session")
def make_saved(_built):
    """Write the small random pipeline into a directory."""

    def save(directory):
        _built.save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def tiny_wan():
    """The embedded model."""
    from dit_accel.pipelines import load

    pipe = load("tiny-wan")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def make_pipe():
    """A small random pipeline with other sizes of its transformer."""
    return random_pipe


@pytest.fixture
def pipe(_built):
    """A fresh copy of a small random pipeline."""
    made = type(_built)(**{name: copy.deepcopy(part) for name, part in _built.components.items()})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def go():
    """Generate latents: ``go(pipe, **arguments)``."""

    def run(pipe, prompt="a red circle moves right", seed=0, **arguments):
        call = {
            "height": 64,
            "width": 48,
            "num_frames": 5,
            "num_inference_steps": 4,
            "guidance_scale": 3.0,
            "output_type": "latent",
            **arguments,
        }
        count = len(prompt) if isinstance(prompt, list) else 1
        generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        return pipe(prompt=prompt, generator=generators, **call).frames

    return run


@pytest.fixture(scope="session")
def zoo():
    """Small random pipelines of several families, as a module."""
    import zoo

    return zoo


@pytest.fixture(params=["Wan", "HunyuanVideo", "FLUX.1"])
def family(request, zoo):
    """Each family in turn: ``family.pipe()``, ``family.go(pipe)``."""
    return zoo.FAMILIES[request.param]
