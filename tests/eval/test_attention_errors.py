"""Errors of attention: against definitions in fp64, and methods whose errors are known."""

import pytest
import torch

from dit_accel import Context, Method, presets
from dit_accel.eval import attention_maps, fields
from dit_accel.eval.attention_errors import means, replay, selected_share
from dit_accel.eval.calls import solved
from dit_accel.eval.candidates import candidates, combination_names
from dit_accel.layout import Gilbert, Raster
from dit_accel.rest import Drop, Taylor
from dit_accel.route import Everything, PooledScore
from dit_accel.types import EXACT, REST, Geometry, Plan

GRID = (2, 4, 6)


@pytest.fixture(scope="module")
def steps():
    return list(fields.synthetic(GRID, heads=2, depth=12, steps=3, seed=3))


class Halves:
    """A route that computes the first half of the key blocks, whoever asks."""

    needs = ()

    def __call__(self, blocked, rest, ctx):
        code = torch.full((1, 1, blocked.queries.num_blocks, blocked.keys.num_blocks), REST)
        code[..., : blocked.keys.num_blocks // 2] = EXACT
        return Plan(code.to(torch.int8))


def test_fields_follow_their_seed(steps):
    again = list(fields.synthetic(GRID, heads=2, depth=12, steps=3, seed=3))
    other = next(fields.synthetic(GRID, heads=2, depth=12, steps=3, seed=4))
    assert torch.equal(again[2][1].q, steps[2][1].q)
    assert not torch.equal(other[0].q, steps[0][0].q)
    call = steps[0][0]
    # normalised before they are turned, which keeps the norm
    rms = call.q.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 1.3))


def test_fields_are_smooth():
    generator = torch.Generator().manual_seed(0)
    grid = (4, 16, 16)
    x = fields.smooth(grid, 2, 6, 2.0, generator)[0].mT.view(2, 6, *grid)

    def alike(shift):
        return float((x * x.roll(shift, -1)).mean() / x.square().mean())

    # white noise through a Gaussian of deviation s has the correlation exp(-d² / 4s²)
    assert alike(1) == pytest.approx(torch.tensor(-1 / 16).exp().item(), abs=0.03)
    assert alike(4) == pytest.approx(torch.tensor(-1.0).exp().item(), abs=0.12)


def test_everything_has_no_error(steps):
    found = replay(Method(Gilbert(8), Everything(), Drop()), steps, 6.0)
    assert len(found.calls) == 6
    for call in found.calls:
        assert call.error < 1e-6
        assert call.density == 1
        assert call.mass == pytest.approx(1, abs=1e-5)
        assert call.gain == pytest.approx(1, abs=1e-5)


def test_numbers_are_their_definitions(steps):
    method = Method(Raster(8), Halves(), Drop())
    guidance = 3.0
    found = replay(method, steps, guidance)
    half = 24
    errors = {}
    for call in (call for group in steps for call in group):
        q, k, v = (x.double() for x in (call.q, call.k, call.v))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        share = logits.softmax(-1)
        true = share @ v
        got = logits[..., :half].softmax(-1) @ v[:, :, :half]
        e = got - true
        errors[call.ctx.step, call.ctx.branch] = e
        one = next(c for c in found.calls if (c.step, c.branch) == (call.ctx.step, call.ctx.branch))
        near = {"rel": 1e-4}
        assert one.density == 0.5
        assert one.mass == pytest.approx(float(share[..., :half].sum(-1).mean()), **near)
        assert one.error == pytest.approx(float(e.norm() / true.norm()), **near)
        assert one.gain == pytest.approx(float((got * true).sum() / true.square().sum()), **near)
        unit = true / true.norm(dim=-1, keepdim=True)
        along = (e * unit).sum(-1).square().sum() / e.square().sum()
        assert one.along == pytest.approx(float(along), rel=1e-3)
        mean = e.mean(2, keepdim=True).expand_as(e)
        common = mean.square().sum() / e.square().sum()
        assert one.common == pytest.approx(float(common), rel=1e-3)
        heads = e.square().sum((0, 2, 3)) / true.square().sum((0, 2, 3))
        assert one.head_errors == pytest.approx(heads.sqrt().tolist(), **near)
    last = next(c for c in found.calls if (c.step, c.branch) == (2, "cond"))
    a, b = errors[2, "cond"], errors[1, "cond"]
    assert last.step_cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-4)
    u = errors[2, "uncond"]
    both = ((a.square().sum() + u.square().sum()) / 2).sqrt()
    assert last.guided == pytest.approx(float((3 * a - 2 * u).norm() / both), rel=1e-4)
    shares = []
    for branch in fields.BRANCHES:
        three = torch.stack([errors[s, branch] for s in range(3)])
        shares.append(three.mean(0).square().sum() / three.square().sum((1, 2, 3, 4)).mean())
    assert found.persistent == pytest.approx(float(sum(shares)) / 2, rel=1e-4)
    assert found.calls[0].step_cosine is None


