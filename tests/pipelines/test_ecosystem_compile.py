"""torch.compile: as many graphs with a method as without, and none of them anew at another step."""

import logging

import pytest
import torch

import dit_accel
from dit_accel import InputError
from dit_accel.pipelines import session_of

METHODS = {
    "pisa": {"density": 0.25, "block_size": 4},
    "pisa by step": {"density": {0: 1.0, 0.4: 0.5, 0.7: 0.25}, "block_size": 4},
    "svg_ear": {"q_clusters": 6, "k_clusters": 9, "density": 0.3},
    "psa": {"block_q": 4, "block_k": 8, "sample": "stride"},
    "vmoba": {"threshold": 0.3, "block_size": 4},
    "dense": {"backend": "sdpa"},
    "flashblock": {"inner": "pisa", "density": 0.25, "block_size": 4, "refresh": 3},
}


@pytest.fixture
def graphs(zoo):
    # pytest catches what is logged, and dynamo logs its every step
    trace = logging.getLogger("torch.__trace")
    propagated, trace.propagate = trace.propagate, False
    yield zoo.Graphs
    trace.propagate = propagated
    torch._dynamo.reset()


def regionally(pipe, backend):
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)


def wrapped(pipe, backend):
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)


@pytest.mark.parametrize("method", METHODS)
def test_no_step_makes_another_graph(zoo, graphs, method):
    """Twelve steps, dense ones and then sparse ones, with two branches of guidance and all layers:
    one graph of the block, none broken, and the very result of the model that is not compiled.
    """
    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe()
    schedule = {} if method == "dense" else {"dense_steps": 4, "dense_layers": (1,)}
    dit_accel.accelerate(pipe, method.split()[0], **METHODS[method], **schedule)
    wanted = wan.go(pipe, 12, **wan.guided)
    before = session_of(pipe).log
    densities, layers = before.by_step, before.by_layer
    count = graphs()
    regionally(pipe, count.backend)
    assert torch.equal(wan.go(pipe, 12, **wan.guided), wanted)
    assert (count.made, count.breaks, count.skipped) == (1, 0, 0)
    assert session_of(pipe).log.by_step == densities
    assert session_of(pipe).log.by_layer == layers
    assert torch.equal(wan.go(pipe, 12, **wan.guided), wanted)
    assert count.made == 1
    assert len(session_of(pipe).state) == 0


@pytest.mark.parametrize("how", [regionally, wrapped])
def test_a_method_adds_no_graph_but_that_of_the_hook(family, graphs, how):
    stock = family.pipe(**family.shallow)
    count = graphs()
    how(stock, count.backend)
    dense = family.go(stock, 3, **family.guided)
    without, unique = count.made, count.backend.op_count
    assert unique > 50
    pipe = family.pipe(**family.shallow)
    dit_accel.accelerate(pipe, "pisa", dense_steps=5, density=0.25, block_size=4)
    count = graphs()
    how(pipe, count.backend)
    # dense steps of a compiled model: the attention is not diffusers' own code any more
    assert torch.equal(family.go(pipe, 3, **family.guided), dense)
    # where the whole model is compiled, what tells a session that a forward begins is one more
    assert (count.made, count.breaks) == (without + (how is not regionally), 0)
    family.go(pipe, 12, **family.guided)
    assert {d == 1.0 for d in session_of(pipe).log.by_step.values()} == {True, False}
    assert (count.made, count.breaks, count.skipped) == (without + (how is not regionally), 0, 0)


def test_every_layer_and_branch_has_its_memory_in_a_compiled_model(zoo, graphs):
    family = zoo.FAMILIES["Wan"]
    method, plain = zoo.spying(dense_steps=1), zoo.spying(dense_steps=1)
    pipe = family.pipe(**family.shallow)
    dit_accel.accelerate(pipe, plain)
    wanted = family.go(pipe, 3, **family.guided)
    dit_accel.accelerate(pipe, method)
    # the compiler's own passes too, which might take an operation out or put it elsewhere
    wrapped(pipe, graphs("aot_eager").backend)
    assert torch.equal(family.go(pipe, 3, **family.guided), wanted)
    assert method.route.seen == plain.route.seen
    assert {layer for _, layer, *_ in method.route.seen} == {0, 1}


