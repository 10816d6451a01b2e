"""FlashBlock on a bidirectional model: exact complements, kept between refreshes."""

import pytest
import torch

import dit_accel
from dit_accel import InputError, State, merge, presets
from dit_accel.attend import direct
from dit_accel.flashblock import Frozen, complement, partial_bytes
from dit_accel.types import Context, Geometry

GRID = (3, 5, 7)
INNERS = {
    "pisa": {"inner": "pisa", "density": 0.3, "block_size": 16},
    "svg_ear": {"inner": "svg_ear", "density": 0.3, "q_clusters": 4, "k_clusters": 9},
    "vmoba": {"inner": "vmoba", "threshold": 0.3},
}
EVERY = pytest.mark.parametrize("name", INNERS)


def inputs(seed=0, batch=2, heads=2, length=105, depth=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, depth, generator=generator, dtype=torch.float64)


def dense(q, k, v, valid=None):
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(-1) @ v


@EVERY
@pytest.mark.parametrize("text", [None, slice(105, 112)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_refresh_is_dense_and_other_steps_follow_the_equations(name, text, padded):
    """Between refreshes: the plan's pairs of now, and the complement of then, under one softmax."""
    length = 112 if text else 105
    valid = None
    if padded:
        valid = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.8
    where = {"grid": GRID, "text": text, "key_valid": valid}
    state, method = State(), presets.flashblock(refresh=3, **INNERS[name])
    inner = presets.build(name, **{k: v for k, v in INNERS[name].items() if k != "inner"})
    then = plan = blocked = None
    memory = State()  # of the inner layout: clusters start from those of the refresh before
    for step in (2, 3, 4, 5, 6):
        q, k, v = inputs(step, length=length)
        out, report = dit_accel.attention(
            q, k, v, method, step=step, state=state, return_report=True, **where
        )
        if step in (2, 5):
            torch.testing.assert_close(out, dense(q, k, v, valid), rtol=0, atol=1e-12)
            assert report.density == 1.0
            ctx = Context(Geometry(GRID, text, valid), state=memory)
            blocked = inner.layout(q, k, v, ctx, 6**-0.5)
            plan, then = inner.route(blocked, inner.rest, ctx), (q, k, v)
            continue
        assert report.density < 0.7
        old = dense_by(plan, blocked, then, valid, inside=False)
        new = dense_by(plan, blocked, (q, k, v), valid, inside=True)
        wanted = merge(old, new).out
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)


def dense_by(plan, blocked, qkv, valid, inside):
    """A partial over the pairs inside or outside a plan, with a mask of tokens by tokens."""
    q, k, v = qkv
    batch, heads, length, _ = q.shape
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    keys = torch.empty(batch, heads, length, dtype=torch.int64)
    rows = torch.empty(batch, heads, length, dtype=torch.int64)
    for target, blocks in ((keys, blocked.keys), (rows, blocked.queries)):
        for b in range(batch):
            for h in range(heads):
                perm = blocks.perm.expand(batch, heads, -1)[b, h]
                offsets = blocks.offsets.expand(batch, heads, -1)[b, h]
                number = torch.arange(blocks.num_blocks).repeat_interleave(offsets.diff().long())
                target[b, h, perm] = number
    for b in range(batch):
        for h in range(heads):
            if hasattr(plan, "select"):
                chosen = plan.select.expand(batch, heads, -1, -1)[b, h][:, keys[b, h]]
            else:
                code = plan.code.expand(batch, heads, -1, -1)[b, h]
                chosen = code[rows[b, h]][:, keys[b, h]] == 1
            mask[b, h] = chosen == inside
    if valid is not None:
        mask &= valid[:, None, None]
    logits = (q @ k.mT * 6**-0.5).masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    out = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp() @ v
    return dit_accel.Partial(out, lse)


@EVERY
def test_plan_and_complement_are_everything(name):
    q, k, v = inputs(1)
    ctx = Context(Geometry(GRID))
    inner = presets.build(name, **{k: v for k, v in INNERS[name].items() if k != "inner"})
    blocked = inner.layout(q, k, v, ctx)
    plan = inner.route(blocked, inner.rest, ctx)
    whole = merge(direct(blocked, plan, ctx), direct(blocked, complement(plan), ctx))
    torch.testing.assert_close(whole.out, dense(q, k, v), rtol=0, atol=1e-12)


def test_layers_that_keep_nothing_run_the_inner_method():
    q, k, v = inputs(2)
    inner = {"density": 0.3, "block_size": 16}
    method = presets.flashblock(layers=(1, -1), **inner)
    plain = dit_accel.attention(q, k, v, presets.pisa(**inner), grid=GRID)
    state = State()
    for layer in range(4):
        where = {"grid": GRID, "layer": layer, "num_layers": 4, "state": state}
        out, report = dit_accel.attention(q, k, v, method, return_report=True, **where)
        assert (report.density == 1.0) == (layer in (1, 3))
        assert torch.equal(out, plain) == (layer in (0, 2))
    with pytest.raises(InputError, match="counts from the last layer"):
        dit_accel.attention(q, k, v, method, grid=GRID, state=state)


def test_branches_keep_their_own():
    method = presets.flashblock(refresh=9, density=0.3, block_size=16)
    both, alone = State(), State()
    for step in range(3):
        one, two = inputs(step), inputs(step + 50)
        a = dit_accel.attention(*one, method, grid=GRID, step=step, state=both, branch="cond")
        dit_accel.attention(*two, method, grid=GRID, step=step, state=both, branch="uncond")
        b = dit_accel.attention(*one, method, grid=GRID, step=step, state=alone, branch="cond")
        assert torch.equal(a, b)


def test_a_skipped_step_does_not_shift_the_refreshes():
    method = presets.flashblock(refresh=4, density=0.3, block_size=16)
    state, dense_at = State(), []
    for step in (0, 1, 3, 5, 6, 8, 9):
        _, report = dit_accel.attention(
            *inputs(step), method, grid=GRID, step=step, state=state, return_report=True
        )
        dense_at += [step] if report.density == 1.0 else []
    assert dense_at == [0, 5, 9]


def test_another_shape_is_a_refresh():
    method = presets.flashblock(density=0.3, block_size=16)
    state = State()
    dit_accel.attention(*inputs(0), method, grid=GRID, state=state)
    _, report = dit_accel.attention(
        *inputs(1, batch=1), method, grid=GRID, step=1, state=state, return_report=True
    )
    assert report.density == 1.0


def test_the_budget_is_checked_before_anything_is_kept(monkeypatch):
    q, k, v = inputs(3)
    one = partial_bytes(q)
    assert one == 2 * 2 * 105 * (6 * 8 + 8)
    half = q.to(torch.float16)
    assert partial_bytes(half) == 2 * 2 * 105 * (6 + 2) * 2, "L H (D + 2) halves"
    # a plan of pisa for each of 2 x 2 heads: 7 x 7 blocks, one byte a pair
    one += 2 * 2 * 7 * 7
    where = {"grid": GRID, "num_layers": 3}
    state = State()
    enough = presets.flashblock(budget_gib=3 * one / 2**30, density=0.3, block_size=16)
    for layer in range(3):
        dit_accel.attention(q, k, v, enough, layer=layer, state=state, branch="cond", **where)
    # the second guidance branch does not fit
    with pytest.raises(InputError, match=r"3 layers x 2 guidance branches x"):
        dit_accel.attention(q, k, v, enough, state=state, branch="uncond", **where)
    little = presets.flashblock(budget_gib=2.9 * one / 2**30, density=0.3, block_size=16)
    monkeypatch.setattr("dit_accel.flashblock.direct", lambda *a: pytest.fail("computed"))
    with pytest.raises(InputError, match=r"flashblock: expected kept partials within a budget"):
        dit_accel.attention(q, k, v, little, state=State(), **where)


@EVERY
def test_plans_count_as_well(name):
    """Those of every token, and the orders of clusters, are not small."""
    q, k, v = inputs(3)
    ctx = Context(Geometry(GRID))
    inner = presets.build(name, **{k: v for k, v in INNERS[name].items() if k != "inner"})
    blocked = inner.layout(q, k, v, ctx)
    plan = inner.route(blocked, inner.rest, ctx)
    per_head = 2 * 2 * 105 * 8 * 2 + 2 * 2 * 4 * (5 + 10) if name == "svg_ear" else 0
    of_plan = plan.chosen.word if name == "vmoba" else plan.code
    expected = per_head + of_plan.numel() * of_plan.element_size()
    assert Frozen(blocked.queries, blocked.keys, plan).bytes == expected
    need = (partial_bytes(q) + expected) / 2**30
    for share, fits in ((1.0001, True), (0.999, False)):
        method = presets.flashblock(budget_gib=share * need, **INNERS[name])
        if fits:
            dit_accel.attention(q, k, v, method, grid=GRID, state=State(), num_layers=1)
            continue
        with pytest.raises(InputError, match="within a budget"):
            dit_accel.attention(q, k, v, method, grid=GRID, state=State(), num_layers=1)


def test_only_layers_that_keep_something_count():
    q, k, v = inputs(3)
    where = {"grid": GRID, "num_layers": 4, "state": State()}
    layers = presets.flashblock(budget_gib=1e-9, layers=(0, 3, -1, -4), block_size=16)
    with pytest.raises(InputError, match="2 layers x 1"):
        dit_accel.attention(q, k, v, layers, layer=3, **where)


def test_without_a_state_nothing_can_be_kept():
    with pytest.raises(InputError, match="expected a state, in which the outside is kept"):
        dit_accel.attention(*inputs(0), "flashblock", grid=GRID)


def test_options_of_the_inner_method():
    method = presets.flashblock(inner="vmoba", threshold=0.1)
    assert method.options["threshold"] == 0.1
    assert method.options["refresh"] == 5
    assert method.name == "flashblock"
    given = presets.pisa(density=0.4)
    assert presets.flashblock(inner=given).route.inner is given.route
    assert presets.parse_option("flashblock", "threshold", "0.5", {"inner": "vmoba"}) == 0.5
    assert presets.parse_option("flashblock", "layers", "0,-1") == (0, -1)
    assert presets.parse_option("flashblock", "layers", "3") == (3,)
    assert presets.parse_option("flashblock", "layers", "none") is None
    for options, message in (
        ({"inner": "pizza"}, "inner: expected pisa .* or a Method, got 'pizza'"),
        ({"threshold": 0.1}, "expected an option among density, .*, got 'threshold'"),
        ({"inner": given, "density": 0.1}, "got 'density'"),
        ({"refresh": 0}, "refresh: expected int >= 1"),
        ({"density": 2.0}, "density: expected float > 0, <= 1"),
    ):
        with pytest.raises(InputError, match=message):
            presets.flashblock(**options)
