"""The picture of plans: what is captured, what the maps say, and what is drawn."""

import pytest
import torch
import torch.nn.functional as F

import dit_accel
from dit_accel import Context, Geometry, InputError, Method, presets
from dit_accel.eval import calls, plan_figure
from dit_accel.layout import Raster
from dit_accel.pipelines.generate import Request
from dit_accel.rest import Centroid, Drop
from dit_accel.route import PooledScore
from dit_accel.types import DROP, EXACT, REST, Plan

REQUEST = Request(
    "a red circle moves right over a blue background", height=64, width=64, frames=5, steps=3
)
GRID = (3, 8, 8)


@pytest.fixture(scope="module")
def pipe():
    found = dit_accel.pipelines.load("tiny-wan")
    found.set_progress_bar_config(disable=True)
    return found


@torch.inference_mode()
def test_capture_takes_what_the_layer_was_given(pipe, monkeypatch):
    """The same tensors that stock attention computes with, and the pipeline as it was."""
    given = []
    before = {name: type(one) for name, one in pipe.transformer.attn_processors.items()}
    found = calls.take(pipe, REQUEST, -1, 2, (0, 1))
    assert sorted(found) == [0, 1]
    assert {name: type(one) for name, one in pipe.transformer.attn_processors.items()} == before
    call = found[1]
    assert (call.ctx.layer, call.ctx.step, call.ctx.num_steps) == (5, 1, 3)
    assert call.ctx.state is None
    assert call.q.shape[2] == call.ctx.geometry.length == 192
    target = pipe.transformer.blocks[5].attn1
    monkeypatch.setattr(
        "diffusers.models.transformers.transformer_wan.dispatch_attention_fn",
        lambda q, k, v, **rest: (
            given.append((q, k, v))
            or F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(
                1, 2
            )
        ),
    )
    inside = []
    handle = target.register_forward_pre_hook(lambda *_: inside.append(len(given)))
    pipe(
        REQUEST.prompt,
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    handle.remove()
    # two branches a step: the prompt's own comes first
    for mine, stock in zip((call.q, call.k, call.v), given[inside[2]], strict=True):
        torch.testing.assert_close(mine, stock.transpose(1, 2)[:, 2:3], rtol=0, atol=1e-4)


def test_capture_tells_bad_places(pipe):
    with pytest.raises(InputError, match="layer: expected one of 6, from 0, got 6"):
        calls.take(pipe, REQUEST, 6, 0, (0,))
    with pytest.raises(InputError, match="step: expected one of 3, from 0, got 3"):
        calls.take(pipe, REQUEST, 0, 0, (1, 3))
    with pytest.raises(InputError, match="head: expected one of 4, from 0, got 4"):
        calls.take(pipe, REQUEST, 0, 4, (1,))


def captured(steps=(0, 1), text=None, length=192):
    found = {}
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        q, k, v = torch.randn(3, 1, 1, length, 8, generator=generator)
        found[step] = calls.solved(q, k, v, Context(Geometry(GRID, text), step, 2, 1, 4))
    return found


class ByHand:
    """A plan that is given."""

    needs = ()

    def __init__(self, code):
        self.code = torch.tensor(code, dtype=torch.int8).view(1, 1, len(code), len(code))

    def __call__(self, blocked, rest, ctx):
        return Plan(self.code)


@pytest.mark.parametrize("rest", [Drop(), Centroid()])
def test_kinds_of_a_plan_by_hand(rest):
    code = [
        [EXACT, REST, DROP, EXACT],
        [2, EXACT, REST, REST],
        [4, 8, EXACT, DROP],
        [DROP, REST, 2, EXACT],
    ]
    (panel,) = plan_figure.panels({"mine": Method(Raster(48), ByHand(code), rest)}, captured())
    names = list(plan_figure.KINDS)
    left = "left out" if isinstance(rest, Drop) else "stand-in of the rest"
    wanted = {
        EXACT: "exact",
        2: "mean of 2 keys",
        4: "mean of 4 keys",
        8: "mean of 8 keys",
        DROP: "left out",
        REST: left,
    }
    side = plan_figure.PIXELS // 4
    for i in range(4):
        for j in range(4):
            tile = panel.kinds[i * side : (i + 1) * side, j * side : (j + 1) * side]
            assert {names[kind] for kind in tile.unique()} == {wanted[code[i][j]]}
    assert panel.density == 5 / 16
    assert panel.pooled == pytest.approx((2 / 2 + 1 / 4 + 1 / 8) / 16)
    assert panel.layout == "raster, 4 by 4 blocks"
    q, k, v = captured()[1].q, captured()[1].k, captured()[1].v
    dense = F.scaled_dot_product_attention(q, k, v)
    method = Method(Raster(48), ByHand(code), rest)
    out = dit_accel.attention(q, k, v, method, grid=GRID)
    assert panel.error == pytest.approx(float((out - dense).norm() / dense.norm()), rel=1e-5)


def test_every_preset_can_be_shown():
    methods = {
        "pisa": presets.pisa(block_size=16),
        "psa": presets.psa(block_q=16, block_k=16),
        "svg_ear": presets.svg_ear(q_clusters=4, k_clusters=8),
        "vmoba": presets.vmoba(),
        "flashblock": presets.flashblock(block_size=16, refresh=3),
    }
    assert set(methods) == {row.name for row in presets.catalogue() if row.paper is not None}
    found = {one.name: one for one in plan_figure.panels(methods, captured())}
    names = list(plan_figure.KINDS)
    shown = {name: {names[kind] for kind in one.kinds.unique()} for name, one in found.items()}
    assert shown["pisa"] == shown["svg_ear"] == {"exact", "stand-in of the rest"}
    assert shown["flashblock"] == {"exact", "kept from an earlier step"}
    assert shown["vmoba"] == {"exact", "left out"}
    assert {"exact", "mean of 2 keys", "left out"} <= shown["psa"]
    assert found["flashblock"].density == found["pisa"].density, "the plan of the step before"
    for one in found.values():
        share = float((one.kinds == 0).float().mean())
        assert share == pytest.approx(one.density, abs=0.02), "the map shows the density"
    sheet = plan_figure.draw(
        plan_figure.attention_map(captured()[1]), list(found.values()), "a caption"
    )
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    used = set().union(*shown.values())
    assert {plan_figure.KINDS[name] for name in used} <= colours
    assert sheet.size[0] == 2 * 24 + 3 * plan_figure.PIXELS + 2 * 24


def test_the_attention_map_is_attention():
    found = captured(length=192)
    shown = plan_figure.attention_map(found[1], Raster(1))
    q, k = found[1].q[0, 0], found[1].k[0, 0]
    share = (q @ k.mT * 8**-0.5).softmax(-1) * 192
    wanted = share.repeat_interleave(3, 0).repeat_interleave(3, 1)  # three pixels a token
    torch.testing.assert_close(shown, wanted, rtol=0, atol=1e-5)


def test_bad_requests_are_told():
    for method in (presets.dense(), presets.pisa(dense_steps=2)):
        with pytest.raises(InputError, match="plan: expected a method that is sparse at step 1"):
            plan_figure.panels({"it": method}, captured())
    some = PooledScore(density=0.5)
    (panel,) = plan_figure.panels({"it": Method(Raster(64), some, Drop())}, captured((1,)))
    assert panel.density == 1 / 3
