"""Whole transformers with random weights: what is built, what is timed, and what is refused."""

import json

import diffusers
import pytest
import torch

from dit_accel import InputError, presets
from dit_accel.eval import bench_pipeline, pipeline_models, pipeline_tables, pipeline_totals
from dit_accel.eval.bench_pipeline import Asked, IncorrectError
from dit_accel.eval.pipeline_parts import PARTS, divided, seconds_by_part
from dit_accel.eval.pipeline_steps import kinds, plan
from dit_accel.pipelines import accelerate, restore

QUICK = {"dtype": torch.float32, "device": "cpu", "repeats": 2, "each": 1, "splits": 1}


@pytest.fixture(scope="module")
def found():
    methods = {
        "pisa": presets.pisa(density=0.2, block_size=16),
        "flashblock": presets.flashblock(block_size=16, refresh=2),
    }
    with torch.inference_mode():
        return bench_pipeline.run(
            ["tiny"], Asked(methods, **QUICK), layers=(1, 3), whole=True, say=lambda text: None
        )


def test_parts_and_remainder_make_up_every_forward(found):
    model = found["models"]["tiny"]
    assert [run["layers"]["num_layers"] for run in model["runs"]] == [1, 3]
    assert model["whole"]["layers"] == {"num_layers": 4}
    for run in (*model["runs"], model["extrapolated"], model["whole"]):
        for told in run["methods"].values():
            for kind in told["kinds"].values():
                assert set(kind["parts"]) == set(PARTS)
                total = sum(kind["parts"].values()) + kind["remainder_ms"]
                assert total == pytest.approx(kind["ms"])
    sparse = model["whole"]["methods"]["pisa"]["kinds"]["each"]
    assert all(sparse["parts"][part] > 0 for part in PARTS)
    assert model["whole"]["methods"]["dense"]["kinds"]["dense"]["parts"]["routing and layout"] == 0
    assert 0.15 < sparse["density"] < 0.4


def test_the_whole_is_extrapolated_from_what_lies_outside_and_one_layer(found):
    model = found["models"]["tiny"]
    first, then = (run["methods"]["pisa"]["kinds"]["each"]["ms"] for run in model["runs"])
    each = (then - first) / 2
    wanted = first + 3 * each
    assert model["extrapolated"]["methods"]["pisa"]["kinds"]["each"]["ms"] == pytest.approx(wanted)


def test_the_mean_step_counts_kinds_as_often_as_they_come(found):
    told = found["models"]["tiny"]["whole"]["methods"]["flashblock"]
    refresh, kept = told["kinds"]["refresh"], told["kinds"]["kept"]
    assert (refresh["count"], kept["count"]) == (25, 25)
    assert refresh["density"] == 1.0 > kept["density"]
    assert told["mean_ms"] == pytest.approx((refresh["ms"] + kept["ms"]) / 2)
    assert told["step_ms"] == pytest.approx(2 * told["mean_ms"]), "two forwards with guidance"


def test_table_and_json(found):
    json.dumps(found)
    text = pipeline_tables.table(found)
    assert "4 (from 1 and 3)" in text
    assert "refresh (25 of 50)" in text
    assert "mean of 50" in text


def test_kinds_of_layers_are_told_apart():
    """Of FLUX.1, whose single layers need not cost what the others do."""
    times = {(1, 1): 10.0, (2, 1): 13.0, (1, 2): 15.0}

    def run(pair):
        kind = {"count": 50, "ms": times[pair], "density": 1.0, "ratio": 1.0}
        return {"methods": {"dense": {"kinds": {"dense": kind}}}}

    spec = pipeline_models.get("flux")
    found = pipeline_totals.extrapolated(spec, [run(pair) for pair in times], (1, 2))
    assert found["methods"]["dense"]["mean_ms"] == 10 + 18 * 3 + 37 * 5


@pytest.mark.parametrize("name", ["tiny", "tiny-flux", "tiny-hunyuan"])
def test_what_is_wrong_is_not_timed(name, monkeypatch):
    spec = pipeline_models.get(name)
    with torch.inference_mode():
        bench_pipeline.check(spec, presets.pisa(), torch.float32, "cpu")
        monkeypatch.setattr(bench_pipeline, "full", lambda method: presets.pisa(density=0.1))
        with pytest.raises(IncorrectError, match="expected dense attention within"):
            bench_pipeline.check(spec, presets.pisa(), torch.float32, "cpu")
        monkeypatch.undo()
        monkeypatch.setattr(bench_pipeline, "check", wrong)
        asked = Asked({"pisa": presets.pisa()}, **QUICK)
        told = bench_pipeline.run([name], asked, layers=(1, 2), say=lambda text: None)
    model = told["models"][name]
    assert model["wrong"] == {"pisa": "IncorrectError: off"}
    assert list(model["extrapolated"]["methods"]) == ["dense"]
    assert "not timed: IncorrectError: off" in pipeline_tables.table(told)


def wrong(*arguments):
    raise IncorrectError("off")


