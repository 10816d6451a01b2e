"""Budgets by layer and by step, configurations and dense backends, through a pipeline."""

import pytest
import torch

import dit_accel
from dit_accel import InputError, Method, presets
from dit_accel.kernels.dense_attention import api
from dit_accel.pipelines import session_of


def test_a_schedule_by_step(pipe, go):
    dit_accel.accelerate(pipe, "pisa", density={0: 1.0, 0.5: 0.25}, block_size=4)
    scheduled = go(pipe, num_inference_steps=4)
    by_step = session_of(pipe).log.by_step
    assert by_step[0] == by_step[1] == 1.0
    assert 0.2 < by_step[2] == by_step[3] < 0.3
    dit_accel.accelerate(pipe, "pisa", density=0.25, block_size=4, dense_steps=0.5)
    assert torch.equal(go(pipe, num_inference_steps=4), scheduled), "dense by diffusers' own code"


def test_shares_by_layer(pipe, go):
    dit_accel.accelerate(pipe, "pisa", density=[0.25, 1.0, 0.5], block_size=4)
    go(pipe)
    by_layer = session_of(pipe).log.by_layer
    assert 0.2 < by_layer[0] < 0.3
    assert by_layer[1] == 1.0
    assert 0.4 < by_layer[2] < 0.6


def test_as_many_shares_as_layers(pipe):
    with pytest.raises(
        InputError, match="density: expected one share for each of the 3 layers of transformer, got"
    ):
        dit_accel.accelerate(pipe, "pisa", density=[0.25, 0.5])
    with pytest.raises(InputError, match="threshold: expected one share for each of the 3 layers"):
        dit_accel.accelerate(pipe, Method.from_config(presets.vmoba(threshold=[0.5]).to_config()))
    assert not hasattr(pipe.transformer, "_dit_accel"), "refused before anything was installed"


def test_a_configuration_is_the_method(pipe, go, tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text("method: pisa\noptions: {density: 0.25, layout: {name: raster, block_size: 4}}")
    dit_accel.accelerate(pipe, "pisa", density=0.25, layout="raster", block_size=4)
    wanted = go(pipe)
    dit_accel.accelerate(pipe, Method.from_config(path))
    assert torch.equal(go(pipe), wanted)


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_a_dense_backend_that_is_named_is_what_runs(pipe, go, monkeypatch, backend):
    wanted, ran, real = go(pipe), [], api.attend

    def attend(name, *rest):
        ran.append(name)
        return real(name, *rest)

    monkeypatch.setattr(api, "attend", attend)
    dit_accel.accelerate(pipe, "dense")
    assert torch.equal(go(pipe), wanted)
    assert ran == [], "diffusers' own code"
    dit_accel.accelerate(pipe, "dense", backend=backend)
    torch.testing.assert_close(go(pipe), wanted, rtol=1e-3, atol=1e-3)
    assert ran == [backend] * (3 * 4 * 2), "3 layers, 4 steps, 2 branches"
    assert session_of(pipe).log.density == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_backend_that_cannot_run_is_refused_by_accelerate(pipe):
    with pytest.raises(InputError, match="got 'cudnn': needs a CUDA device, and there is none"):
        dit_accel.accelerate(pipe, "dense", backend="cudnn")
