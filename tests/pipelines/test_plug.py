"""Swapping a method into a stock Wan pipeline, and out again."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import dit_accel
from dit_accel import InputError, Method, Schedule, presets
from dit_accel.layout import LAYOUTS
from dit_accel.pipelines import processor, session_of
from dit_accel.pipelines.plug import set_attn_processor
from dit_accel.pipelines.session import ATTRIBUTE
from dit_accel.pipelines.wan import WanProcessor
from dit_accel.rest import Centroid
from dit_accel.route import PooledScore

SPARSE = {"density": 0.25, "block_size": 4}


class Spy:
    """A route with memory: it keeps its first plan, and notes where it was called."""

    needs = ()

    def __init__(self):
        self.seen = []
        self.inner = PooledScore(density=0.3, bias=False)

    def __call__(self, blocked, rest, ctx):
        first = "plan" not in ctx.memory
        plan = ctx.memory.setdefault("plan", self.inner(blocked, rest, ctx))
        self.seen.append((ctx.step, ctx.num_steps, ctx.layer, ctx.branch, first))
        return plan


def spying(**schedule):
    return Method(LAYOUTS["raster"](4), Spy(), Centroid(), Schedule(**schedule), name="spy")


def test_dense_through_ours_is_stock_to_the_bit(pipe, go):
    wanted = go(pipe)
    assert dit_accel.accelerate(pipe, "dense") is pipe
    assert torch.equal(go(pipe), wanted)
    assert session_of(pipe).log.density == 1.0


def test_restore_leaves_nothing_behind(pipe, go):
    wanted = go(pipe)
    before = dict(pipe.transformer.attn_processors)
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    assert not torch.equal(go(pipe), wanted)
    dit_accel.accelerate(pipe, "pisa", density=0.5, block_size=4)
    assert dit_accel.restore(pipe) is pipe
    after = pipe.transformer.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(go(pipe), wanted)
    for module in pipe.transformer.modules():
        assert not [name for name in vars(module) if "dit_accel" in name]
        assert not module._forward_pre_hooks
    assert pipe.transformer._diffusers_hook.hooks == {}
    dit_accel.restore(pipe)  # nothing to undo
    with pytest.raises(InputError, match="never prepared"):
        session_of(pipe)


def test_restore_gives_back_what_stood_there_last(pipe):
    dit_accel.accelerate(pipe, "pisa")
    mine = WanAttnProcessor()
    pipe.transformer.blocks[1].attn1.set_processor(mine)
    dit_accel.accelerate(pipe, "pisa", density=0.3)
    dit_accel.restore(pipe)
    assert pipe.transformer.blocks[1].attn1.processor is mine


def test_two_runs_are_identical_and_leave_no_state(pipe, go):
    dit_accel.accelerate(pipe, spying())
    first = go(pipe)
    assert len(session_of(pipe).state) == 0
    assert torch.equal(go(pipe), first)


def test_an_exception_spoils_nothing(pipe, go):
    dit_accel.accelerate(pipe, spying())
    wanted = go(pipe, seed=5)

    def fail(pipe, step, timestep, given):
        if step == 1:
            raise RuntimeError("stopped by the user")
        return given

    with pytest.raises(RuntimeError, match="stopped by the user"):
        go(pipe, seed=1, callback_on_step_end=fail)
    assert len(session_of(pipe).state) > 0, "the broken call left its plans"
    assert torch.equal(go(pipe, seed=5), wanted)


def test_branches_and_layers_have_memories_of_their_own(pipe, go):
    method = spying()
    dit_accel.accelerate(pipe, method)
    go(pipe)
    seen = method.route.seen
    assert [step for step, *_ in seen] == [step for step in range(4) for _ in range(6)]
    assert {total for _, total, *_ in seen} == {4}
    branches = {branch for *_, branch, _ in seen}
    assert branches == {"transformer/cond", "transformer/uncond"}
    # new at the first step, remembered at all others
    assert [first for *_, first in seen] == [True] * 6 + [False] * 18


def test_the_plan_of_one_branch_is_not_seen_by_the_other(pipe, go):
    """Sequential guidance: the result of each branch is that of a run of this branch alone."""
    outputs = []
    dit_accel.accelerate(pipe, spying())
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, out: outputs.append(out[0].clone())
    )
    go(pipe, num_inference_steps=1)
    cond, uncond = outputs
    outputs.clear()
    go(pipe, prompt="", num_inference_steps=1, guidance_scale=1.0)
    handle.remove()
    assert torch.equal(outputs[0], uncond)
    assert not torch.equal(outputs[0], cond)


@pytest.mark.parametrize(("asked", "dense"), [(0, 0), (1, 1), (0.5, 2), (0.1, 0), (9, 4)])
def test_the_first_steps_may_stay_dense(pipe, go, asked, dense):
    dit_accel.accelerate(pipe, "pisa", dense_steps=asked, **SPARSE)
    go(pipe)
    by_step = session_of(pipe).log.by_step
    assert sorted(by_step) == [0, 1, 2, 3]
    assert [density == 1.0 for density in by_step.values()] == [s < dense for s in range(4)]


def test_layers_may_stay_dense(pipe, go):
    dit_accel.accelerate(pipe, presets.pisa(**SPARSE), dense_layers=(0, -1))
    go(pipe)
    by_layer = session_of(pipe).log.by_layer
    assert [by_layer[layer] == 1.0 for layer in range(3)] == [True, False, True]
    with pytest.raises(InputError, match=r"expected layers from -3 to 2 of transformer, got 3"):
        dit_accel.accelerate(pipe, "pisa", dense_layers=(3,))


def test_one_instance_for_every_module(pipe, go):
    """diffusers' own setter, which also reaches cross-attention."""
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    wanted, density = go(pipe), session_of(pipe).log.density
    dit_accel.restore(pipe)
    pipe.transformer.set_attn_processor(processor(pipe, "pisa", **SPARSE))
    assert isinstance(pipe.transformer.blocks[0].attn2.processor, WanProcessor)
    assert torch.equal(go(pipe), wanted)
    assert session_of(pipe).log.density == density
    stock = copy.deepcopy(pipe)
    dit_accel.restore(pipe)
    assert type(pipe.transformer.blocks[0].attn2.processor) is WanAttnProcessor
    assert torch.equal(go(stock), wanted)


