"""The kernel itself: blocks no layout makes, poisoned memory, small workspaces, guards."""

import pytest
import torch

from dit_accel.kernels.block_attention import RestTerms, batched, block_attention, reference
from dit_accel.kernels.block_summary import block_summary

EXACTLY = {"rtol": 0, "atol": 1e-12}


class Blocks:
    def __init__(self, perm, offsets):
        self.perm, self.offsets = perm, offsets


def clusters(batch, heads, length, count, generator):
    """Blocks as clustering makes them: by batch element and head, ragged, some empty."""
    perm = torch.stack(
        [torch.randperm(length, generator=generator) for _ in range(batch * heads)]
    ).view(batch, heads, length)
    cuts = torch.randint(0, length + 1, (batch, heads, count - 1), generator=generator)
    cuts[..., : count // 4] = cuts[..., :1]  # empty blocks
    ends = torch.tensor([0, length]).expand(batch, heads, 2)
    offsets = torch.cat([cuts, ends], -1).sort(-1).values.to(torch.int32)
    return Blocks(perm, offsets)


def problem(seed=0, batch=2, heads=3, length=41, depth=6, nq=7, nk=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, heads, length, depth, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(3)
    )
    queries = clusters(batch, heads, length, nq, generator)
    keys = clusters(batch, heads, length, nk, generator)
    code = torch.randint(-1, 2, (batch, heads, nq, nk), generator=generator, dtype=torch.int8)
    valid = torch.rand(batch, length, generator=generator) < 0.8
    return q, k, v, queries, keys, code, valid


def run(q, k, v, queries, keys, code, valid=None, rest=None, **options):
    return block_attention(
        q,
        k,
        v,
        code,
        q_perm=queries.perm,
        q_offsets=queries.offsets,
        k_perm=keys.perm,
        k_offsets=keys.offsets,
        key_valid=valid,
        rest=rest,
        **options,
    )


def terms(k, v, keys, valid, kind, taylor, backend="auto"):
    found = block_summary(
        k,
        v,
        perm=keys.perm,
        offsets=keys.offsets,
        num_video=keys.offsets.shape[-1] - 1,
        key_valid=valid,
        k_var=True,
        cov=True,
        backend=backend,
    )
    return RestTerms(
        found.k_mean,
        found.v_mean,
        found.count,
        k_var=found.k_var,
        weight="plain" if kind == "taylor" else kind,
        cov_sum=found.cov_sum if taylor else None,
        cov_scope=taylor or "global",
        num_video=keys.offsets.shape[-1] - 1,
    )


CASES = [
    ("drop", None),
    ("taylor", None),
    ("taylor", "global"),
    ("taylor", "rest"),
    ("second", "rest"),
    ("gaussian", "global"),
]


BACKENDS = pytest.mark.parametrize("backend", ["reference", "batched"])


@BACKENDS
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("kind", "taylor"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_follow_the_equations(oracle, kind, taylor, padded, seed, backend):
    q, k, v, queries, keys, code, valid = problem(seed)
    valid = valid if padded else None
    if valid is not None:  # what padding holds may reach no result
        hole = ~valid[:, None, :, None]
        k, v = k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.nan)
    rest = None if kind == "drop" else terms(k, v, keys, valid, kind, taylor, backend)
    out, lse = run(q, k, v, queries, keys, code, valid, rest, scale=0.5, backend=backend)
    for b in range(2):
        keep = [True] * 41 if valid is None else valid[b].tolist()
        for h in range(3):
            wanted = oracle.attend(
                q[b, h],
                k[b, h],
                v[b, h],
                oracle.lists(queries, b, h),
                oracle.only_valid(oracle.lists(keys, b, h), keep),
                code[b, h].tolist(),
                0.5,
                rest="moment" if kind in ("second", "gaussian") else kind,
                taylor=taylor,
                weight=kind if kind in ("second", "gaussian") else "second",
            )
            torch.testing.assert_close(out[b, h], wanted[0], **EXACTLY)
            torch.testing.assert_close(lse[b, h], wanted[1], **EXACTLY)


@pytest.mark.parametrize(("kind", "taylor"), CASES)
def test_rows_taken_in_pieces_are_the_same(monkeypatch, kind, taylor):
    """A workspace too small for a row of keys, so that the online softmax has to work."""
    q, k, v, queries, keys, code, valid = problem(3, batch=1, heads=2, length=300, nq=4, nk=6)
    rest = None if kind == "drop" else terms(k, v, keys, valid, kind, taylor)
    whole = run(q, k, v, queries, keys, code, valid, rest)
    pieces = []
    real = reference._Softmax.weigh
    monkeypatch.setattr(
        reference._Softmax,
        "weigh",
        lambda self, logits: pieces.append(logits.shape[-1]) or real(self, logits),
    )
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", 1)
    small = run(q, k, v, queries, keys, code, valid, rest)
    assert max(pieces) <= 64
    assert len(pieces) > 8
    for a, b in zip(whole, small, strict=True):
        torch.testing.assert_close(a, b, **EXACTLY)


@pytest.mark.parametrize(("kind", "taylor"), CASES)
def test_heads_and_rows_taken_in_chunks_are_the_same(monkeypatch, kind, taylor):
    q, k, v, queries, keys, code, valid = problem(3, batch=2, heads=5, length=90, nq=4, nk=6)
    for size in (1, 200_000):
        monkeypatch.setattr(batched, "WORKSPACE_BYTES", size)
        monkeypatch.setattr("dit_accel.kernels.block_summary.batched.WORKSPACE_BYTES", size)
        results = []
        for backend in ("reference", "batched"):
            rest = terms(k, v, keys, valid, kind, taylor, backend) if kind != "drop" else None
            results.append(run(q, k, v, queries, keys, code, valid, rest, backend=backend))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **EXACTLY)


