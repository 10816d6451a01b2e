"""Norms and rotary embedding by the kernel, in whole pipelines, in Triton's interpreter."""

import copy
import logging
import re

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from specimens import EVERY, calls_of, replay
from torch import nn

import dit_accel
from dit_accel import InputError
from dit_accel.pipelines import norms, plug, session_of
from dit_accel.pipelines.norms import Projected, Task, task_of

SPARSE = {"density": 0.5, "block_size": 8}


@pytest.fixture(params=["Wan", "HunyuanVideo", "FLUX.1"])
def small(request, zoo):
    """A family, and a pipeline of it without guidance, with one layer of every kind."""
    family = zoo.FAMILIES[request.param]
    sizes = {"attention_head_dim": 16} if request.param == "Wan" else {}
    return family, family.pipe(**family.shallow, **sizes)


def layers(pipe):
    return sum(hasattr(m, "_dit_accel") for m in pipe.transformer.modules()) - 1


def test_the_kernel_is_diffusers_arithmetic(small):
    """At density 1, where no plan can tip: what is left is rounding in fp32."""
    family, pipe = small
    results = {}
    for choice in ("diffusers", "triton", "auto"):
        dit_accel.accelerate(pipe, "pisa", norm_rotary=choice, density=1.0, block_size=8)
        results[choice] = family.go(pipe, 1, **family.unguided)
        ((who, calls),) = session_of(pipe).log.norm_rotary.items()
        assert calls == layers(pipe)
        assert who == choice if choice != "auto" else who.startswith("diffusers: it is for")
    assert torch.equal(results["auto"], results["diffusers"]), "a CPU has diffusers' arithmetic"
    assert not torch.equal(results["triton"], results["diffusers"]), "the kernel ran"
    scale = float(results["diffusers"].abs().max())
    torch.testing.assert_close(results["triton"], results["diffusers"], rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["hunyuan15", "flux2", "klein_kv_image"])
def test_the_kernel_in_other_families(name, loaded_family):
    """One forward of the transformer, as its pipeline calls it."""
    specimen = EVERY[name]
    pipe = loaded_family(specimen)
    call = calls_of(pipe, specimen, num_inference_steps=1)[:1]
    got = {}
    for choice in ("diffusers", "triton"):
        dit_accel.accelerate(
            pipe.transformer, "pisa", norm_rotary=choice, density=1.0, block_size=8
        )
        (got[choice],) = replay({"transformer": pipe.transformer}, call)
        records = session_of(pipe.transformer).log.records[-specimen.layers :]
        assert {record.norms for record in records} == {choice}
    assert not torch.equal(got["triton"], got["diffusers"]), "the kernel ran"
    scale = float(got["diffusers"].abs().max())
    torch.testing.assert_close(got["triton"], got["diffusers"], rtol=0, atol=1e-4 * scale)


def test_dense_steps_are_diffusers_own_and_said_to_be(small):
    family, pipe = small
    wanted = family.go(pipe, 2, **family.unguided)
    dit_accel.accelerate(pipe, "pisa", norm_rotary="triton", dense_steps=2, **SPARSE)
    assert torch.equal(family.go(pipe, 2, **family.unguided), wanted)
    assert session_of(pipe).log.norm_rotary == {"diffusers": 2 * layers(pipe)}
    dit_accel.accelerate(pipe, "pisa", norm_rotary="triton", dense_steps=1, **SPARSE)
    assert not torch.equal(family.go(pipe, 2, **family.unguided), wanted)
    calls = layers(pipe)
    assert session_of(pipe).log.norm_rotary == {"diffusers": calls, "triton": calls}


