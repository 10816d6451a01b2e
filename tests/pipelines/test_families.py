"""What holds for every family: whole pipelines, saved, loaded by `load`, run, and undone."""

import copy

import pytest
import specimens
import torch
from specimens import EVERY, PROMPTS, calls_of, copied, go, joined, models_of, replay
from spy import spying

import dit_accel
from dit_accel import InputError
from dit_accel.pipelines import processor, session_of

# block sizes that divide nothing here
FULL = {
    "pisa": {"density": 1.0, "block_size": 7, "layout": "tile3d"},
    "svg_ear": {"density": 1.0, "q_clusters": 3, "k_clusters": 5},
    "psa": {"ratios": (1.0, 1.0, 1.0, 1.0), "block_q": 5, "block_k": 7},
    "vmoba": {"threshold": 1.0, "layout": "gilbert", "block_size": 5},
    "flashblock": {"density": 1.0, "block_size": 7, "refresh": 2},
}
LOW = {
    "pisa": {"density": 0.2, "block_size": 4},
    "svg_ear": {"density": 0.2, "q_clusters": 6, "k_clusters": 8},
    "psa": {"ratios": (0.1, 0.2, 0.3, 0.5), "mode": "topk", "block_q": 4, "block_k": 4},
    "vmoba": {"threshold": 0.1, "layout": "gilbert", "block_size": 4},
    "flashblock": {"density": 0.2, "block_size": 4, "refresh": 2},
}
# what the others do to tokens, one of these does
DISTINCT = (
    "wan", "wan_i2v", "wan_vace", "hunyuan", "hunyuan_i2v", "hunyuan15", "hunyuan15_i2v",
    "flux_dev", "kontext", "flux2", "flux2_image", "klein_kv_image",
)  # fmt: skip
PADDED = ("hunyuan", "hunyuan_i2v", "hunyuan15", "hunyuan15_i2v")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # fp64; diffusers itself rotates and norms in fp32

_recorded = {}


@pytest.fixture(params=EVERY)
def specimen(request):
    return EVERY[request.param]


def of(names):
    """Of some specimens alone."""
    return pytest.mark.parametrize("specimen", [EVERY[name] for name in names], ids=names)


@pytest.fixture
def pipe(specimen, loaded_family):
    """Saved by diffusers and loaded by `load`; as good as new after every test."""
    return loaded_family(specimen)


def recorded(pipe, specimen, prompt=PROMPTS[0]):
    """What stock diffusers gives the transformers, in fp64, and fp64 transformers to give it to."""
    if specimen.name not in _recorded:
        dit_accel.restore(pipe)
        double = {name: copy.deepcopy(model).double() for name, model in models_of(pipe).items()}
        _recorded[specimen.name] = double, {}
    models, known = _recorded[specimen.name]
    if prompt not in known:
        dit_accel.restore(pipe)
        calls = calls_of(pipe, specimen, prompt=prompt)
        calls = [(name, copied(kwargs, torch.float64)) for name, kwargs in calls]
        known[prompt] = calls, replay(models, calls)
    return models, *known[prompt]


@pytest.fixture
def record(pipe, specimen):
    models, calls, wanted = recorded(pipe, specimen)
    yield models, calls, wanted
    for model in models.values():
        dit_accel.restore(model)


def through(models, calls, method, **options):
    for model in models.values():
        dit_accel.accelerate(model, method, **options)
    return replay(models, calls)


def test_loading_gives_the_stock_pipeline(pipe, specimen):
    stock = specimens.built(specimen.make)
    assert type(pipe) is type(stock)
    assert callable(pipe.set_attn_processor)
    for name, model in models_of(stock).items():
        theirs = model.state_dict()
        for key, value in models_of(pipe)[name].state_dict().items():
            assert torch.equal(value, theirs[key]), key


def test_dense_through_ours_is_stock_to_the_bit(pipe, specimen):
    wanted = go(pipe, specimen)
    assert wanted.isfinite().all()
    assert dit_accel.accelerate(pipe, "dense") is pipe
    assert torch.equal(go(pipe, specimen), wanted)
    log = session_of(pipe).log
    assert log.by_step == dict.fromkeys(range(specimen.call["num_inference_steps"]), 1.0)
    assert log.by_layer == dict.fromkeys(range(specimen.layers), 1.0)
    pipe.set_attn_processor("pisa", dense_steps=9, **LOW["pisa"])
    assert torch.equal(go(pipe, specimen), wanted)