def test_a_processor_on_an_unprepared_transformer_says_what_is_missing(pipe, go):
    pipe.transformer.set_attn_processor(WanProcessor(presets.pisa()))
    with pytest.raises(InputError, match=r"expected a transformer prepared by"):
        go(pipe)


def test_a_block_called_by_itself_says_what_is_missing(pipe):
    dit_accel.accelerate(pipe, "pisa")
    attn = pipe.transformer.blocks[0].attn1
    with pytest.raises(InputError, match="called by its transformer's forward"):
        attn(torch.zeros(1, 36, 48), None, None, None)


def test_fused_projections(pipe, go):
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    wanted = go(pipe)
    pipe.transformer.fuse_qkv_projections()
    # one product in place of three rounds differently; a plan may tip, which would show as 1e-1
    torch.testing.assert_close(go(pipe), wanted, rtol=1e-3, atol=1e-3)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(go(pipe), wanted)


def test_bare_transformer(pipe):
    """Without a pipeline: steps are told apart by the timestep, branches by their order."""
    method = spying()
    model = dit_accel.accelerate(pipe.transformer, method)
    x, text = torch.randn(1, 16, 3, 8, 6), torch.randn(1, 512, 128)
    with torch.no_grad():
        for timestep in (900.0, 500.0, 100.0):
            for _ in "cond", "uncond":
                model(x, torch.tensor([timestep]), text)
        model(x, torch.tensor([900.0]), text)
    first_layer = [(step, branch) for step, _, layer, branch, _ in method.route.seen if layer == 0]
    assert first_layer == [
        *((step, f"transformer/{branch}") for step in range(3) for branch in range(2)),
        (0, "transformer/0"),
    ]


def two_transformers(pipe, **changes):
    torch.manual_seed(1)
    other = copy.deepcopy(pipe.transformer)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made = WanPipeline(**{**pipe.components, "transformer_2": other}, **changes)
    made.set_progress_bar_config(disable=True)
    return made


def test_two_transformers_share_one_schedule(pipe, go):
    """Wan2.2-A14B: steps go on where the second transformer takes over, dense steps do not."""
    both = two_transformers(pipe, boundary_ratio=0.9)
    stock = go(both, num_inference_steps=6)
    method = spying(dense_steps=1)
    dit_accel.accelerate(both, method)
    go(both, num_inference_steps=6)
    by_model = {}
    for step, total, _, branch, first in method.route.seen:
        assert total == 6
        by_model.setdefault(branch.split("/")[0], []).append((step, first))
    assert set(by_model) == {"transformer", "transformer_2"}
    switch = min(step for step, _ in by_model["transformer_2"])
    assert switch > 1
    assert {step for step, _ in by_model["transformer"]} == set(range(1, switch))
    assert {step for step, _ in by_model["transformer_2"]} == set(range(switch, 6))
    # each has its own memory
    assert all(first == (step == switch) for step, first in by_model["transformer_2"])
    assert session_of(both).log.by_step[0] == 1.0
    dit_accel.restore(both)
    assert torch.equal(go(both, num_inference_steps=6), stock)


