"""Block kernels in Triton's interpreter, on ragged blocks, masks and poisoned memory, to fp64."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dit_accel.kernels.block_attention import block_attention, groups
from dit_accel.kernels.block_attention import triton as block_attention_triton
from dit_accel.kernels.block_summary import block_mean, block_summary
from dit_accel.kernels.block_summary import triton as block_summary_triton
from dit_accel.kernels.packed import START_BIT, compact, tiles
from dit_accel.kernels.topk import topk_mask

pytest.importorskip("triton")
_PATH = Path(__file__).parent / "test_block_attention.py"
_SPEC = importlib.util.spec_from_file_location("dit_accel_blocks", _PATH)
shared = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(shared)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that nobody wrote shows."""
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(torch.nan if made.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)


def both(run, like, *tensors):
    """What `run` gives in fp64, and in the inputs' precision by plain torch and by the kernel."""
    exact = run("reference", *(x.double() for x in tensors))
    return exact, run("reference", *tensors), run("triton", *tensors)


def no_worse(got, low, exact, dtype):
    """At most twice the error of plain torch, which accumulates in fp32 as the kernel does, and
    the rounding of weights and tables to the inputs' dtype."""
    got, low = got.double(), low.double()
    assert bool((got.isfinite() == exact.isfinite()).all())
    finite = exact.isfinite()
    bound = 2 * (low - exact)[finite].abs().max() + 2 * torch.finfo(dtype).eps * (
        exact[finite].abs().max()
    )
    assert (got - exact)[finite].abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("kind", "taylor"),
    [
        (None, None),
        ("taylor", None),
        ("taylor", "global"),
        ("second", "global"),
        ("gaussian", None),
    ],
)
def test_attention(kind, taylor, masked, dtype):
    q, k, v, queries, keys, code, valid = shared.problem(
        batch=1, heads=2, length=75, depth=16, dtype=dtype
    )
    valid = valid if masked else None

    def run(backend, q, k, v):
        rest = None if kind is None else shared.terms(k, v, keys, valid, kind, taylor, "reference")
        return shared.run(q, k, v, queries, keys, code, valid, rest, backend=backend)

    exact, low, got = both(run, q, q, k, v)
    no_worse(got[0], low[0], exact[0], dtype)
    no_worse(got[1], low[1], exact[1], dtype)