@pytest.mark.parametrize(
    "method",
    [
        presets.svg_ear(),
        presets.psa(mode="topk"),
        presets.vmoba(mode="topk", dense_steps=0.2),
        presets.flashblock(inner="vmoba"),
        presets.pisa(route="topp", rest="moment"),
    ],
    ids=lambda method: method.name,
)
def test_everything_exact_can_be_asked_of_every_method(method):
    with torch.inference_mode():
        spec = pipeline_models.get("tiny")
        bench_pipeline.check(spec, method, torch.float32, "cpu")


def test_kinds_of_steps():
    assert kinds(presets.pisa(dense_steps=2), 4) == ("dense", "dense", "each", "each")
    assert kinds(presets.svg_ear(), 3) == ("cold", "warm", "warm")
    assert kinds(presets.flashblock(inner="svg_ear", refresh=2), 4) == (
        "refresh, cold", "kept", "refresh, warm", "kept",
    )  # fmt: skip
    assert kinds(presets.pisa(density={0: 1.0, 1: 0.5, 2: 0.2}), 3) == (
        "dense", "density 0.5", "density 0.2",
    )  # fmt: skip
    found = plan(presets.flashblock(refresh=3), 7, each=2)
    assert found.steps == ((0, "refresh"), (1, "kept"), (2, "kept"), (3, "refresh"))
    assert found.counts == {"refresh": 3, "kept": 4}


def test_real_dimensions():
    """What `transformer/config.json` says in the repositories of the models."""
    wan = pipeline_models.get("wan1.3b")
    assert wan.tokens == 32760
    assert pipeline_models.get("wan14b").tokens == 75600
    assert pipeline_models.get("flux").tokens == 4096 + 512
    assert pipeline_models.get("hunyuan").tokens == 118800 + 256
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**wan.config, **wan.layers)
    assert pipeline_models.parameters(model) == pytest.approx(1.42e9, rel=0.01)


def test_weights_are_drawn_by_seed_and_kept_in_fp32_where_diffusers_does():
    spec = pipeline_models.get("tiny")
    one, other, third = (
        pipeline_models.build(spec, {"num_layers": 1}, torch.bfloat16, "cpu", seed)
        for seed in (1, 1, 2)
    )
    weight = one.blocks[0].ffn.net[0].proj.weight
    assert weight.dtype == torch.bfloat16
    assert one.blocks[0].scale_shift_table.dtype == torch.float32
    assert one.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert torch.equal(weight, other.blocks[0].ffn.net[0].proj.weight)
    assert not torch.equal(weight, third.blocks[0].ffn.net[0].proj.weight)
    assert one.rope.freqs_cos.dtype == torch.float32


def test_every_moment_belongs_to_a_part(monkeypatch):
    """By a clock that ticks once at every look: no tick is lost, and none counted twice."""
    from dit_accel import recorder as recording

    spec = pipeline_models.get("tiny")
    model = pipeline_models.build(spec, {"num_layers": 2}, torch.float32, "cpu")
    ticks = iter(range(10**6))
    monkeypatch.setattr(recording.time, "perf_counter", lambda: float(next(ticks)))
    with torch.inference_mode():
        accelerate(model, "pisa", block_size=16)
        with divided(model, "cpu") as recorder:
            model(**spec.inputs(spec, 1, torch.float32, "cpu"))
        restore(model)
    found = seconds_by_part(recorder)
    assert sum(found.values()) == next(ticks) - 1
    assert all(found[part] > 0 for part in PARTS)


def test_hooks_leave_the_norms_of_self_attention_to_the_kernel():
    spec = pipeline_models.get("tiny")
    model = pipeline_models.build(spec, {"num_layers": 1}, torch.float32, "cpu")
    with divided(model, "cpu"):
        (block,) = model.blocks
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            assert not norm._forward_hooks
            assert not norm._forward_pre_hooks
        assert block.attn2.norm_q._forward_hooks  # cross-attention is diffusers' own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": None, "whole": False}, "layers: expected two numbers of layers, or the whole"),
        ({"layers": (3, 1)}, "layers: expected two numbers that rise from 1, got"),
        ({"names": ["wan"]}, "models: expected some of wan1.3b, wan14b"),
        ({"repeats": 0}, "repeats: expected an integer, 1 or more, got 0"),
        ({"backend": "cudnn"}, "backend: expected one that a CPU has"),
        ({"methods": {"pisa": presets.pisa(dense_layers=(0,))}}, "--whole times all of them"),
    ],
)
def test_bad_input_is_told_before_anything_is_built(change, message):
    given = {"names": ["tiny"], "layers": (1, 2), "whole": False, **change}
    names, layers, whole = (given.pop(key) for key in ("names", "layers", "whole"))
    asked = Asked(**{"methods": {}, **QUICK, **given})
    with pytest.raises(InputError, match=message):
        bench_pipeline.run(names, asked, layers=layers, whole=whole, say=lambda text: None)
