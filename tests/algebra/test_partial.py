"""Merging is a commutative monoid, and exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import InputError, Partial, merge

SHAPE = (2, 2, 5, 3)


@st.composite
def partials(draw, count):
    """Partials of wildly different size, some rows empty."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = []
    for _ in range(count):
        spread = draw(st.sampled_from([0.1, 5.0, 80.0, 1000.0]))
        lse = torch.randn(SHAPE[:3], generator=generator, dtype=torch.float64) * spread
        out = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        empty = torch.rand(SHAPE[:3], generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        lse = lse.masked_fill(empty, -torch.inf)
        made.append(Partial(out.masked_fill(empty.unsqueeze(-1), 0.0), lse))
    return made


def same(a, b):
    # fp64: a handful of roundings of numbers of order 1 (out) and of order 1000 (lse)
    torch.testing.assert_close(a.out, b.out, rtol=0, atol=1e-13)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-14, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(partials(3))
def test_associative_and_commutative(parts):
    a, b, c = parts
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    same(merge(a, b), merge(b, a))
    same(merge(a, b, c), merge(c, merge(a, b)))


@settings(max_examples=40, deadline=None)
@given(partials(1))
def test_empty_is_the_identity_to_the_last_bit(parts):
    (a,) = parts
    nothing = Partial.empty_like(a.out)
    for merged in (merge(a, nothing), merge(nothing, a), merge(nothing, a, nothing)):
        assert torch.equal(merged.out, a.out)
        assert torch.equal(merged.lse, a.lse)
        assert not merged.out.isnan().any()
        assert not merged.lse.isnan().any()


def test_merge_of_disjoint_keys_is_attention_over_their_union():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 4, generator=generator, dtype=torch.float64) for _ in range(3))

    def partial(keys):
        logits = q @ k[:, :, keys].mT
        return Partial(logits.softmax(-1) @ v[:, :, keys], logits.logsumexp(-1))

    same(merge(partial([0, 4]), partial([1, 2, 6]), partial([3, 5])), partial(list(range(7))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype):
    part = Partial.empty_like(torch.ones(SHAPE, dtype=dtype))
    fine = torch.float64 if dtype == torch.float64 else torch.float32
    assert part.lse.dtype == fine
    merged = merge(
        part, Partial(torch.ones(SHAPE, dtype=dtype), torch.zeros(SHAPE[:3], dtype=fine))
    )
    assert merged.out.dtype == dtype
    assert merged.lse.dtype == fine


def test_fp64_is_not_rounded_on_the_way():
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    lse = torch.zeros(1, 1, 1, dtype=torch.float64)
    fine = merge(Partial(one * (1 + 1e-12), lse), Partial(one * (1 + 1e-12), lse))
    assert abs(fine.out.item() - 1 - 1e-12) < 1e-15


def test_bad_input_is_named():
    with pytest.raises(InputError, match="expected at least one partial"):
        merge()
    with pytest.raises(InputError, match=r"expected out \[B, H, L, D\] with lse"):
        Partial(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3))
    a = Partial.empty_like(torch.zeros(1, 1, 2, 3))
    b = Partial.empty_like(torch.zeros(1, 1, 3, 3))
    with pytest.raises(InputError, match="expected partials of one shape"):
        merge(a, b)