@pytest.mark.parametrize("choice", [-1, 0, 1])
def test_plans_of_one_kind(choice):
    q, k, v, queries, keys, code, _ = shared.problem(
        batch=1, heads=1, length=40, depth=16, dtype=torch.float32
    )
    code = torch.full_like(code, choice)
    rest = shared.terms(k, v, keys, None, "taylor", "global", "reference")
    options = {"rest": rest} if choice == -1 else {}
    got = shared.run(q, k, v, queries, keys, code, backend="triton", **options)
    wanted = shared.run(q, k, v, queries, keys, code, backend="reference", **options)
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("each", [True, False], ids=["in groups", "at once"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("longest", [None, 75])
def test_pairs_are_counted(longest, padded, each, monkeypatch):
    if each:
        monkeypatch.setattr(groups, "COPY_BYTES", 1)
    *given, valid = shared.problem(heads=2, length=75, depth=16, dtype=torch.float32)
    valid = valid if padded else None
    shared.assert_pairs_are_counted(*given, valid, "triton", k_longest=longest, long_rows=2)


def test_no_valid_key_at_all():
    q, k, v, queries, keys, code, valid = shared.problem(
        batch=2, heads=1, length=33, depth=16, dtype=torch.float32
    )
    valid[1] = False
    out, lse = shared.run(q, k, v, queries, keys, code, valid, backend="triton")
    assert bool((out[1] == 0).all())
    assert bool((lse[1] == -torch.inf).all())


def test_rows_of_any_stride():
    q, k, v, queries, keys, code, valid = shared.problem(
        batch=2, heads=2, length=33, depth=16, dtype=torch.float32
    )
    plain = shared.run(q, k, v, queries, keys, code, valid, backend="triton")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    other = shared.run(*strided, queries, keys, code, valid, backend="triton")
    torch.testing.assert_close(other, plain, rtol=0, atol=0)


def test_what_the_kernel_cannot_do_is_refused():
    q, k, v, queries, keys, code, _ = shared.problem(depth=16, dtype=torch.float32)
    rest = shared.terms(k, v, keys, None, "taylor", "rest", "reference")
    with pytest.raises(ValueError, match="cov_scope 'rest'"):
        shared.run(q, k, v, queries, keys, code, rest=rest, backend="triton")
    with pytest.raises(ValueError, match="positive scale"):
        shared.run(q, k, v, queries, keys, code, scale=-1.0, backend="triton")
    with pytest.raises(ValueError, match="bf16 products wrongly"):
        shared.run(*(x.bfloat16() for x in (q, k, v)), queries, keys, code, backend="triton")


@pytest.fixture
def late(monkeypatch):
    """Means are subtracted late in fp16 too: Triton's interpreter has no products in bf16."""
    monkeypatch.setattr(block_summary_triton, "_LATE", (torch.float16,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [100, 500])
@pytest.mark.parametrize("told", [False, True])
def test_statistics(told, length, masked, dtype, late):
    """Of blocks that fit a tile and of longer ones, and whether or not that is known before."""
    _, k, v, _, keys, _, valid = shared.problem(
        batch=2, heads=2, length=length, depth=16, nk=12, dtype=dtype
    )
    # means that are far from zero, as those of keys are, where the kernel subtracts them late
    far = 6 if dtype == torch.float16 else 1
    k = k + torch.linspace(-far, far, 16, dtype=dtype)
    longest = int(keys.offsets.diff(dim=-1).max())
    assert (longest <= 64) == (length == 100), "both kinds of kernel are tested"
    if masked:  # what padding holds may reach no result
        hole = ~valid[:, None, :, None]
        k, v = k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.nan)
    valid = valid if masked else None

    def run(backend, k, v):
        return block_summary(
            k,
            v,
            perm=keys.perm,
            offsets=keys.offsets,
            num_video=7,
            key_valid=valid,
            k_var=True,
            cov=True,
            longest=longest if told else None,
            backend=backend,
        )

    exact, low, got = both(run, k, k, v)
    assert torch.equal(got.count.expand_as(exact.count), exact.count)
    for name in ("k_mean", "v_mean", "k_var", "cov_sum", "cov_norm"):
        no_worse(getattr(got, name), getattr(low, name), getattr(exact, name), dtype)
    mean = block_mean(
        k,
        perm=keys.perm,
        offsets=keys.offsets,
        valid=valid,
        longest=longest if told else None,
        backend="triton",
    )
    no_worse(mean, low.k_mean, exact.k_mean, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_means_of_long_blocks(masked, dtype, monkeypatch):
    monkeypatch.setattr(block_summary_triton, "LONG", 16)
    monkeypatch.setattr("dit_accel.kernels.block_summary.long._PIECE", 24)
    _, k, v, _, keys, _, valid = shared.problem(
        batch=2, heads=2, length=500, depth=16, nk=12, dtype=dtype
    )
    if masked:
        hole = ~valid[:, None, :, None]
        k, v = k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.nan)
    order = {"perm": keys.perm, "offsets": keys.offsets}
    longest = int(keys.offsets.diff(dim=-1).max())

    def run(backend, k, v):
        return block_summary(
            k, v, num_video=7, key_valid=valid if masked else None, longest=longest,
            backend=backend, **order,
        )  # fmt: skip

    exact, low, got = both(run, k, k, v)
    for name in ("k_mean", "v_mean"):
        no_worse(getattr(got, name), getattr(low, name), getattr(exact, name), dtype)
    mean = block_mean(
        k, valid=valid if masked else None, longest=longest, backend="triton", **order
    )
    assert torch.equal(mean, got.k_mean)


@pytest.mark.parametrize("num_video", [0, 1, 33, 40])
def test_covariances_are_of_the_video_alone(num_video, late):
    """Runs of blocks that end within the video, at its end, and in text of all sizes."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 1, 40, 16, generator=generator).half() for _ in range(2))
    perm = torch.randperm(40, generator=generator).view(1, 1, -1)
    offsets = torch.arange(41, dtype=torch.int32).view(1, 1, -1)
    # blocks of one token have no covariance: the last four are made one of four
    offsets = torch.cat([offsets[..., :37], offsets[..., 40:]], -1)
    options = {"perm": perm, "offsets": offsets, "num_video": min(num_video, 37), "cov": True}
    got = block_summary(k, v, longest=4, backend="triton", **options)
    exact = block_summary(k.double(), v.double(), backend="reference", **options)
    torch.testing.assert_close(got.cov_sum.double(), exact.cov_sum, rtol=0, atol=2e-5)
    torch.testing.assert_close(got.cov_norm.double(), exact.cov_norm, rtol=0, atol=2e-3)
    assert (got.cov_sum.abs().max() > 0.1) == (num_video > 36)


def test_topk_takes_so_many_and_the_first_of_equals():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(-3, 4, (2, 3, 5, 37), generator=generator).float() * 0.5
    score[0, 1, :, 5:] = -torch.inf
    score[0, 2] = -torch.inf
    score[1, 0, 0, ::2] = -0.0
    wanted = torch.tensor([[4, 9, 3], [37, 1, 0]])
    got = topk_mask(score, wanted, backend="triton")
    assert torch.equal(got, topk_mask(score, wanted, backend="reference"))
    assert got[1, 0].all()
    assert got[0, 1].sum(-1).tolist() == [5] * 5  # no more than there are


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_tiles_cover_every_valid_token_once(size, masked):
    _, _, _, _, keys, _, valid = shared.problem(batch=2, heads=2, length=41)
    order = compact(keys.perm, keys.offsets, valid if masked else None)
    found = tiles(order.offsets, 41, size)
    for b in range(2):
        for h in range(2):
            spans = [span for span in found.span[b, h].tolist() if span]
            tokens = [
                order.perm[b, h, (span >> START_BIT) + i].item()
                for span in spans
                for i in range(span & 255)
            ]
            wanted = [m for m in range(41) if not masked or valid[b, m]]
            assert sorted(tokens) == wanted
            assert all((span & 255) <= size for span in spans)


def test_named_never_falls_back():
    q, k, v, queries, keys, code, _ = shared.problem()
    with pytest.raises(ValueError, match=r"got 'triton': it takes fp16, bf16 and fp32"):
        block_attention(
            q,
            k,
            v,
            code,
            q_perm=queries.perm,
            q_offsets=queries.offsets,
            k_perm=keys.perm,
            k_offsets=keys.offsets,
            backend="triton",
        )


@pytest.mark.parametrize("backend", ["reference", "batched", "triton"])
def test_on_top_of_other_keys(backend):
    q, k, v, queries, keys, code, valid = shared.problem(
        batch=2, heads=1, length=33, depth=16, dtype=torch.float32
    )
    code = code.abs()
    rest = 1 - code
    whole = shared.run(q, k, v, queries, keys, torch.ones_like(code), valid, backend="reference")
    others = shared.run(q, k, v, queries, keys, rest, valid, backend="reference")
    got = shared.run(q, k, v, queries, keys, code, valid, onto=others, backend=backend)
    for mine, wanted in zip(got, whole, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_pooled_levels(masked, dtype):
    q, k, v, queries, keys, code, valid = shared.problem(
        batch=2, heads=2, length=75, depth=16, nk=5, dtype=dtype
    )
    generator = torch.Generator().manual_seed(1)
    kinds = torch.tensor([0, 1, 2, 4, 8], dtype=torch.int8)
    code = kinds[torch.randint(0, 5, code.shape, generator=generator)]
    valid = valid if masked else None

    def run(backend, q, k, v):
        return shared.run(q, k, v, queries, keys, code, valid, backend=backend)

    exact, low, got = both(run, q, q, k, v)
    no_worse(got[0], low[0], exact[0], dtype)
    no_worse(got[1], low[1], exact[1], dtype)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("levels", [False, True])
def test_groups_of_heads_change_nothing(monkeypatch, batch, levels):
    """With everything that has heads: orders, a plan, a rest, a mask, attention to be merged."""
    q, k, v, queries, keys, code, valid = shared.problem(
        batch=batch, heads=5, length=41, depth=16, dtype=torch.float32
    )
    if levels:
        code[0, 1::2, 2] = 2
    rest = shared.terms(k, v, keys, valid, "taylor", "global", "reference")
    onto = torch.randn(q.shape), torch.randn(q.shape[:3])
    options = {"rest": rest, "onto": onto, "backend": "triton"}
    whole = shared.run(q, k, v, queries, keys, code, valid, **options)
    seen = []
    each = 2 * 41 * 16 * 4  # bytes of a head's keys and values
    monkeypatch.setattr(groups, "COPY_BYTES", 2 * each)
    monkeypatch.setattr(
        block_attention_triton,
        "block_attention",
        lambda q, *a, run=block_attention_triton.block_attention, **o: (
            seen.append(q.shape[:2]),
            run(q, *a, **o),
        ),
    )
    got = shared.run(q, k, v, queries, keys, code, valid, **options)
    assert seen == [(1, 1), (1, 2), (1, 2)] * batch
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
