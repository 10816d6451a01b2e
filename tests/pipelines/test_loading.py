"""Loading by path, hub id and embedded name."""

import json
import warnings

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from specimens import EVERY, go

import dit_accel
from dit_accel import InputError, presets
from dit_accel.pipelines import embedded, load, session_of
from dit_accel.pipelines.embedded import VocabularyWarning


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_saved):
    return make_saved(tmp_path_factory.mktemp("pipe"))


def test_a_directory(saved, go):
    pipe = load(saved)
    assert type(pipe) is WanPipeline
    assert pipe.transformer.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    stock = WanPipeline.from_pretrained(saved)
    stock.set_progress_bar_config(disable=True)
    wanted = go(stock)
    assert torch.equal(go(pipe), wanted), "loading alone changes nothing"
    assert len(session_of(pipe).log) == 0
    pipe.set_attn_processor("pisa", density=0.25, block_size=4)
    sparse = go(pipe)
    assert session_of(pipe).log.density < 0.5
    pipe.set_attn_processor(presets.dense())
    assert torch.equal(go(pipe), wanted)
    pipe.set_attn_processor(WanAttnProcessor())
    assert torch.equal(go(pipe), wanted)
    dit_accel.restore(pipe)
    pipe.set_attn_processor("pisa", density=0.25, block_size=4)
    assert torch.equal(go(pipe), sparse)


def test_dtype_device_and_options(saved):
    pipe = load(str(saved), dtype=torch.bfloat16, device="cpu")
    assert pipe.transformer.dtype == torch.bfloat16
    pipe = load(saved, dtype={"default": torch.bfloat16, "vae": torch.float32})
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_of_every_family(saved_family, name):
    """The dtypes that `load` chooses for a GPU; and what it loads with them runs."""
    specimen = EVERY[name]
    dtype = torch.bfloat16
    if specimen.video:
        dtype = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = load(saved_family(specimen), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    for key, value in specimen.short.items():
        setattr(pipe, key, value)
    assert pipe.transformer.dtype == torch.bfloat16
    pipe.set_attn_processor("pisa", density=0.25, block_size=4)
    out = go(pipe, specimen, output_type="pt", num_inference_steps=1)
    assert out.isfinite().all()
    assert session_of(pipe).log.density < 1


def test_a_variant(pipe, tmp_path):
    pipe.transformer.half()
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    shards = list((tmp_path / "transformer").glob("*.fp16-*.safetensors"))
    assert len(shards) > 1
    loaded = load(tmp_path, variant="fp16")
    wanted = pipe.transformer.state_dict()
    for key, value in loaded.transformer.state_dict().items():
        assert torch.equal(value, wanted[key].float()), key
    with pytest.raises(InputError, match=r"^model: "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-wam", "expected tiny-wan, an existing directory or .* got 'tiny-wam' .*'tiny-wan'"),
        ("a/b/c", "an existing directory or a hub id such as owner/name, got 'a/b/c'"),
        ("/nowhere/at/all", "got '/nowhere/at/all'"),
    ],
)
def test_unknown_names_never_reach_the_hub(name, message, monkeypatch):
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *a, **kw: pytest.fail("asked"))
    with pytest.raises(InputError, match=message):
        load(name)


def test_a_hub_id_that_cannot_be_fetched_is_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^model: ") as told:
        load("nobody/nothing-at-all", cache_dir=str(tmp_path), local_files_only=True)
    assert "\n" not in str(told.value)


def test_a_directory_without_a_pipeline(tmp_path):
    with pytest.raises(InputError, match=r"expected a pipeline directory with a model_index.json"):
        load(tmp_path)


def test_another_family_is_refused_before_its_weights_are_read(tmp_path):
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    message = "got StableDiffusion3Pipeline with a SD3Transformer2DModel"
    with pytest.raises(InputError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x"])
def test_a_device_that_is_not_there(saved, device):
    with pytest.raises(InputError, match="device: expected one"):
        load(saved, device=device)


def test_the_embedded_model_brings_its_block_size(tiny_wan):
    assert embedded.find("tiny-wan").method_options["block_size"] == 16
    tiny_wan.set_attn_processor("pisa")
    assert _method(tiny_wan).options["block_size"] == 16
    tiny_wan.set_attn_processor("pisa", block_size=32)
    assert _method(tiny_wan).options["block_size"] == 32
    tiny_wan.set_attn_processor(presets.pisa())
    assert _method(tiny_wan).options["block_size"] == 64
    dit_accel.restore(tiny_wan)
    dit_accel.accelerate(tiny_wan, "pisa")
    assert _method(tiny_wan).options["block_size"] == 16
    assert embedded.options_for("owner/name", "pisa", {"density": 0.3}) == {"density": 0.3}
    assert embedded.options_for("tiny-wan", "dense", {}) == {}


def _method(pipe):
    return pipe.transformer.blocks[0].attn1.processor.method


def test_words_outside_the_vocabulary(tiny_wan):
    with pytest.warns(VocabularyWarning, match="does not know 'dragon', 'fierce'; it knows: a, an"):
        tiny_wan.encode_prompt("A red dragon, moves right.", "fierce")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_wan.encode_prompt(["Two red circles move right, over a plain blue background."])
        tiny_wan.encode_prompt("a red circle moves right", None, False)


def test_defaults_of_unknown_models():
    with pytest.raises(InputError, match="expected one of tiny-wan, got 'big-wan'"):
        embedded.defaults("big-wan")
