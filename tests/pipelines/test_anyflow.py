"""AnyFlow FAR: block diffusion with a KV cache, on a small random model that came from a disk."""

import copy
import gc
import json
import sys

import pytest
import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
)
from diffusers.models.transformers.transformer_anyflow_far import (
    AnyFlowCausalAttnProcessor,
    AnyFlowCrossAttnProcessor,
)

import dit_accel
from dit_accel import InputError, presets
from dit_accel.cli import main
from dit_accel.flashblock import partial_bytes
from dit_accel.pipelines import load, processor, session_of
from dit_accel.pipelines.anyflow import AnyFlowProcessor
from dit_accel.pipelines.tiny_wan import model as tiny_wan

CHUNKS, LAYERS, STEPS, HEADS = (1, 2, 2, 1), 2, 3, 2
FINE, COARSE = 4 * 6, 2 * 3  # tokens of a frame, as a chunk and as distant context
CONTEXT = (0, FINE, COARSE + 2 * FINE, 3 * COARSE + 2 * FINE)  # keys in the cache, by chunk
KEPT = {"inner": "dense", "refresh": 99}


def transformer_for(parts, head_dim=12):
    """Of a pipeline with these parts."""
    torch.manual_seed(0)
    made = AnyFlowFARTransformer3DModel(
        full_chunk_limit=2,
        num_attention_heads=HEADS,
        attention_head_dim=head_dim,
        in_channels=parts["vae"].config.z_dim,
        out_channels=parts["vae"].config.z_dim,
        text_dim=parts["text_encoder"].config.d_model,
        freq_dim=16,
        ffn_dim=32,
        num_layers=LAYERS,
        rope_max_seq_len=32,
        chunk_partition=CHUNKS,
    )
    # attention of fresh weights is all but flat: sharpen it, so that what is kept shows
    for block in made.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.normal_(norm.weight, mean=2.0, std=0.5)
    return made


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    parts = tiny_wan.untrained(autoencoder={"base_dim": 8}).components
    transformer = transformer_for(parts)
    names = ("tokenizer", "text_encoder", "vae")
    made = AnyFlowFARPipeline(
        **{name: parts[name] for name in names},
        transformer=transformer,
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
    )
    where = tmp_path_factory.mktemp("anyflow")
    made.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def _loaded(directory):
    return AnyFlowFARPipeline.from_pretrained(directory)


@pytest.fixture
def pipe(_loaded):
    made = AnyFlowFARPipeline(
        **{name: copy.deepcopy(part) for name, part in _loaded.components.items()}
    )
    made.set_progress_bar_config(disable=True)
    return made


def go(pipe, **arguments):
    call = {
        "prompt": "a red circle moves right",
        "height": 8 * pipe.vae_scale_factor_spatial,
        "width": 12 * pipe.vae_scale_factor_spatial,
        "num_frames": (sum(CHUNKS) - 1) * pipe.vae_scale_factor_temporal + 1,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "max_sequence_length": 8,
        "generator": torch.Generator().manual_seed(0),
        **arguments,
    }
    return pipe(**call).frames


class Both(AnyFlowCausalAttnProcessor):
    """Runs stock and ours on the same inputs, goes on with stock, and notes how they differ."""

    def __init__(self, ours):
        super().__init__()
        self.ours, self.most, self.calls = ours, 0.0, 0

    def __call__(self, attn, hidden_states, **given):
        stock = super().__call__(attn, hidden_states, **given)
        ours = self.ours(attn, hidden_states, **given)
        self.most = max(self.most, float((ours - stock).abs().max()))
        self.calls += 1
        return stock