def test_share_of_selected_blocks(steps):
    call = steps[0][0]
    blocked = Raster(8)(call.q, call.k, call.v, Context(Geometry(GRID)))
    code = torch.full((1, 1, 6, 6), REST, dtype=torch.int8)
    assert selected_share(blocked, Plan(code)) == 0
    assert selected_share(blocked, Plan(torch.full_like(code, EXACT))) == pytest.approx(1, abs=1e-5)
    code[..., 0] = EXACT
    wanted = []
    for h in range(2):
        k, v = (x[0, h].double().view(6, 8, 12) for x in (call.k, call.v))
        c = (k - k.mean(1, keepdim=True)).mT @ v
        wanted.append(float(c[0].norm() / c.sum(0).norm()))
    assert selected_share(blocked, Plan(code)) == pytest.approx(sum(wanted) / 2, rel=1e-4)


def test_the_first_order_term_by_its_definition(steps):
    call = steps[0][0]
    route = PooledScore("topk", 0.3)
    with_term, without = (Method(Gilbert(8), route, Taylor(t)) for t in ("global", None))
    ctx = Context(Geometry(GRID))
    a, _ = with_term(call.q, call.k, call.v, ctx)
    b, _ = without(call.q, call.k, call.v, ctx)
    left, term = call.out - b, a - b
    found = replay(with_term, [[call]])
    (one,) = found.calls
    assert one.term_size == pytest.approx(float(term.norm() / left.norm()), rel=1e-4)
    cosine = (term * left).sum() / term.norm() / left.norm()
    assert one.term_cosine == pytest.approx(float(cosine), rel=1e-3, abs=1e-4)
    assert found.persistent is None
    assert replay(without, [[call]]).calls[0].term_size is None


def test_maps_by_their_definition(steps):
    """A pair's error in fp64, for exact, dropped and approximated pairs."""
    call = steps[0][0]
    for rest in (Drop(), Taylor(None)):
        method = Method(Raster(8), Halves(), rest)
        (one,) = attention_maps.maps("halves", method, [[call]], {0})
        q, k, v = (x[0, 1].double() for x in (call.q, call.k, call.v))
        logits = q @ k.mT * 12**-0.5
        true = logits.softmax(-1)
        kept = logits[:, :24].exp()
        means = k.view(6, 8, 12).mean(1), v.view(6, 8, 12).mean(1)
        stand = 8 * (q @ means[0].mT * 12**-0.5).exp()[:, 3:]
        if isinstance(rest, Drop):
            stand = torch.zeros_like(stand)
        total = kept.sum(-1, keepdim=True) + stand.sum(-1, keepdim=True)
        wanted = torch.zeros(6, 6, dtype=torch.float64)
        size = (true @ v).square().sum(-1).mean().sqrt()
        for j in range(6):
            some = slice(8 * j, 8 * j + 8)
            truth = true[:, some] @ v[some]
            made = (
                kept[:, some] / total @ v[some]
                if j < 3
                else (stand[:, j - 3 : j - 2] / total) * means[1][j]
            )
            gap = (made - truth).square().sum(-1).view(6, 8).mean(1).sqrt()
            wanted[:, j] = gap / size
        torch.testing.assert_close(one.error[1].double(), wanted, rtol=2e-3, atol=1e-4)
        left = "dropped" if isinstance(rest, Drop) else "approximated"
        names = [attention_maps.KINDS[i] for i in one.kind[1, 0].tolist()]
        assert names == ["exact"] * 3 + [left] * 3