def test_in_a_compiled_model(small, zoo):
    """The same results, one more operation in the graph, and told who computed."""
    family, pipe = small
    dit_accel.accelerate(pipe, "pisa", norm_rotary="triton", **SPARSE)
    wanted = family.go(pipe, 2, **family.unguided)
    trace = logging.getLogger("torch.__trace")
    propagated, trace.propagate = trace.propagate, False
    try:
        count = zoo.Graphs("aot_eager")
        pipe.transformer.compile_repeated_blocks(backend=count.backend, fullgraph=True)
        assert torch.equal(family.go(pipe, 2, **family.unguided), wanted)
        assert session_of(pipe).log.norm_rotary == {"triton": 2 * layers(pipe)}
        assert (count.breaks, count.skipped) == (0, 0)
        made = count.made
        dit_accel.accelerate(pipe, "pisa", norm_rotary="diffusers", **SPARSE)
        family.go(pipe, 1, **family.unguided)
        assert session_of(pipe).log.norm_rotary == {"diffusers": layers(pipe)}
        assert count.made > made
    finally:
        trace.propagate = propagated
        torch._dynamo.reset()


def test_one_choice_for_every_way_of_asking(zoo):
    family = zoo.FAMILIES["Wan"]
    pipe = family.pipe(num_layers=1, attention_head_dim=16)
    with pytest.raises(InputError, match=r"norm_rotary: expected auto \| triton \| diffusers"):
        dit_accel.accelerate(pipe, "pisa", norm_rotary="fast")
    ours = dit_accel.pipelines.processor(pipe, "pisa", norm_rotary="triton", **SPARSE)
    pipe.transformer.set_attn_processor(ours)
    by_setter = family.go(pipe, 1, **family.unguided)
    assert set(session_of(pipe).log.norm_rotary) == {"triton"}
    plug.set_attn_processor(pipe, "pisa", norm_rotary="triton", **SPARSE)
    assert torch.equal(family.go(pipe, 1, **family.unguided), by_setter)
    twin = copy.deepcopy(pipe)
    assert torch.equal(family.go(twin, 1, **family.unguided), by_setter)
    assert set(session_of(twin).log.norm_rotary) == {"triton"}


def test_hooked_norms_are_called(zoo):
    family = zoo.FAMILIES["Wan"]
    pipe = family.pipe(num_layers=1, attention_head_dim=16)
    dit_accel.accelerate(pipe, "pisa", norm_rotary="triton", **SPARSE)
    norm = pipe.transformer.blocks[0].attn1.norm_q
    handle = norm.register_forward_hook(lambda module, args, out: out * 0)
    with pytest.raises(InputError, match="got 'triton', and a norm has hooks"):
        family.go(pipe, 1)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    hooked = family.go(pipe, 1, **family.unguided)
    assert session_of(pipe).log.norm_rotary == {"diffusers: a norm has hooks": 1}
    handle.remove()
    assert not torch.equal(family.go(pipe, 1, **family.unguided), hooked)


def part(norm_q, norm_k, dtype=torch.float32, heads=2, depth=16):
    q, k, v = torch.randn(3, 1, 5, heads, depth).to(dtype)
    return Projected(q, k, v, norm_q, norm_k)


def rms(width=16, cls=nn.RMSNorm, dtype=torch.float32, **options):
    return cls(width, **{"eps": 1e-6, **options}).to(dtype)


class Scaled(nn.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced():
    norm = rms()
    norm.forward = lambda x: x
    return norm


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (nn.LayerNorm(16), "a norm is a LayerNorm"),
        (Scaled(16, eps=1e-6), "a norm is a Scaled"),
        (replaced(), "a norm has hooks"),
        (rms(cls=RMSNorm, bias=True), "a norm has a bias"),
        (rms(32), r"a norm is over \[32\] channels, not over 16"),
        (nn.RMSNorm(16), "a norm leaves its eps to the dtype"),
        (rms(dtype=torch.float64), "weight is a Parameter of torch.float64"),
        (rms(elementwise_affine=False), "only one of two norms has a weight"),
        (None, "norms differ in what they return|only one of two norms has a weight"),
    ],
)
def test_what_the_kernel_leaves_to_modules(norm, why):
    found = task_of("triton", [part(norm, rms())], "head", None)
    assert isinstance(found, str)
    assert re.search(why, found)