def compare(pipe, method, **options):
    both = Both(processor(pipe, method, **options))
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(both)
    return both


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dense", {}),
        ("flashblock", {"inner": "dense", "refresh": 1}),
        ("flashblock", {"inner": "pisa", "density": 1.0, "block_size": 8, "refresh": 1}),
        ("flashblock", {"inner": "psa", "ratios": (1.0, 1.0, 1.0, 1.0), "refresh": 1}),
        ("pisa", {"density": 1.0, "block_size": 8}),
        ("svg_ear", {"density": 1.0, "q_clusters": 3, "k_clusters": 5}),
        ("vmoba", {"threshold": 1.0}),
    ],
)
def test_where_everything_is_computed_it_is_stock(pipe, method, options):
    """Also the cached context, in its two resolutions, and the zeros that stock pads with."""
    pipe.transformer.double()
    both = compare(pipe, method, **options)
    go(pipe)
    assert both.calls == LAYERS * (len(CHUNKS) * STEPS + len(CHUNKS) - 1)
    assert both.most < 1e-12
    assert session_of(pipe).log.density == 1.0


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"num_inference_steps": 1}])
def test_dense_through_ours_is_stock_to_the_bit(directory, pipe, options):
    wanted = go(pipe, **options)
    ours = load(directory)
    ours.set_progress_bar_config(disable=True)
    ours.set_attn_processor("dense")
    assert torch.equal(go(ours, **options), wanted)
    assert session_of(ours).log.density == 1.0


def test_norms_by_the_kernel(pipe):
    """The chunk's own; keys of the context are rotated by diffusers' arithmetic."""
    pipe.transformer = transformer_for(pipe.components, head_dim=16)
    both = compare(pipe, "pisa", norm_rotary="triton", density=1.0, block_size=8)
    # two chunks, the second beside the first
    frames = pipe.vae_scale_factor_temporal + 1
    short = {"num_inference_steps": 1, "guidance_scale": 1.0}
    go(pipe, num_frames=frames, chunk_partition=[1, 1], **short)
    assert session_of(pipe).log.norm_rotary == {"triton": 2 * LAYERS, "diffusers": LAYERS}
    # rounding in fp32, in another order
    assert 0 < both.most < 1e-5


def test_halves(pipe):
    """The error against fp64 is at most twice that of stock."""
    exact = copy.deepcopy(pipe.transformer).double()
    pipe.transformer.bfloat16()
    both = compare(pipe, "flashblock", inner="dense", refresh=1)
    layer, seen = pipe.transformer.blocks[0].attn1, []

    def look(module, args, given, out):
        if not given["kv_cache_flag"]["is_cache_step"]:
            ours = both.ours(module, **given)
            wide = {"rotary_emb": given["rotary_emb"], "kv_cache_flag": given["kv_cache_flag"]}
            wide["hidden_states"] = given["hidden_states"].double()
            wide["kv_cache"] = {name: x.double() for name, x in given["kv_cache"].items()}
            wanted = AnyFlowCausalAttnProcessor()(exact.blocks[0].attn1, **wide)
            seen.append([float((x.double() - wanted).abs().max()) for x in (ours, out)])

    handle = layer.register_forward_hook(look, with_kwargs=True)
    go(pipe)
    handle.remove()
    assert len(seen) == len(CHUNKS) * STEPS
    assert max(a for a, _ in seen) <= 2 * max(b for _, b in seen)
    assert max(a for a, _ in seen) > 1e-5, "halves were used"


def test_clips_given_as_context(pipe):
    frames = torch.randn(1, 3, pipe.transformer.config.in_channels, 8, 12)
    pipe.transformer.double()
    both = compare(pipe, "flashblock", inner="dense", refresh=1)
    go(pipe, video_latents=frames.double())
    assert both.calls == LAYERS * (2 * STEPS + len(CHUNKS) - 1)
    assert both.most < 1e-12


