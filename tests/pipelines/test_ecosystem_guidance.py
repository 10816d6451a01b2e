"""Guidance in one batch and in two calls, batches, and calls that end before their time."""

import pytest
import torch
from diffusers import WanVideoToVideoPipeline

import dit_accel
from dit_accel.pipelines import session_of

# methods with a memory: clusters to start from, what was left out
METHODS = {
    "svg_ear": {"q_clusters": 6, "k_clusters": 9, "density": 0.3},
    "flashblock": {"inner": "pisa", "density": 0.25, "block_size": 4, "refresh": 2},
}
TIMESTEPS = (900.0, 700.0, 500.0, 300.0)


def step(family, index, branch, timestep, drift=0.1):
    """A forward's arguments at a step: a branch has its own text, and both move on a little."""
    call = family.given(dtype=torch.float64)
    draw = torch.Generator().manual_seed(100 + branch)
    text = call["encoder_hidden_states"]
    call["encoder_hidden_states"] = torch.randn(text.shape, generator=draw, dtype=text.dtype)
    call["hidden_states"] = call["hidden_states"] * (1 + drift * index) + branch
    return {**call, "timestep": torch.full_like(call["timestep"], timestep)}


@torch.no_grad()
def denoise(model, family, branches, together=False):
    """Outputs by step and branch, of calls in turn, or of one batch a step."""
    outputs = []
    for index, timestep in enumerate(TIMESTEPS):
        calls = [step(family, index, branch, timestep) for branch in branches]
        if together:
            shared = {"img_ids", "txt_ids"}
            joined = {
                name: value if name in shared else torch.cat([call[name] for call in calls])
                for name, value in calls[0].items()
            }
            outputs.append(model(**joined).sample.split(1))
        else:
            outputs.append([model(**call).sample for call in calls])
    return outputs


def fresh(family, method, **options):
    model = family.pipe().transformer.double()
    return dit_accel.accelerate(model, method, **{**METHODS[method], **options})


@pytest.mark.parametrize("method", METHODS)
def test_two_calls_share_no_memory(family, method):
    """Each branch gets what it gets without the other, to the bit."""
    both = denoise(fresh(family, method), family, (0, 1))
    for i in range(2):
        alone = denoise(fresh(family, method), family, (i,))
        for together, apart in zip(both, alone, strict=True):
            assert torch.equal(together[i], apart[0])


def test_two_calls_that_share_clusters_can_be_told(family):
    """The test above would see it: this is the option of svg_ear that shares them."""
    both = denoise(fresh(family, "svg_ear", share_branches=True), family, (0, 1))
    alone = denoise(fresh(family, "svg_ear", share_branches=True), family, (1,))
    assert not torch.equal(both[-1][1], alone[-1][0])


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_is_two_calls(family, method):
    one = denoise(fresh(family, method), family, (0, 1), together=True)
    two = denoise(fresh(family, method), family, (0, 1))
    for batched, apart in zip(one, two, strict=True):
        for a, b in zip(batched, apart, strict=True):
            # cosines, sines and norms are rounded to fp32 by both
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_guidance_that_ends_before_the_last_step(family, method):
    """A batch of two, and then of one: what two remembered is no memory of one."""
    model = fresh(family, method)
    branch = denoise(model, family, (0, 1), together=True)
    assert len(branch) == len(TIMESTEPS)
    with torch.no_grad():
        last = model(**step(family, 4, 0, 100.0)).sample
        other = model(**step(family, 4, 1, 100.0)).sample
    assert last.isfinite().all()
    assert not torch.equal(last, other)
    assert session_of(model).log.by_step.keys() == {0, 1, 2, 3, 4}


@torch.no_grad()
def test_pipelines_that_name_no_branch(zoo):
    """Video to video, image to image: calls of a step are told apart by their order."""
    wan = zoo.FAMILIES["Wan"]
    pipe = WanVideoToVideoPipeline(transformer=wan.pipe().transformer, **wan.parts())
    pipe.set_progress_bar_config(disable=True)
    method = zoo.spying(dense_steps=0.5)
    dit_accel.accelerate(pipe, method)
    texts = wan.texts(torch.Generator().manual_seed(0), 1)
    pipe(
        latents=torch.randn(1, 4, 3, 8, 6),
        num_inference_steps=10,
        strength=0.6,
        output_type="latent",
        guidance_scale=3.0,
        height=64,
        width=48,
        **texts,
    )
    # six of ten steps are left, and half of those are dense
    assert sorted(session_of(pipe).log.by_step) == [0, 1, 2, 3, 4, 5]
    assert {total for *_, total, _ in method.route.seen} == {6}
    for branch in ("0", "1"):
        assert method.route.steps(0, branch) == [3, 4, 5]
    firsts = [first for *_, first in method.route.seen]
    assert firsts == [True] * 2 * wan.layers + [False] * 4 * wan.layers


def test_several_results_of_one_prompt(family):
    pipe = family.pipe()
    dit_accel.accelerate(pipe, "pisa", density=0.25, block_size=4)
    name = "num_images_per_prompt" if family.name == "FLUX.1" else "num_videos_per_prompt"
    noise = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    # HunyuanVideo's pipeline repeats embeddings that it is given, but not their mask
    both = family.go(pipe, generator=noise, **{name: 2})
    assert len(both) == 2
    for i, seed in enumerate((5, 6)):
        one = family.go(pipe, generator=[torch.Generator().manual_seed(seed)])
        torch.testing.assert_close(both[i], one[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["interrupt", "raise"])
def test_a_call_that_ends_early_leaves_nothing_to_the_next(family, method, how):
    pipe = family.pipe()
    dit_accel.accelerate(pipe, method, **METHODS[method])
    wanted = family.go(pipe, seed=5, **family.guided)
    by_step = session_of(pipe).log.by_step

    def end(pipe, index, timestep, given):
        if index == 1 and how == "raise":
            raise KeyboardInterrupt
        pipe._interrupt = index >= 1
        return given

    if how == "raise":
        with pytest.raises(KeyboardInterrupt):
            family.go(pipe, seed=1, callback_on_step_end=end, **family.guided)
    else:
        family.go(pipe, seed=1, callback_on_step_end=end, **family.guided)
        assert len(session_of(pipe).state) == 0
    assert sorted(session_of(pipe).log.by_step) == [0, 1]
    assert torch.equal(family.go(pipe, seed=5, **family.guided), wanted)
    assert session_of(pipe).log.by_step == by_step


@pytest.mark.parametrize("where", ["first", "last"])
def test_an_error_inside_of_a_forward(family, where):
    """A GPU that is out of memory, say: at the first layer of a step, or at the last."""
    pipe = family.pipe()
    dit_accel.accelerate(pipe, "svg_ear", **METHODS["svg_ear"])
    wanted = family.go(pipe)
    attn = [module for module in pipe.transformer.modules() if hasattr(module, "_dit_accel")]
    layers = [module for module in attn if hasattr(module, "processor")]
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    handle = layers[0 if where == "first" else -1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        family.go(pipe, seed=3)
    handle.remove()
    assert torch.equal(family.go(pipe), wanted)
    dit_accel.restore(pipe)
    assert torch.equal(family.go(pipe), family.go(family.pipe()))
