"""Offloading: weights that come and go around every forward, or every layer, beside our hook.

Here they go from the CPU to the meta device and back, which runs the very hooks of accelerate and
diffusers; a GPU is what the tests with the mark `gpu` need.
"""

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading

import dit_accel
from dit_accel.pipelines import session_of

SPARSE = {"density": 0.25, "block_size": 4, "dense_steps": 2}


def model(pipe, device):
    pipe.enable_model_cpu_offload(device=device)


def sequential(pipe, device):
    if device != "cpu":
        pipe.enable_sequential_cpu_offload(device=device)
        return
    # what that calls for a transformer, with a copy of the weights: moved from the CPU to the CPU
    # they are none, which accelerate fails at with any model
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    cpu_offload(pipe.transformer, torch.device(device), offload_buffers=True, state_dict=weights)


def blocks(pipe, device):
    _groups(pipe, device, offload_type="block_level", num_blocks_per_group=1)


def leaves(pipe, device):
    _groups(pipe, device, offload_type="leaf_level")


def leaves_by_stream(pipe, device):
    _groups(pipe, device, offload_type="leaf_level", use_stream=True)


def _groups(pipe, device, **options):
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        **options,
    )


def check(family, offload, when, device):
    pipe = family.pipe()
    if when == "before":
        offload(pipe, device)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    if when == "after":
        offload(pipe, device)
    return pipe


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [model, sequential, blocks, leaves])
def test_offloaded_or_not_the_result_is_the_same(family, offload, when):
    plain = family.pipe()
    stock = family.go(plain, **family.guided)
    dit_accel.accelerate(plain, "pisa", **SPARSE)
    wanted = family.go(plain, **family.guided)
    assert not torch.equal(wanted, stock)
    pipe = check(family, offload, when, "cpu")
    away = {parameter.device.type for parameter in pipe.transformer.parameters()}
    assert ("meta" in away) == (offload is sequential)
    for _ in range(2):
        # model offloading takes its wrappers off and puts them on again at the end of a call
        assert torch.equal(family.go(pipe, **family.guided), wanted)
        assert session_of(pipe).log.by_step == session_of(plain).log.by_step
        assert len(session_of(pipe).state) == 0
    dit_accel.restore(pipe)
    assert torch.equal(family.go(pipe, **family.guided), stock)
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == away


def test_offloading_ends_in_an_accelerated_pipeline(zoo):
    wan = zoo.FAMILIES["Wan"]
    pipe = wan.pipe()
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    wanted = wan.go(pipe)
    for offload in (sequential, model):
        offload(pipe, "cpu")
        pipe.remove_all_hooks()
        assert torch.equal(wan.go(pipe), wanted)
    assert len(session_of(pipe).log.by_step) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [model, sequential, blocks, leaves, leaves_by_stream])
def test_offloaded_from_a_gpu(family, offload, when):
    plain = family.pipe().to("cuda")
    dit_accel.accelerate(plain, "pisa", **SPARSE)
    wanted = family.go(plain, **family.guided)
    pipe = check(family, offload, when, "cuda")
    for _ in range(2):
        got = family.go(pipe, **family.guided)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert session_of(pipe).log.by_step == session_of(plain).log.by_step
