"""Block diffusion without a pipeline: a chunk, and the cached context beside it."""

import pytest
import torch

import dit_accel
from dit_accel import Context, Geometry, InputError, Prefix, Schedule, State, merge, presets
from dit_accel.attend import attend, of_prefix
from dit_accel.flashblock import partial_bytes

GRID, LENGTH, PAST = (3, 5, 7), 105, 40
METHODS = {
    "pisa": {"density": 0.3, "block_size": 16},
    "svg_ear": {"density": 0.3, "q_clusters": 4, "k_clusters": 9},
    "vmoba": {"threshold": 0.3},
    "psa": {"block_q": 16, "block_k": 16},
}
FULL = {
    "dense": {},
    "pisa": {"density": 1.0, "block_size": 16},
    "svg_ear": {"density": 1.0, "q_clusters": 4, "k_clusters": 9},
    "vmoba": {"threshold": 1.0},
    "psa": {"ratios": (1.0, 1.0, 1.0, 1.0)},
}
KEPT = presets.flashblock(inner="dense", refresh=99)


def inputs(seed=0, length=LENGTH, batch=2, heads=2, depth=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, depth, generator=generator, dtype=torch.float64)


class Past:
    """A prefix that counts how often it is read."""

    def __init__(self, seed=1, length=PAST, chunk=1, zeros=0):
        _, self.keys, self.values = inputs(seed, length)
        self.reads = 0
        self.prefix = Prefix(length, self.load, chunk, zeros)

    def load(self):
        self.reads += 1
        return self.keys, self.values


def whole(q, k, v, past, valid=None):
    """Dense attention over a chunk, its context, and keys that are zero."""
    nothing = torch.zeros(2, 2, past.prefix.zeros, 6, dtype=q.dtype)
    keys = torch.cat([k, past.keys, nothing], 2)
    logits = q @ keys.mT * 6**-0.5
    if valid is not None:
        logits[..., :LENGTH] = logits[..., :LENGTH].masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(-1) @ torch.cat([v, past.values, nothing], 2)


def run(method, qkv, past, **where):
    where.setdefault("grid", GRID)
    return dit_accel.attention(*qkv, method, prefix=past.prefix, return_report=True, **where)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("zeros", [0, 23])
def test_every_method_sees_all_of_the_context(name, keeps, padded, zeros):
    qkv, past = inputs(), Past(zeros=zeros)
    valid = None
    if padded:
        valid = torch.ones(2, LENGTH, dtype=torch.bool)
        valid[1, 80:] = False
    method = presets.build(name, **FULL[name])
    if keeps:
        method = presets.flashblock(inner=method)
    out, report = run(method, qkv, past, key_valid=valid, state=State())
    torch.testing.assert_close(out, whole(*qkv, past, valid), rtol=0, atol=1e-12)
    assert report.density == 1.0
    assert report.all_pairs[0].unique().item() == LENGTH * (LENGTH + PAST)
    assert past.reads == 1


@pytest.mark.parametrize("name", METHODS)
def test_the_context_is_merged_with_what_the_method_makes_of_the_chunk(name):
    qkv, past = inputs(), Past()
    method = presets.build(name, **METHODS[name])
    alone, with_past = Context(Geometry(GRID)), Context(Geometry(GRID), prefix=past.prefix)
    blocked = method.layout(*qkv, alone)
    inside = attend(blocked, method.route(blocked, method.rest, alone), method.rest, alone)
    out, report = run(method, qkv, past)
    wanted = merge(inside, of_prefix(qkv[0], with_past)).out
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    _, of_chunk = dit_accel.attention(*qkv, method, grid=GRID, return_report=True)
    assert torch.equal(report.exact_pairs, of_chunk.exact_pairs + LENGTH * PAST)