def test_a_transformer_that_took_over_has_the_budget_to_itself(pipe, go):
    both = two_transformers(pipe, boundary_ratio=0.9)
    options = {"density": 0.5, "block_size": 4}
    dit_accel.accelerate(both, "flashblock", **options)
    state, most = session_of(both).state, []
    both.transformer_2.register_forward_hook(lambda *a: most.append(len(state)))
    go(both, num_inference_steps=6)
    layers = len(both.transformer_2.blocks)
    assert max(most) == 2 * layers, "two guidance branches, and nothing of the first transformer"


def test_the_scheduler_may_be_replaced(pipe, go):
    method = spying()
    dit_accel.accelerate(pipe, method)
    go(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    method.route.seen.clear()
    go(pipe, num_inference_steps=2)
    assert {(step, total) for step, total, *_ in method.route.seen} == {(0, 2), (1, 2)}


def test_without_guidance_there_is_one_branch(pipe, go):
    method = spying()
    dit_accel.accelerate(pipe, method)
    go(pipe, guidance_scale=1.0)
    assert {branch for *_, branch, _ in method.route.seen} == {"transformer/cond"}


def test_a_batch_of_two_is_two_batches_of_one(pipe, go):
    prompts = ["a red circle moves right", "two blue stars spin"]
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    both = go(pipe, prompts)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(both[i], go(pipe, prompt, seed=i)[0], rtol=1e-3, atol=1e-3)


def test_shapes_that_no_block_divides(pipe, go):
    for arguments in ({"height": 80, "width": 48}, {"num_frames": 1}, {"num_frames": 9}):
        wanted = go(pipe, **arguments)
        dit_accel.accelerate(pipe, "pisa", density=1.0, block_size=7)
        torch.testing.assert_close(go(pipe, **arguments), wanted, rtol=1e-3, atol=1e-3)
        dit_accel.accelerate(pipe, "pisa", density=0.2, block_size=7)
        assert go(pipe, **arguments).isfinite().all()
        dit_accel.restore(pipe)


def test_an_accelerated_pipeline_saves_as_stock(pipe, go, tmp_path):
    go(pipe)  # a tokenizer keeps the padding of its latest call
    pipe.save_pretrained(tmp_path / "stock")
    dit_accel.accelerate(pipe, "pisa", **SPARSE)
    go(pipe)
    pipe.save_pretrained(tmp_path / "ours")
    files = sorted(path for path in (tmp_path / "stock").rglob("*") if path.is_file())
    assert len(files) > 8
    for path in files:
        twin = tmp_path / "ours" / path.relative_to(tmp_path / "stock")
        assert twin.read_bytes() == path.read_bytes(), path.name
    assert len(list((tmp_path / "ours").rglob("*"))) == len(list((tmp_path / "stock").rglob("*")))


def test_other_hooks_come_and_go(pipe, go):
    """First-block cache on top: a skipped block must not shift the steps of ours."""
    method = spying()
    dit_accel.accelerate(pipe, method)
    plain = go(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    method.route.seen.clear()
    go(pipe)
    steps = {}
    for step, _, layer, *_ in method.route.seen:
        steps.setdefault(layer, []).append(step)
    assert steps[0] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(steps[2]) == {0}, "later steps are cached"
    pipe.transformer.disable_cache()
    assert torch.equal(go(pipe), plain)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    dit_accel.restore(pipe)
    pipe.transformer.disable_cache()
    assert "forward" not in vars(pipe.transformer)


@pytest.mark.parametrize("when", ["before", "after"])
def test_offload_wraps_and_unwraps_forward(pipe, go, when):
    """accelerate's hooks replace ``forward`` around every call, in either order with ours."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    method = spying()
    if when == "before":
        add_hook_to_module(pipe.transformer, ModelHook())
    dit_accel.accelerate(pipe, method)
    if when == "after":
        add_hook_to_module(pipe.transformer, ModelHook())
    wanted = go(pipe)
    remove_hook_from_module(pipe.transformer)
    add_hook_to_module(pipe.transformer, ModelHook())
    assert torch.equal(go(pipe), wanted)
    dit_accel.restore(pipe)
    go(pipe)
    assert hasattr(pipe.transformer, "_hf_hook")


def test_the_attention_backend_outlives_a_change_of_processors(pipe):
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    with attention_backend("native"):
        dit_accel.accelerate(pipe, "dense")
        pipe.transformer.set_attention_backend("_native_math")
        dit_accel.accelerate(pipe, "pisa", density=0.5)
        chosen = pipe.transformer.blocks[0].attn1.processor._attention_backend
        dit_accel.restore(pipe)
        assert chosen == AttentionBackendName._NATIVE_MATH
        assert pipe.transformer.blocks[0].attn1.processor._attention_backend == chosen
        pipe.transformer.set_attention_backend("native")


def test_a_sharded_sequence_is_refused(pipe, go):
    dit_accel.accelerate(pipe, "pisa")
    pipe.transformer.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(InputError, match="context parallelism"):
        go(pipe)


def test_a_mask_is_refused(pipe):
    dit_accel.accelerate(pipe, "pisa")
    attn = pipe.transformer.blocks[0].attn1
    with pytest.raises(InputError, match="expected no mask"):
        attn(torch.zeros(1, 36, 48), None, torch.ones(1, 1, 1, 36), None)


def test_latents_of_another_rank_are_refused(pipe):
    dit_accel.accelerate(pipe, "pisa")
    with pytest.raises(InputError, match=r"expected latents \[B, C, T, H, W\]"):
        pipe.transformer(torch.zeros(1, 16, 8, 6), torch.zeros(1), torch.zeros(1, 512, 128))


def test_unsupported_targets_are_named(pipe):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, sample_size=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    other = DDIMPipeline(unet, DDIMScheduler())
    for target in (other, unet, 3):
        for call in (dit_accel.accelerate, dit_accel.restore, session_of, processor):
            with pytest.raises(InputError, match=r"expected one with a .*3DModel, got"):
                call(target)


def test_bad_methods_change_nothing(pipe):
    before = dict(pipe.transformer.attn_processors)
    for given, options, message in (
        ("pizza", {}, r"expected one of custom, dense, .*, got 'pizza' \(did you mean 'pisa'\?\)"),
        ("pisa", {"density": 1.5}, "density: expected float > 0, <= 1, got 1.5"),
        ("pisa", {"densty": 0.1}, "did you mean 'density'"),
        (3, {}, "expected a preset's name or a Method, got int"),
        (presets.pisa(), {"density": 0.1}, "only dense_steps, dense_layers or dense_below beside"),
    ):
        with pytest.raises(InputError, match=message):
            dit_accel.accelerate(pipe, given, **options)
    assert pipe.transformer.attn_processors == before
    assert not hasattr(pipe.transformer, ATTRIBUTE)


def test_set_attn_processor_takes_names_methods_and_processors(pipe, go):
    wanted = go(pipe)
    set_attn_processor(pipe, "pisa", **SPARSE)
    sparse = go(pipe)
    assert not torch.equal(sparse, wanted)
    set_attn_processor(pipe, presets.dense())
    assert torch.equal(go(pipe), wanted)
    set_attn_processor(pipe, WanProcessor(presets.pisa(**SPARSE)))
    assert torch.equal(go(pipe), sparse)
    stock = {name: WanAttnProcessor() for name in pipe.transformer.attn_processors}
    set_attn_processor(pipe, stock)
    assert len(stock) == 6, "the caller's dictionary is not emptied"
    assert torch.equal(go(pipe), wanted)
    with pytest.raises(InputError, match="no options beside a processor, got density"):
        set_attn_processor(pipe, WanAttnProcessor(), density=0.2)
    with pytest.raises(InputError, match="expected a preset's name, a Method or a processor"):
        set_attn_processor(pipe, 3)


def test_a_bad_file_of_kernel_settings_is_told_before_work_starts(pipe, tmp_path, monkeypatch):
    from dit_accel.kernels.tuning import files, lookup

    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    monkeypatch.setattr(lookup, "architecture_of", lambda device: 90)
    (tmp_path / "sm_90.json").write_text("[]")
    lookup.forget()
    with pytest.raises(InputError, match=r"sm_90\.json: .*tune-kernels"):
        dit_accel.accelerate(pipe, "pisa")
    lookup.forget()
