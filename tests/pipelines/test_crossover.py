"""A pipeline takes dense attention where it was measured to be faster; figures are made up."""

import warnings

import pytest
import torch

import dit_accel
from dit_accel import crossover, presets
from dit_accel.crossover import Crossover, DenseWarning, options_of
from dit_accel.eval.instrument import listening
from dit_accel.pipelines import session_of

SPARSE = {"density": 0.25, "block_size": 4}


@pytest.fixture
def figures(monkeypatch):
    """Makes the CPU a GPU that was measured: faster from so many tokens on, of 36 there are."""

    def use(tokens, against="sdpa"):
        method = presets.pisa(**SPARSE)
        # guidance makes two calls of one clip each
        row = Crossover("pisa", options_of(method), 0.25, None, 2, 24, against, tokens, 100)
        monkeypatch.setattr(crossover, "architecture_of", lambda device: "9.0")
        monkeypatch.setattr(crossover, "DTYPES", (torch.float32,))
        monkeypatch.setattr(crossover, "measured", lambda name: (row,))

    return use


def test_dense_to_the_bit_said_once_and_in_the_log(pipe, go, figures):
    wanted = go(pipe)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    figures(37)
    with pytest.warns(DenseWarning, match="pisa: dense attention takes its place") as told:
        assert torch.equal(go(pipe), wanted)
    assert len([one for one in told if one.category is DenseWarning]) == 1
    log = session_of(pipe).log
    assert log.density == 1.0
    ((reason, calls),) = log.choices.items()
    assert calls == len(log)
    assert "2 heads of 24, density 0.25 it was faster than dense attention from 37" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseWarning)
        go(pipe)
    assert session_of(pipe).log.choices == {reason: calls}


def test_the_method_where_it_is_faster_or_is_asked_for(pipe, go, figures):
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    wanted = go(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseWarning)
        figures(36)
        dit_accel.accelerate(pipe, "pisa", **SPARSE)
        assert torch.equal(go(pipe), wanted)
        figures(37)
        dit_accel.accelerate(pipe, "pisa", **SPARSE, dense_below=0)
        assert torch.equal(go(pipe), wanted)
        dit_accel.accelerate(pipe, presets.pisa(**SPARSE), dense_below=0)
        assert torch.equal(go(pipe), wanted)
    assert session_of(pipe).log.choices == {}
    assert session_of(pipe).log.density < 1


def test_another_backend_of_diffusers_has_figures_of_its_own(pipe, go, figures):
    from diffusers.models.attention_dispatch import attention_backend

    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    figures(37, against="best")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseWarning)
        go(pipe)
    # which also changes the default of every other model: put back at the end
    with attention_backend("native"):
        pipe.transformer.set_attention_backend("_native_math")
        with pytest.warns(DenseWarning):
            go(pipe)


def test_a_compiled_model_chooses_too(pipe, go, figures):
    wanted = go(pipe)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    figures(37)
    with pytest.warns(DenseWarning):
        assert torch.equal(go(pipe), wanted)
    assert session_of(pipe).log.density == 1.0


def test_time_of_dense_attention_that_was_chosen_is_attention(pipe, go, figures):
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    figures(37)
    with pytest.warns(DenseWarning), listening(pipe) as recorder:
        go(pipe)
    assert recorder.parts()["attend"] > 0


SIZES = {
    "Wan": {"height": 256, "width": 256, "num_frames": 33},
    "FLUX.1": {"height": 512, "width": 512},
}
"""2,304 and 1,024 tokens."""


@pytest.fixture(params=SIZES)
def measured_size(request, zoo):
    """A family with the heads of the shipped figures, on a GPU that these are for."""
    if not crossover.measured(crossover.architecture_of(torch.device("cuda")) or ""):
        pytest.skip("no figures are shipped for this GPU")
    family = zoo.FAMILIES[request.param]
    heads = {"attention_head_dim": 128, "num_attention_heads": 12}
    if request.param == "FLUX.1":
        heads["axes_dims_rope"] = (16, 56, 56)
    pipe = family.pipe(**family.shallow, **heads).to("cuda", torch.bfloat16)
    call = {**family.unguided, **SIZES[request.param], "dtype": torch.bfloat16}
    return pipe, lambda **changes: family.go(pipe, 2, **{**call, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["pisa", "psa", "flashblock"])
def test_a_short_call_on_a_gpu_is_dense(measured_size, method):
    pipe, run = measured_size
    wanted = run()
    dit_accel.accelerate(pipe, method)
    with pytest.warns(DenseWarning, match=f"{method}: dense attention takes its place"):
        assert torch.equal(run(), wanted)
    log = session_of(pipe).log
    assert log.density == 1.0
    assert list(log.choices.values()) == [len(log)]
    dit_accel.accelerate(pipe, method, dense_below=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseWarning)
        other = run()
    assert not torch.equal(other, wanted)
    assert session_of(pipe).log.choices == {}


@pytest.mark.gpu
@pytest.mark.parametrize("measured_size", ["Wan"], indirect=True)
def test_a_long_call_on_a_gpu_is_the_methods(measured_size):
    pipe, run = measured_size
    dit_accel.accelerate(pipe, "pisa", density=0.15)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseWarning)
        run(height=480, width=832, num_frames=81)  # 32,760 tokens
    log = session_of(pipe).log
    assert log.choices == {}
    assert log.density < 0.2