@pytest.mark.parametrize("refresh", [1, 2, 99])
def test_a_kept_context_is_exact_while_queries_stand_still(refresh):
    q, k, v = inputs()
    past, state = Past(zeros=3), State()
    method = presets.flashblock(inner="dense", refresh=refresh)
    for step in range(5):
        _, k, v = inputs(step)  # what is inside may change
        out, report = run(method, (q, k, v), past, step=step, state=state)
        torch.testing.assert_close(out, whole(q, k, v, past), rtol=0, atol=1e-12)
        fresh = step % refresh == 0
        assert report.density == (1.0 if fresh else LENGTH / (LENGTH + PAST))
    assert past.reads == -(-5 // refresh)
    kept = state.slot(0, "")["flashblock"].partial
    assert kept.out.nbytes + kept.lse.nbytes == partial_bytes(q)


def test_between_refreshes_the_context_is_that_of_then():
    past, state = Past(), State()
    first = inputs(0)
    run(KEPT, first, past, state=state)
    then = of_prefix(first[0], Context(Geometry(GRID), prefix=past.prefix))
    q, k, v = inputs(5)
    out, _ = run(KEPT, (q, k, v), past, step=1, state=state)
    logits = q @ k.mT * 6**-0.5
    inside = dit_accel.Partial(logits.softmax(-1) @ v, logits.logsumexp(-1))
    torch.testing.assert_close(out, merge(inside, then).out, rtol=0, atol=1e-12)
    assert (out - whole(q, k, v, past)).abs().max() > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_inside_a_chunk_the_inner_method_is_made_afresh(name):
    """Only the context is kept: with queries that stand still, as if nothing were."""
    method = presets.build(name, **METHODS[name])
    q, k, v = inputs()
    kept, plain = State(), State()
    for step in range(3):
        _, k, v = inputs(step)
        past = Past()
        out, _ = run(presets.flashblock(inner=method), (q, k, v), past, step=step, state=kept)
        wanted, _ = run(method, (q, k, v), past, step=step, state=plain)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
        assert past.reads == (2 if step == 0 else 1)


def test_another_chunk_is_a_refresh():
    qkv, state = inputs(), State()
    for past in (Past(), Past(2, chunk=2), Past(2, length=PAST + 1, chunk=2)):
        out, _ = run(KEPT, qkv, past, state=state)
        torch.testing.assert_close(out, whole(*qkv, past), rtol=0, atol=1e-12)
        run(KEPT, inputs(7), past, step=1, state=state)
        assert past.reads == 1


def test_branches_and_layers_keep_their_own():
    together, alone = State(), State()
    for step in range(2):
        one, two = inputs(step), inputs(step + 50)
        past, other = Past(1), Past(2)
        a, _ = run(KEPT, one, past, step=step, state=together, branch="cond")
        run(KEPT, two, other, step=step, state=together, branch="uncond")
        run(KEPT, two, other, step=step, state=together, branch="cond", layer=1)
        b, _ = run(KEPT, one, past, step=step, state=alone, branch="cond")
        assert torch.equal(a, b)


def test_layers_that_keep_nothing_compute_the_context_again():
    method = presets.flashblock(inner="dense", layers=(-1,))
    for layer, reads in ((0, 3), (1, 1)):
        past, state = Past(), State()
        for step in range(3):
            run(method, inputs(step), past, step=step, state=state, layer=layer, num_layers=2)
        assert past.reads == reads


def test_a_first_chunk_has_nothing_to_keep():
    past, state = Past(length=0, zeros=23), State()
    out, report = run(KEPT, inputs(), past, state=state)
    torch.testing.assert_close(out, whole(*inputs(), past), rtol=0, atol=1e-12)
    assert report.density == 1.0
    assert past.reads == len(state) == 0


def test_the_budget_is_checked_before_the_context_is_read():
    qkv, past = inputs(), Past()
    for share, layers in ((2.1, 2), (1.1, 1)):
        budget = share * partial_bytes(qkv[0]) / 2**30
        chosen = None if layers == 2 else (1, -1)
        method = presets.flashblock(inner="dense", budget_gib=budget, layers=chosen)
        run(method, qkv, past, state=State(), layer=1, num_layers=2)
        little = presets.flashblock(inner="dense", budget_gib=budget * 0.8, layers=chosen)
        past.reads = 0
        with pytest.raises(InputError, match=rf"GiB: {layers} layers x 1 guidance branches x"):
            run(little, qkv, past, state=State(), layer=1, num_layers=2)
        assert past.reads == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_kept_context_beats_leaving_it_out(seed):
    """The paper's claim, for queries that drift slowly."""
    start, end, past, state = inputs(seed), inputs(seed + 100), Past(seed + 200), State()
    kept = dropped = 0.0
    for step in range(5):
        qkv = [a + 0.03 * step * b for a, b in zip(start, end, strict=True)]
        wanted = whole(*qkv, past)
        out, _ = run(KEPT, qkv, past, step=step, state=state)
        alone = dit_accel.attention(*qkv, "dense", grid=GRID)
        kept += float((out - wanted).norm())
        dropped += float((alone - wanted).norm())
    assert kept < 0.25 * dropped


def test_what_needs_a_context_says_so():
    for inner, reason in (("dense", "leaves nothing out"), ("psa", "no exact complement")):
        method = presets.flashblock(inner=inner)
        with pytest.raises(InputError, match=f"flashblock: inner: .*{reason}"):
            dit_accel.attention(*inputs(), method, grid=GRID, state=State())
    with pytest.raises(InputError, match="keeps nothing, got flashblock itself"):
        presets.flashblock(inner=presets.flashblock())


def test_the_schedule_of_an_inner_method_stands():
    inner = presets.pisa(dense_steps=2, dense_layers=(0,))
    assert presets.flashblock(inner=inner).schedule == Schedule(2, (0,))
    assert presets.flashblock(inner=inner, dense_steps=3).schedule == Schedule(3, ())
    assert presets.flashblock(inner="pisa", dense_layers=(1,)).schedule == Schedule(0, (1,))


def test_a_prefix_that_does_not_fit():
    qkv, past = inputs(), Past()
    with pytest.raises(InputError, match="prefix: expected a Prefix or None, got tuple"):
        dit_accel.attention(*qkv, "dense", grid=GRID, prefix=(past.keys, past.values))
    for load in (
        lambda: (past.keys[:1], past.values),
        lambda: (past.keys.float(), past.values),
        lambda: (past.keys[:, :, 1:], past.values[:, :, 1:]),
    ):
        with pytest.raises(InputError, match=r"prefix: keys: expected \[2, 2, 40, 6\]"):
            dit_accel.attention(*qkv, "dense", grid=GRID, prefix=Prefix(PAST, load))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [0, PAST])