def test_low_density_differs_and_restore_undoes_it(pipe, specimen):
    dit_accel.restore(pipe)
    wanted = go(pipe, specimen)
    before = {name: dict(model.attn_processors) for name, model in models_of(pipe).items()}
    dit_accel.accelerate(pipe, "pisa", **LOW["pisa"])
    sparse = go(pipe, specimen)
    assert sparse.isfinite().all()
    assert (sparse - wanted).abs().max() > 1e-4
    assert session_of(pipe).log.density < 1
    assert len(session_of(pipe).state) == 0
    assert torch.equal(go(pipe, specimen), sparse), "nothing is left of the call before"
    # one instance for every module, by diffusers' own setter: text refiners and cross-attention too
    dit_accel.restore(pipe)
    for model in models_of(pipe).values():
        model.set_attn_processor(processor(pipe, "pisa", **LOW["pisa"]))
    assert torch.equal(go(pipe, specimen), sparse)
    assert dit_accel.restore(pipe) is pipe
    for name, model in models_of(pipe).items():
        after = model.attn_processors
        assert after.keys() == before[name].keys()
        assert all(after[key] is before[name][key] for key in after)
        for module in model.modules():
            assert not [key for key in vars(module) if "dit_accel" in key]
            assert not module._forward_pre_hooks
    assert torch.equal(go(pipe, specimen), wanted)


@of(DISTINCT)
@pytest.mark.parametrize("method", FULL)
def test_at_full_density_every_method_is_dense(record, method):
    """In fp64, where nothing but a wrong formula could tell them apart."""
    models, calls, wanted = record
    for got, stock in zip(through(models, calls, method, **FULL[method]), wanted, strict=True):
        torch.testing.assert_close(got, stock, **CLOSE)


@of(DISTINCT)
@pytest.mark.parametrize("method", LOW)
def test_at_low_density_every_method_differs(record, method):
    models, calls, wanted = record
    got = through(models, calls, method, **LOW[method])
    assert all(out.isfinite().all() for out in got)
    # flashblock is exact at every other step here
    assert max((a - b).abs().max() for a, b in zip(got, wanted, strict=True)) > 1e-4


def test_steps_branches_and_layers(pipe, specimen):
    """Whoever tells the step, and through the switch of A14B."""
    method = spying(dense_steps=1)
    dit_accel.accelerate(pipe, method)
    go(pipe, specimen, num_inference_steps=3)
    seen = method.route.seen
    each = range(specimen.layers)
    assert [(step, layer) for step, _, layer, *_ in seen] == [
        (step, layer) for step in (1, 2) for _ in range(specimen.branches) for layer in each
    ]
    assert {total for _, total, *_ in seen} == {3}
    branches = [branch.split("/")[1] for *_, branch, _ in seen[:: specimen.layers]]
    assert branches == branches[: specimen.branches] * 2
    assert len(set(branches)) == specimen.branches
    assert session_of(pipe).log.by_step[0] == 1.0
    models = {branch.split("/")[0] for *_, branch, _ in seen}
    assert models == set(models_of(pipe)), "both of A14B had their share"


def test_a_batch_of_two_is_two_batches_of_one(pipe, specimen):
    """Prompts of different lengths; where texts are padded, masks of different lengths."""
    models, one, _ = recorded(pipe, specimen)
    _, two, _ = recorded(pipe, specimen, PROMPTS[1])
    try:
        alone = [through(models, calls, "pisa", **LOW["pisa"]) for calls in (one, two)]
        assert (alone[0][0] - alone[1][0]).abs().max() > 1e-6, "the prompts matter"
        calls = [(name, joined(a, b)) for (name, a), (_, b) in zip(one, two, strict=True)]
        for got, *wanted in zip(through(models, calls, "pisa", **LOW["pisa"]), *alone, strict=True):
            torch.testing.assert_close(got, torch.cat(wanted), **CLOSE)
    finally:
        for model in models.values():
            dit_accel.restore(model)


@pytest.mark.parametrize("options", [{"density": 1.0}, {"density": 0.2}, {"dense_steps": 9}])
@of(PADDED)
def test_padded_text_changes_nothing(record, options):
    models, calls, _ = record
    wanted = through(models, calls, "pisa", block_size=4, **options)
    spoiled = 0
    garbled = []
    for name, kwargs in calls:
        kwargs = dict(kwargs)
        for suffix in ("", "_2"):
            mask = kwargs.get(f"encoder_attention_mask{suffix}")
            if mask is None:
                continue
            padding = mask == 0
            text = kwargs[f"encoder_hidden_states{suffix}"].clone()
            text[padding] = 1e3
            kwargs[f"encoder_hidden_states{suffix}"] = text
            spoiled += int(padding.sum())
        garbled.append((name, kwargs))
    assert spoiled > len(calls)
    for got, out in zip(
        through(models, garbled, "pisa", block_size=4, **options), wanted, strict=True
    ):
        torch.testing.assert_close(got, out, **CLOSE)


def test_a_transformer_must_be_prepared(pipe, specimen):
    dit_accel.restore(pipe)
    model = models_of(pipe)["transformer"]
    ours = type(processor(pipe, "pisa"))
    dit_accel.restore(pipe)
    stock = dict(model.attn_processors)
    model.set_attn_processor(ours(dit_accel.presets.pisa()))
    with pytest.raises(InputError, match="expected a transformer prepared by"):
        go(pipe, specimen)
    model.set_attn_processor(stock)
