"""Context parallelism, attention backends and IP-adapters: what is refused, and what goes on."""

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import dit_accel
from dit_accel import InputError
from dit_accel.pipelines import session_of

SPARSE = {"density": 0.25, "block_size": 4}
REFUSAL = r"pisa: expected the whole sequence .* context parallelism"
PLANS = {"HunyuanVideo": {}}  # diffusers has none for it


@pytest.fixture
def two_ranks(monkeypatch):
    """A process group of two in this process, which sends nothing: the first of its ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield ContextParallelConfig(ulysses_degree=2)
    dist.destroy_process_group()


def parallel(pipe, config, family):
    pipe.transformer.enable_parallelism(config=config, cp_plan=PLANS.get(family.name))


def test_context_parallelism_is_refused_before(family, two_ranks):
    pipe = family.pipe()
    parallel(pipe, two_ranks, family)
    processors = dict(pipe.transformer.attn_processors)
    for call in (dit_accel.accelerate, dit_accel.pipelines.processor):
        with pytest.raises(InputError, match=REFUSAL):
            call(pipe, "pisa")
    assert pipe.transformer.attn_processors == processors
    assert not hasattr(pipe.transformer, "_dit_accel")


def test_context_parallelism_is_refused_after(family, two_ranks):
    """A shard is never taken for the whole; not in the dense steps either."""
    pipe = family.pipe()
    dit_accel.accelerate(pipe, "pisa", dense_steps=2, **SPARSE)
    parallel(pipe, two_ranks, family)
    with pytest.raises(InputError, match=REFUSAL):
        family.go(pipe)


def test_context_parallelism_is_refused_in_a_graph(zoo, two_ranks):
    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe(**wan.shallow)
    dit_accel.accelerate(pipe, "pisa", dense_steps=2, **SPARSE)
    parallel(pipe, two_ranks, wan)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(InputError, match=REFUSAL):
        wan.go(pipe)
    torch._dynamo.reset()


def test_context_parallelism_of_stock_processors_goes_on_after_restore(zoo, two_ranks):
    wan = zoo.FAMILIES["Wan"]
    stock = wan.pipe()
    parallel(stock, two_ranks, wan)
    wanted = wan.go(stock)
    pipe = wan.pipe()
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    parallel(pipe, two_ranks, wan)
    dit_accel.restore(pipe)
    # the other rank's half is whatever stands in memory: finite or not, what counts is that it runs
    assert wan.go(pipe).shape == wanted.shape
    configs = {id(one._parallel_config) for one in pipe.transformer.attn_processors.values()}
    assert configs == {id(pipe.transformer._parallel_config)}


@pytest.fixture
def calls(monkeypatch):
    """How often each of diffusers' attention backends was called."""
    counted = {}
    registry = attention_dispatch._AttentionBackendRegistry
    for name, function in list(registry._backends.items()):

        def count(*args, _name=name, _function=function, **kwargs):
            counted[_name.value] = counted.get(_name.value, 0) + 1
            return _function(*args, **kwargs)

        monkeypatch.setitem(registry._backends, name, count)
    active = registry._active_backend
    yield counted
    registry._active_backend = active


@pytest.mark.parametrize(
    ("when", "compiled"), [("before", False), ("after", False), ("after", True)]
)
def test_a_chosen_backend_computes_what_is_dense(family, calls, when, compiled):
    pipe = family.pipe(**(family.shallow if compiled else {}))
    layers = 2 if compiled else family.layers
    if when == "before":
        pipe.transformer.set_attention_backend("_native_math")
    dit_accel.accelerate(pipe, "pisa", dense_steps=1, dense_layers=(0,), **SPARSE)
    if when == "after":
        pipe.transformer.set_attention_backend("_native_math")
    attention_dispatch._AttentionBackendRegistry.set_active_backend(
        attention_dispatch.AttentionBackendName.NATIVE
    )
    if compiled:
        pipe.transformer.compile_repeated_blocks(backend="eager")
    calls.clear()
    family.go(pipe, 3, **family.unguided)
    # all layers of the first step, and the first layer of the other two
    dense = layers + 2
    if not compiled:  # a graph has cross-attention in it, and not the function that counts
        cross = 3 * family.layers if family.name == "Wan" else 0
        assert calls.get("_native_math", 0) == dense + cross
    else:
        assert calls.get("_native_math", 0) >= dense
    density = session_of(pipe).log.by_layer
    assert density[0] == 1.0
    assert density[1] < 1.0
    torch._dynamo.reset()


def ip_adapter(model):
    """A state dict of random weights for every block with text."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    inner, cross = model.inner_dim, model.config.joint_attention_dim
    layers = {}
    for i in range(len(model.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            layers[f"{i}.{name}.weight"] = random(inner, cross)
            layers[f"{i}.{name}.bias"] = random(inner)
    proj = {"proj.weight": random(4 * cross, 8), "proj.bias": random(4 * cross)}
    norm = {"norm.weight": random(cross), "norm.bias": random(cross)}
    return {"image_proj": proj | norm, "ip_adapter": layers}


def test_an_ip_adapter_that_was_loaded_is_refused(zoo):
    flux = zoo.FAMILIES["FLUX.1"]
    pipe = flux.pipe()
    plain = flux.go(pipe)
    pipe.transformer._load_ip_adapter_weights(ip_adapter(pipe.transformer))
    images = {"ip_adapter_image_embeds": [torch.randn(1, 1, 8)]}
    images["negative_ip_adapter_image_embeds"] = [torch.zeros(1, 1, 8)]
    adapted = flux.go(pipe, **images)
    assert not torch.equal(adapted, plain)
    with pytest.raises(InputError, match=r"pisa: expected no IP-adapter, got one: its attention"):
        dit_accel.accelerate(pipe, "pisa", **SPARSE)
    assert torch.equal(flux.go(pipe, **images), adapted)
    pipe.unload_ip_adapter()
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    assert not torch.equal(flux.go(pipe), plain)


def test_an_ip_adapter_cannot_be_loaded_into_an_accelerated_pipeline(zoo):
    flux = zoo.FAMILIES["FLUX.1"]
    pipe = flux.pipe()
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    wanted = flux.go(pipe)
    with pytest.raises(InputError, match=r"call dit_accel\.restore before an IP-adapter is loaded"):
        pipe.transformer._load_ip_adapter_weights(ip_adapter(pipe.transformer))
    assert torch.equal(flux.go(pipe), wanted)
    dit_accel.restore(pipe)
    pipe.transformer._load_ip_adapter_weights(ip_adapter(pipe.transformer))
    pipe.unload_ip_adapter()
    assert all(type(one) is FluxAttnProcessor for one in pipe.transformer.attn_processors.values())