def test_the_peak_of_a_later_piece_may_be_far_above_the_first(monkeypatch):
    q, k, v, queries, keys, _, _ = problem(4, batch=1, heads=1, length=300, nq=2, nk=2)
    k = k * torch.linspace(0.1, 200, 300).view(1, 1, 300, 1)
    code = torch.ones(1, 1, 2, 2, dtype=torch.int8)
    wanted = torch.softmax(q @ k.mT * 6**-0.5, -1) @ v
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", 1)
    out, _ = run(q, k, v, queries, keys, code)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)


@BACKENDS
def test_every_output_is_written(monkeypatch, backend):
    """`torch.empty` poisoned: what is not written would be NaN."""
    real = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **kw: (lambda x: x.fill_(torch.nan) if x.is_floating_point() else x)(
            real(*a, **kw)
        ),
    )
    q, k, v, queries, keys, code, valid = problem(5)
    rest = terms(k, v, keys, valid, "second", "rest", backend)
    out, lse = run(q, k, v, queries, keys, code, valid, rest, backend=backend)
    assert not out.isnan().any()
    assert not lse.isnan().any()


@BACKENDS
def test_a_plan_and_blocks_may_be_shared(backend):
    q, k, v, queries, keys, code, _ = problem(6)
    one_q = Blocks(queries.perm[:1, :1], queries.offsets[:1, :1])
    one_k = Blocks(keys.perm[:1, :1], keys.offsets[:1, :1])
    shared = run(q, k, v, one_q, one_k, code[:1, :1], backend=backend)
    for b in range(2):
        for h in range(3):
            one = [x[b : b + 1, h : h + 1] for x in (q, k, v)]
            out, lse = run(*one, one_q, one_k, code[:1, :1], backend=backend)
            torch.testing.assert_close(out[0, 0], shared[0][b, h], **EXACTLY)
            torch.testing.assert_close(lse[0, 0], shared[1][b, h], **EXACTLY)


@BACKENDS
@pytest.mark.parametrize("padded", [False, True])
def test_pairs_are_counted(backend, padded):
    q, k, v, queries, keys, code, valid = problem(8)
    assert_pairs_are_counted(q, k, v, queries, keys, code, valid if padded else None, backend)


def assert_pairs_are_counted(q, k, v, queries, keys, code, valid, backend, **options):
    pairs = torch.full(q.shape[:2], -5)
    run(q, k, v, queries, keys, code, valid, pairs=pairs, backend=backend, **options)
    where = [
        torch.repeat_interleave(x.offsets[b, h].diff().long()).expand_as(x.perm[b, h])
        for x in (queries, keys)
        for b in range(q.shape[0])
        for h in range(q.shape[1])
    ]
    rows, columns = where[: len(where) // 2], where[len(where) // 2 :]
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        b, h = divmod(i, q.shape[1])
        exact = code[b, h][row][:, column] == 1
        known = True if valid is None else valid[b, keys.perm[b, h]]
        assert pairs[b, h] == (exact & known).sum()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype, backend):
    """Only the output is rounded: to half a unit of the dtype, beside fp32's own error."""
    q, k, v, queries, keys, code, valid = problem(7, dtype=dtype)
    rest = terms(k, v, keys, valid, "second", "global", backend)
    out, lse = run(q, k, v, queries, keys, code, valid, rest, backend=backend)
    fine = terms(k.double(), v.double(), keys, valid, "second", "global")
    wanted, norm = run(q.double(), k.double(), v.double(), queries, keys, code, valid, fine)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted, rtol=torch.finfo(dtype).eps, atol=2e-6)
    torch.testing.assert_close(lse.double(), norm, rtol=1e-6, atol=2e-6)


def test_guards_name_what_is_wrong():
    q, k, v, queries, keys, code, valid = problem()
    good = {"q": q, "k": k, "v": v, "queries": queries, "keys": keys, "code": code}
    for change, message in (
        ({"k": k[:, :, :3]}, "expected one shape"),
        ({"code": code.int()}, "code: expected int8"),
        ({"code": code[..., :3]}, "code: expected int8"),
        ({"code": torch.full_like(code, 3)}, "expected -1, 0, 1 or a level among 2, 4, 8, got"),
        ({"code": torch.full_like(code, -2)}, "expected -1, 0, 1 or a level among 2, 4, 8, got"),
        ({"queries": Blocks(queries.perm.int(), queries.offsets)}, "q_perm: expected int64"),
        ({"keys": Blocks(keys.perm[..., :5], keys.offsets)}, "k_perm: expected int64 of 41"),
        ({"keys": Blocks(keys.perm[:, :2], keys.offsets)}, r"k_perm: expected \[2\|1, 3\|1"),
        ({"valid": valid[:, :4]}, "key_valid: expected bool"),
        (
            {"backend": "cuda"},
            "backend: expected one of auto, reference, batched, triton, got 'cuda'",
        ),
        ({"q": q.clone().requires_grad_()}, "torch.no_grad"),
        (
            {"pairs": torch.zeros(2, 3)},
            r"pairs: expected contiguous int64 \[2, 3\], got torch.float32",
        ),
        (
            {"rest": RestTerms(k, v, valid, weight="second")},
            "expected k_var for weight 'second'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(**(good | change))