def test_a_layer_norm_still_runs(zoo):
    family = zoo.FAMILIES["HunyuanVideo"]
    pipe = family.pipe(**family.shallow)
    pipe.transformer.transformer_blocks[0].attn.norm_q = nn.LayerNorm(16)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    assert family.go(pipe, 1).isfinite().all()
    assert session_of(pipe).log.norm_rotary["diffusers: a norm is a LayerNorm"] == 1


def test_tensors_that_are_left_to_modules():
    fine = part(rms(), rms())
    assert isinstance(task_of("triton", [fine], "head", None), Task)
    assert task_of("diffusers", [fine], "head", None) == "diffusers"
    assert task_of("triton", [fine], "head", "angles of another kind") == "angles of another kind"
    with torch.enable_grad():
        wanting = fine._replace(q=fine.q.clone().requires_grad_())
        assert task_of("triton", [wanting], "head", None) == "gradients are asked for"
    mixed = fine._replace(v=fine.v.half())
    assert task_of("triton", [mixed], "head", None) == "projections are of several dtypes"
    angles = torch.ones(4, 8), torch.ones(4, 8)
    assert "streams end at [5]" in task_of("triton", [fine], "head", angles)
    assert "head sizes" in task_of("triton", [part(rms(24), rms(24), depth=24)], "head", None)


@pytest.mark.parametrize("cls", [nn.RMSNorm, RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("weight", [torch.float16, torch.float32, None])
def test_dtypes_and_values_are_the_modules(cls, dtype, weight):
    """Twice the error of the modules in the dtype that they return."""
    options = {} if weight else {"elementwise_affine": False}
    norm = rms(cls=cls, dtype=weight or torch.float32, **options)
    if weight:
        nn.init.normal_(norm.weight, mean=1.0)
    one = part(norm, norm, dtype)
    q, k, v = task_of("triton", [one], "head", None).run()
    stock = norm(one.q)
    assert q.dtype == k.dtype == stock.dtype
    assert v is one.v
    scale = 1.0 if norm.weight is None else norm.weight.double()
    exact = one.q.double() * (one.q.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale
    theirs = (stock.double() - exact).abs().max()
    assert (q.double() - exact).abs().max() <= 2 * theirs


def test_angles_of_channels():
    cos = torch.arange(6.0).repeat_interleave(2).view(1, 12).expand(3, 12)
    found = norms.angles_of_channels(cos, -cos, torch.empty(1, 3, 2, 12))
    assert torch.equal(found[0][0], torch.arange(6.0))
    assert torch.equal(found[1], -found[0])
    assert norms.angles_of_channels(cos[None], cos[None], torch.empty(1, 3, 2, 12)) == (
        "angles are [1, 3, 12] and [1, 3, 12]"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["no", "default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "FLUX.1"])
def test_on_a_gpu(zoo, name, compiled):
    """The kernel without being named; what it does not take there runs the modules."""
    family = zoo.FAMILIES[name]
    axes = {"HunyuanVideo": "rope_axes_dim", "FLUX.1": "axes_dims_rope"}
    sizes = {axes[name]: (16, 24, 24)} if name in axes else {}
    pipe = family.pipe(**family.shallow, attention_head_dim=64, **sizes).to("cuda")
    options = {"density": 1.0, "block_size": 8}
    dit_accel.accelerate(pipe, "pisa", norm_rotary="diffusers", **options)
    wanted = family.go(pipe, 2, **family.unguided)
    dit_accel.accelerate(pipe, "pisa", **options)
    if compiled != "no":
        torch._dynamo.reset()
        pipe.transformer.compile_repeated_blocks(mode=compiled, fullgraph=True)
    for _ in range(2):
        got = family.go(pipe, 2, **family.unguided)
        assert session_of(pipe).log.norm_rotary == {"triton": 2 * layers(pipe)}
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3 * scale)
    torch._dynamo.reset()