@pytest.mark.parametrize("where", ["dense", "dense step"])
def test_a_dense_backend_that_is_named_gets_the_context_too(monkeypatch, padded, length, where):
    from dit_accel.kernels.dense_attention import api

    ran, real = [], api.attend
    monkeypatch.setattr(api, "attend", lambda name, *rest: ran.append(name) or real(name, *rest))
    qkv, past, valid = inputs(), Past(length=length, zeros=23), None
    if padded:
        valid = torch.ones(2, LENGTH, dtype=torch.bool)
        valid[1, 80:] = False
    method = presets.dense(backend="flash")
    if where != "dense":
        method = presets.custom(density=0.3, dense_steps=1, dense_backend="flash")
    out, report = run(method, qkv, past, key_valid=valid)
    torch.testing.assert_close(out, whole(*qkv, past, valid), rtol=0, atol=1e-12)
    assert ran == ["flash"]
    assert report.all_pairs[0].unique().item() == LENGTH * (LENGTH + length)


def test_a_share_of_one_in_some_steps_sees_the_context():
    qkv, past = inputs(), Past(zeros=3)
    method = presets.pisa(density={0: 1.0, 1: 0.3}, block_size=16)
    out, report = run(method, qkv, past, num_steps=2)
    torch.testing.assert_close(out, whole(*qkv, past), rtol=0, atol=1e-12)
    assert report.density == 1.0


def test_another_share_inside_leaves_the_kept_context_alone():
    past, state = Past(), State()
    inner = presets.pisa(density={0: 0.5, 2: 0.3}, block_size=16)
    method = presets.flashblock(inner=inner, refresh=99)
    exact = []
    for step in range(4):
        _, report = run(method, inputs(step), past, step=step, num_steps=4, state=state)
        exact.append(int(report.exact_pairs.sum()))
    assert past.reads == 1
    assert exact[1] > max(exact[2:]), "inside, the share is that of the step"


def test_a_backend_that_makes_no_partials_is_refused():
    for given in ({"inner": "dense", "backend": "sdpa"}, {"inner": presets.dense(backend="sdpa")}):
        with pytest.raises(InputError, match=r"flashblock: inner: .* got backend='sdpa'"):
            presets.flashblock(**given)
