"""Settings of papers, by model."""

import json
from types import SimpleNamespace

import pytest

from dit_accel import InputError, Method, presets
from dit_accel.suggestions import _TABLE, known_models

WAN = {"_class_name": "WanTransformer3DModel", "num_layers": 40, "num_attention_heads": 40}


def directory(path, **transformers):
    path.joinpath("model_index.json").write_text("{}")
    for name, config in transformers.items():
        path.joinpath(name).mkdir()
        path.joinpath(name, "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("model", known_models())
def test_every_suggestion_makes_a_method_and_names_its_source(model):
    found = presets.for_model(model)
    assert found
    for name, one in found.items():
        assert one.method == name
        assert "arXiv" in one.source or "GitHub" in one.source
        method = one.build()
        assert Method.from_config(one.to_config()) == method
        json.dumps(one.to_config())
        for option, value in one.options.items():
            assert option in presets.get(name).options, option
            assert method.options[option] == value


def test_settings_are_the_papers():
    wan = presets.for_model("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert wan["pisa"].build() == presets.pisa(density=0.15, block_size=64, block_q=64)
    ear = wan["svg_ear"].build()
    assert (ear.layout.q_clusters, ear.layout.k_clusters) == (300, 1000)
    assert ear.schedule.dense_steps == 0.2
    assert ear.schedule.dense_layers == (0,), "3% of 40 layers, rounded down as the script does"
    assert wan["psa"].build().route.ratios == (0.4, 0.5, 0.6, 0.8)
    hunyuan = presets.for_model("hunyuanvideo-community/HunyuanVideo")
    assert hunyuan["svg_ear"].build().layout.q_clusters == 400
    assert hunyuan["svg_ear"].build().schedule.dense_steps == 0.1
    flux = presets.for_model("black-forest-labs/FLUX.1-dev")["pisa"].build()
    assert flux.schedule.dense_layers == (0, 1, 2, 3)
    assert flux.layout.tile == (1, 8, 8)
    small = presets.for_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert small["vmoba"].build().schedule.dense_steps == 12 / 50
    assert small["psa"].build().route.similarity_cap


def test_own_options_come_first():
    one = presets.for_model("wan-ai/wan2.1-t2v-14b-diffusers")["pisa"]
    assert one.build(density=0.3, rest="moment").density_asked == 0.3
    with pytest.raises(InputError, match="got 'densty'"):
        one.build(densty=0.3)


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("Wan-AI/Wan2.1-T2V-14B", "did you mean 'Wan-AI/Wan2.1-T2V-14B-Diffusers'"),
        ("somebody/else", "got 'somebody/else'"),
        (3, "got a int"),
    ],
)
def test_unknown_models_are_told_the_known_ones(model, near):
    with pytest.raises(InputError, match="expected one that a paper has settings for") as caught:
        presets.for_model(model)
    assert near in str(caught.value)
    assert "hunyuanvideo-community/HunyuanVideo" in str(caught.value)


def test_a_directory_is_known_by_its_sizes(tmp_path):
    for name, transformers, model in (
        ("a", {"transformer": {**WAN, "in_channels": 16}}, "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("b", {"transformer": {**WAN, "in_channels": 36}}, "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
        (
            "c",
            {name: {**WAN, "in_channels": 16} for name in ("transformer", "transformer_2")},
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        ),
    ):
        path = tmp_path / name
        path.mkdir()
        assert presets.for_model(directory(path, **transformers)) == presets.for_model(model)
        assert presets.for_model(str(path)) == presets.for_model(model)
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="expected one that a paper"):
        presets.for_model(directory(tmp_path / "d", transformer={**WAN, "num_layers": 39}))
    (tmp_path / "e").mkdir()
    broken = directory(tmp_path / "e", transformer={})
    (broken / "transformer" / "config.json").write_text("{")
    with pytest.raises(InputError, match="expected JSON in"):
        presets.for_model(broken)


def test_a_pipeline_is_known_by_its_sizes():
    class FluxTransformer2DModel:
        def __init__(self):
            self.config = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}

    pipe = SimpleNamespace(components={"transformer": FluxTransformer2DModel(), "vae": object()})
    assert presets.for_model(pipe) == presets.for_model("black-forest-labs/FLUX.1-dev")


def test_no_two_models_have_the_same_sizes():
    seen = [(row.transformer, tuple(row.sizes.items()), row.two) for row in _TABLE]
    assert len(set(seen)) == len(seen)