def test_accelerated_after_it_was_compiled_and_restored(zoo, graphs):
    family = zoo.FAMILIES["Wan"]
    pipe = family.pipe(**family.shallow)
    count = graphs()
    regionally(pipe, count.backend)
    stock = family.go(pipe)
    before = count.made
    dit_accel.accelerate(pipe, "pisa", density=0.25, block_size=4)
    sparse = family.go(pipe)
    assert not torch.equal(sparse, stock)
    dit_accel.accelerate(pipe, "pisa", density=1.0, block_size=4)
    torch.testing.assert_close(family.go(pipe), stock, rtol=1e-3, atol=1e-3)
    # one more of each kind of block with attention, for another processor; none for another method
    assert before < count.made <= 2 * before
    dit_accel.restore(pipe)
    assert torch.equal(family.go(pipe), stock)
    # and once more at most for those that stood there first
    assert count.made <= 3 * before
    assert count.breaks == 0


def test_another_size_is_compiled_once_more(zoo, graphs):
    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe()
    dit_accel.accelerate(pipe, "pisa", density=0.25, block_size=4)
    wanted = [wan.go(pipe, num_frames=frames) for frames in (9, 5)]
    count = graphs()
    regionally(pipe, count.backend)
    for frames, one in zip((9, 5), wanted, strict=True):
        torch.testing.assert_close(wan.go(pipe, num_frames=frames), one, rtol=1e-3, atol=1e-3)
    made = count.made
    assert made == 2
    wan.go(pipe, num_frames=13)
    assert count.made == made, "the second graph is one for any number of tokens"


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_are_offloaded_and_compiled_blocks(zoo, graphs, when):
    from diffusers.hooks import apply_group_offloading

    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe()
    cpu = torch.device("cpu")
    offload = {"onload_device": cpu, "offload_type": "block_level", "num_blocks_per_group": 1}
    if when == "before":
        apply_group_offloading(pipe.transformer, **offload)
    dit_accel.accelerate(pipe, "pisa", density=0.25, block_size=4, dense_steps=2)
    wanted = wan.go(pipe, 5)
    if when == "after":
        apply_group_offloading(pipe.transformer, **offload)
    count = graphs()
    pipe.transformer.compile_repeated_blocks(backend=count.backend)
    assert torch.equal(wan.go(pipe, 5), wanted)
    made = count.made
    wan.go(pipe, 12)
    assert count.made == made


def test_errors_of_a_compiled_model_are_the_same(zoo, graphs):
    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe()
    dit_accel.accelerate(pipe, "flashblock", inner="pisa", budget_gib=1e-9)
    regionally(pipe, graphs().backend)
    with pytest.raises(InputError, match="within a budget of"):
        wan.go(pipe)
    dit_accel.accelerate(pipe, "pisa", density=0.25, block_size=4)
    assert wan.go(pipe).isfinite().all()


@pytest.mark.parametrize("blocks", ["as they are", "compiled", "each compiled", "whole compiled"])
def test_a_forward_is_one_iteration_of_cuda_graphs(zoo, graphs, monkeypatch, blocks):
    """Every compiled block would count as one, and free what the block before it returned."""
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe(**wan.shallow)
    dit_accel.accelerate(pipe, "pisa", **METHODS["pisa"])
    model = pipe.transformer
    if blocks == "compiled":
        regionally(pipe, "eager")
    elif blocks == "each compiled":
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="eager")
    elif blocks == "whole compiled":
        wrapped(pipe, "eager")
    wan.go(pipe, 3, **wan.guided)
    assert len(marks) == (2 * 3 if blocks in ("compiled", "each compiled") else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_graphs_of_blocks(zoo, method):
    """What a method remembers from step to step is not in memory that graphs use again."""
    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe().to("cuda")
    schedule = {} if method == "dense" else {"dense_steps": 2, "dense_layers": (1,)}
    dit_accel.accelerate(pipe, method.split()[0], **METHODS[method], **schedule)
    wanted = wan.go(pipe, 12, **wan.guided)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(mode="reduce-overhead", fullgraph=True)
    for _ in range(2):
        got = wan.go(pipe, 12, **wan.guided)
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_for_a_gpu(family, mode):
    pipe = family.pipe().to("cuda")
    dit_accel.accelerate(pipe, "pisa", dense_steps=2, **METHODS["pisa"])
    wanted = family.go(pipe, 12, **family.guided)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(mode=mode, fullgraph=True)
    first = family.go(pipe, 3, **family.guided)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert first.isfinite().all()
    # fused operations round differently; a plan may tip, which would show as 1e-1
    got = family.go(pipe, 12, **family.guided)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made
    torch._dynamo.reset()