@pytest.mark.parametrize("refresh", [1, 2, 99])
def test_the_context_is_computed_once_in_a_while(pipe, refresh, monkeypatch):
    from dit_accel import flashblock

    chunks, plain = [], flashblock.of_prefix

    def counting(q, ctx, scale=None):
        chunks.append(ctx.prefix.chunk)
        return plain(q, ctx, scale)

    monkeypatch.setattr(flashblock, "of_prefix", counting)
    dit_accel.accelerate(pipe, "flashblock", inner="dense", refresh=refresh)
    go(pipe)
    often = -(-STEPS // refresh) * LAYERS
    assert chunks == [1] * often + [2] * often + [3] * often


def test_densities_are_counted(pipe):
    pairs = [2 * n * FINE * (n * FINE + seen) for n, seen in zip(CHUNKS, CONTEXT, strict=True)]
    inside = [2 * (n * FINE) ** 2 for n in CHUNKS]
    # what the causal masks let through, where the cache is filled after the first three chunks
    sizes = [[FINE], [COARSE, 2 * FINE], [COARSE, 2 * COARSE, 2 * FINE]]
    fill = 2 * sum(n * sum(row[: i + 1]) for row in sizes for i, n in enumerate(row))
    go(dit_accel.accelerate(pipe, "flashblock", **KEPT))
    log = session_of(pipe).log
    share = sum(inside) / sum(pairs)
    assert log.by_step == {0: 1.0, 1: pytest.approx(share), 2: pytest.approx(share)}
    computed, every = fill + sum(pairs) + 2 * sum(inside), fill + 3 * sum(pairs)
    assert log.density == pytest.approx(computed / every)
    go(dit_accel.accelerate(pipe, "flashblock", layers=(-1,), **KEPT))
    log = session_of(pipe).log
    assert log.by_layer == {0: 1.0, 1: pytest.approx(computed / every)}
    go(dit_accel.accelerate(pipe, "flashblock", dense_steps=2, **KEPT))
    assert session_of(pipe).log.density == 1.0


@pytest.mark.parametrize("options", [KEPT, {"inner": "pisa", "density": 0.3, "block_size": 8}])
def test_what_is_kept_is_of_one_chunk_and_one_call(pipe, options):
    stock = go(pipe)
    dit_accel.accelerate(pipe, "flashblock", **options)
    state, sizes = session_of(pipe).state, {True: [], False: []}

    def look(module, args, given):
        sizes[given["kv_cache_flag"]["is_cache_step"]].append(
            (given["kv_cache_flag"]["num_cached_chunks"], len(state))
        )

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    wanted = go(pipe)
    handle.remove()
    assert len(state) == 0
    assert sizes[True] == [(0, 0), (1, 0), (2, 0)]
    later = [(chunk, size) for chunk in (1, 2, 3) for size in (0, LAYERS, LAYERS)]
    assert sizes[False][STEPS:] == later
    assert not torch.equal(wanted, stock)
    assert torch.equal(go(pipe), wanted)

    def stop(pipe, step, timestep, given):
        if step == 1 and len(state):
            raise RuntimeError("enough")
        return given

    with pytest.raises(RuntimeError, match="enough") as raised:
        go(pipe, callback_on_step_end=stop)
    del raised
    gc.collect()
    assert len(state) == 0
    assert torch.equal(go(pipe), wanted)


def test_both_halves_of_guidance_keep_their_own(pipe):
    """Two prompts in one batch, guided, are as each of them alone."""
    dit_accel.accelerate(pipe, "flashblock", **KEPT)
    prompts = ["a red circle moves right", "two blue stars spin"]
    noise = torch.randn(2, pipe.transformer.config.in_channels, sum(CHUNKS), 8, 12)
    both = go(pipe, prompt=prompts, negative_prompt=["", ""], latents=noise)
    for i, prompt in enumerate(prompts):
        alone = go(pipe, prompt=prompt, latents=noise[i : i + 1])
        torch.testing.assert_close(both[i], alone[0], rtol=0, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_the_budget_is_checked_before_anything_is_kept(pipe, monkeypatch):
    largest = torch.empty(2, HEADS, 2 * FINE, 12)
    assert partial_bytes(largest) == 2 * HEADS * 2 * FINE * (12 * 4 + 4)
    need = LAYERS * partial_bytes(largest) / 2**30
    go(dit_accel.accelerate(pipe, "flashblock", budget_gib=need * 1.001, **KEPT))
    go(dit_accel.accelerate(pipe, "flashblock", budget_gib=need * 0.501, layers=(1,), **KEPT))
    dit_accel.accelerate(pipe, "flashblock", budget_gib=need * 0.4, **KEPT)
    monkeypatch.setattr("dit_accel.flashblock.of_prefix", lambda *a: pytest.fail("computed"))
    with pytest.raises(InputError, match=r"within a budget of .* GiB, got .* GiB: 2 layers x 1"):
        go(pipe)


def test_set_attn_processor_and_restore(directory):
    pipe = load(directory)
    pipe.set_progress_bar_config(disable=True)
    stock, before = (
        go(pipe, num_inference_steps=2),
        [block.attn1.processor for block in pipe.transformer.blocks],
    )
    pipe.set_attn_processor("flashblock", **KEPT)
    wanted = go(pipe, num_inference_steps=2)
    dit_accel.restore(pipe)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == before
    assert torch.equal(go(pipe, num_inference_steps=2), stock)
    for given in (
        presets.flashblock(**KEPT),
        processor(pipe, "flashblock", **KEPT),
        {
            f"blocks.{i}.attn{n}.processor": processor(pipe, "flashblock", **KEPT)
            if n == 1
            else AnyFlowCrossAttnProcessor()
            for i in range(LAYERS)
            for n in (1, 2)
        },
    ):
        pipe.set_attn_processor(given)
        assert isinstance(pipe.transformer.blocks[0].attn1.processor, AnyFlowProcessor)
        assert torch.equal(go(pipe, num_inference_steps=2), wanted)
        dit_accel.restore(pipe)
        assert torch.equal(go(pipe, num_inference_steps=2), stock)
    with pytest.raises(InputError, match="expected a processor for each of 4 modules"):
        pipe.set_attn_processor({"blocks.0.attn1.processor": AnyFlowCausalAttnProcessor()})


def test_what_makes_no_sense_is_refused_before_a_run(pipe, make_pipe):
    wan = make_pipe()
    for inner, reason in (("dense", "leaves nothing out"), ("psa", "no exact complement")):
        with pytest.raises(InputError, match=f"flashblock: inner: .*{reason}"):
            dit_accel.accelerate(wan, "flashblock", inner=inner)
        dit_accel.accelerate(pipe, "flashblock", inner=inner)
    for target, last in ((pipe, LAYERS - 1), (wan, 2)):
        with pytest.raises(InputError, match=rf"layers: expected layers from .* to {last} of"):
            dit_accel.accelerate(target, "flashblock", layers=(0, 3))


def test_a_forward_without_a_cache_is_refused(pipe):
    given = {
        "hidden_states": torch.randn(1, 2, pipe.transformer.config.in_channels, 8, 12),
        "timestep": torch.zeros(1, 2),
        "r_timestep": torch.zeros(1, 2),
        "encoder_hidden_states": torch.randn(1, 4, pipe.transformer.config.text_dim),
        "chunk_partition": [1, 1],
    }
    dit_accel.accelerate(pipe, "flashblock", **KEPT)
    with torch.no_grad(), pytest.raises(InputError, match="use_kv_cache=True"):
        pipe.transformer(**given)


@pytest.mark.parametrize("method", ["dense", "flashblock"])
@pytest.mark.parametrize("how", ["blocks", "whole", "whole, broken"])
def test_a_compiled_transformer_is_refused(pipe, method, how):
    """However it was compiled, and not by going on without a graph."""
    dit_accel.accelerate(pipe, method, **(KEPT if method == "flashblock" else {}))
    plain, stock = pipe.transformer, go(pipe)
    torch._dynamo.reset()
    if how == "blocks":
        pipe.transformer.compile_repeated_blocks(backend="eager")
    else:
        pipe.transformer = torch.compile(plain, backend="eager", fullgraph=how == "whole")
    with pytest.raises(InputError, match=f"{method}: expected a transformer that is not compiled"):
        go(pipe)
    torch._dynamo.reset()
    if how != "blocks":
        pipe.transformer = plain
        assert torch.equal(go(pipe), stock)


@pytest.mark.parametrize(("frames", "chunks"), [(9, 3), (11, 4), (21, 6)])
def test_the_command_line_generates(directory, tmp_path, monkeypatch, capsys, frames, chunks):
    """Also another number of frames than that of the checkpoint's chunks, which are cut anew."""
    monkeypatch.chdir(tmp_path)
    words = ["generate", "a red circle moves right", "--model", str(directory), "--steps", "2"]
    words += ["--method", "flashblock", "--set", "inner=dense", "--set", "refresh=2"]
    words += ["--height", "64", "--width", "96", "--frames", str(frames), "--guidance", "1"]
    monkeypatch.setattr(sys, "argv", ["dit-accel", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["frames"] == frames
    assert len(record["seconds"]["steps"]) == 2 * chunks
    assert 0 < record["density"] < 1