def test_maps_of_methods_with_memory_and_levels(steps, tmp_path):
    kept = presets.flashblock(block_size=8, refresh=3)
    made = list(attention_maps.maps("flashblock", kept, steps, {0, 2}))
    assert {attention_maps.KINDS[i] for i in made[0].kind.unique().tolist()} == {"exact"}
    kinds = {attention_maps.KINDS[i] for i in made[1].kind.unique().tolist()}
    assert kinds == {"exact", "cached"}
    psa = presets.psa(block_q=8, block_k=8, ratios=(0.2, 0.4, 0.6, 0.8), mode="topk")
    (levels,) = attention_maps.maps("psa", psa, steps, {1})
    kinds = {attention_maps.KINDS[i] for i in levels.kind.unique().tolist()}
    assert {"exact", "averaged by 2", "averaged by 4", "averaged by 8", "dropped"} == kinds
    attention_maps.save(made, tmp_path)
    again = attention_maps.load(attention_maps.file_of(tmp_path, "flashblock"))
    assert [(one.layer, one.step) for one in again] == [(0, 0), (0, 2)]
    assert torch.equal(again[1].kind, made[1].kind)


def test_maps_of_what_was_kept(steps):
    """A kept pair's error in fp64: the earlier step's contribution, in the later softmax."""
    inner = Method(Raster(8), Halves(), Drop())
    method = presets.flashblock(inner=inner, refresh=3)
    _, one = attention_maps.maps("flashblock", method, steps, {0, 2})
    old, new = steps[0][0], steps[2][0]
    logits = [c.q[0, 1].double() @ c.k[0, 1].double().mT * 12**-0.5 for c in (old, new)]
    values = [c.v[0, 1].double() for c in (old, new)]
    true = logits[1].softmax(-1)
    lse = torch.cat([logits[1][:, :24], logits[0][:, 24:]], 1).logsumexp(-1, keepdim=True)
    size = (true @ values[1]).square().sum(-1).mean().sqrt()
    wanted = torch.zeros(6, 6, dtype=torch.float64)
    for j in range(6):
        some, which = slice(8 * j, 8 * j + 8), j < 3
        made = (logits[which][:, some] - lse).exp() @ values[which][some]
        gap = made - true[:, some] @ values[1][some]
        wanted[:, j] = gap.square().sum(-1).view(6, 8).mean(1).sqrt() / size
    torch.testing.assert_close(one.error[1].double(), wanted, rtol=2e-3, atol=1e-4)
    assert float(wanted[:, 3:].min()) > 1e-3, "what changed since is seen"


def test_every_combination_runs(steps):
    assert len(combination_names()) == len(set(combination_names())) > 100
    some = candidates([], ["gilbert/*/*", "kmeans/topk/taylor-rest"], densities=(0.3,))
    assert {c.name for c in some} >= {"gilbert/topk/drop@0.3", "kmeans/topk/taylor-rest@0.3"}
    for one in some:
        found = means(replay(one.method, steps[:1]).calls)
        assert found["error"] < 2, one.name
        assert 0 < found["mass"] <= 1, one.name


def test_a_dense_schedule_counts_as_exact():
    calls = next(fields.synthetic(GRID, heads=1, depth=6, steps=1))
    (one, _) = replay(presets.pisa(block_size=8, dense_steps=1), [calls]).calls
    assert (one.density, one.mass) == (1, 1)
    assert one.error < 1e-6


def test_masked_keys_do_not_count(steps):
    call = steps[0][0]
    valid = torch.ones(1, 48, dtype=torch.bool)
    valid[:, 40:] = False
    k = call.k.clone()
    k[:, :, 40:] = 1e4
    masked = solved(call.q, k, call.v, Context(Geometry(GRID, key_valid=valid)))
    method = Method(Raster(8), PooledScore("topk", 0.4), Taylor("rest"))
    (one,) = replay(method, [[masked]]).calls
    assert one.error < 1
    (drawn,) = attention_maps.maps("masked", method, [[masked]], {0})
    assert bool(drawn.error.isfinite().all())
