"""Block statistics against loops in fp64."""

import pytest
import torch

from dit_accel.kernels.block_summary import block_mean, block_summary
from dit_accel.kernels.dense_attention import dense_attention


def problem(padded, dtype=torch.float64, length=53, blocks=8, heads=2):
    generator = torch.Generator().manual_seed(0)
    k, v = (
        torch.randn(2, heads, length, 5, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    perm = torch.stack([torch.randperm(length, generator=generator) for _ in range(2 * heads)])
    perm = perm.view(2, heads, length)
    cuts = torch.randint(0, length, (2, heads, blocks - 2), generator=generator)
    cuts = torch.cat([torch.zeros(2, heads, 2), cuts, torch.full((2, heads, 1), length)], -1)
    offsets = cuts.sort(-1).values.to(torch.int32)  # the first block is empty
    valid = torch.rand(2, length, generator=generator) < 0.6 if padded else None
    return k, v, perm, offsets, valid


@pytest.mark.parametrize("backend", ["reference", "batched"])
@pytest.mark.parametrize("workspace", [None, 1], ids=["chunked", "one-by-one"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_statistics_follow_the_equations(oracle, monkeypatch, padded, workspace, backend):
    if workspace:
        monkeypatch.setattr(f"dit_accel.kernels.block_summary.{backend}.WORKSPACE_BYTES", workspace)
    k, v, perm, offsets, valid = problem(padded)
    if valid is not None:  # what padding holds may reach no result
        hole = ~valid[:, None, :, None]
        k, v = k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.nan)
    got = block_summary(
        k,
        v,
        perm=perm,
        offsets=offsets,
        num_video=6,
        key_valid=valid,
        k_var=True,
        cov=True,
        backend=backend,
    )
    means = block_mean(k, perm=perm, offsets=offsets, valid=valid, backend=backend)
    exactly = {"rtol": 0, "atol": 1e-12}

    class Blocks:
        pass

    Blocks.perm, Blocks.offsets = perm, offsets
    for b in range(2):
        for h in range(2):
            lists = oracle.lists(Blocks, b, h)
            lists = lists if valid is None else oracle.only_valid(lists, valid[b])
            total = torch.zeros(5, 5, dtype=torch.float64)
            for j, tokens in enumerate(lists):
                cov = oracle.covariance(k[b, h], v[b, h], tokens)
                total += cov * (j < 6)
                assert got.count[b, h, j] == len(tokens)
                for found, wanted in (
                    (got.k_mean, oracle.mean(k[b, h], tokens)),
                    (means, oracle.mean(k[b, h], tokens)),
                    (got.v_mean, oracle.mean(v[b, h], tokens)),
                    (got.k_var, oracle.variance(k[b, h], tokens)),
                    (got.cov_norm, cov.norm()),
                ):
                    torch.testing.assert_close(found[b, h, j], wanted, **exactly)
            torch.testing.assert_close(got.cov_sum[b, h], total, **exactly)


def test_only_what_is_asked_for():
    k, v, perm, offsets, _ = problem(False)
    got = block_summary(k, v, perm=perm, offsets=offsets, num_video=8)
    assert (got.k_var, got.cov_sum, got.cov_norm) == (None, None, None)


def test_shared_blocks_have_one_count():
    k, v, perm, offsets, valid = problem(True)
    one = {"perm": perm[:1, :1], "offsets": offsets[:1, :1], "num_video": 8}
    assert block_summary(k, v, **one).count.shape == (1, 1, 8)
    assert block_summary(k, v, key_valid=valid, **one).count.shape == (2, 1, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_summed_in_fp32(dtype):
    k, v, perm, offsets, _ = problem(False, dtype)
    got = block_summary(k, v, perm=perm, offsets=offsets, num_video=8, k_var=True, cov=True)
    fine = block_summary(
        k.double(), v.double(), perm=perm, offsets=offsets, num_video=8, k_var=True, cov=True
    )
    for name in ("k_mean", "v_mean", "k_var", "cov_sum", "cov_norm"):
        assert getattr(got, name).dtype == torch.float32
        # a hundred fp32 roundings of numbers up to about 50
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(fine, name), rtol=1e-5, atol=1e-5
        )


def test_a_large_mean_does_not_drown_the_variance():
    """Keys of mean 1000 and spread 1: the two-pass formula keeps what E[k²] - E[k]² would lose."""
    k, v, perm, offsets, _ = problem(False, torch.float32)
    shifted = block_summary(
        k + 1000, v, perm=perm, offsets=offsets, num_video=8, k_var=True, cov=True
    )
    plain = block_summary(k, v, perm=perm, offsets=offsets, num_video=8, k_var=True, cov=True)
    torch.testing.assert_close(shifted.k_var, plain.k_var, rtol=0, atol=1e-3)
    torch.testing.assert_close(shifted.cov_norm, plain.cov_norm, rtol=1e-3, atol=1e-2)


def test_dense_attention_masks_keys_and_empty_rows():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 11, 4, generator=generator, dtype=torch.float64) for _ in "qkv")
    valid = torch.rand(3, 11, generator=generator) < 0.5
    valid[0], valid[2] = True, False
    out = dense_attention(q, k, v, key_valid=valid, scale=0.3)
    for b in range(2):
        logits = q[b] @ k[b][:, valid[b]].mT * 0.3
        wanted = logits.softmax(-1) @ v[b][:, valid[b]]
        torch.testing.assert_close(out[b], wanted, rtol=0, atol=1e-13)
    assert (out[2] == 0).all()
    with pytest.raises(ValueError, match="key_valid: expected bool"):
        dense_attention(q, k, v, key_valid=valid.int())


def test_guards_name_what_is_wrong():
    k, v, perm, offsets, valid = problem(True)
    with pytest.raises(ValueError, match="k, v: expected one shape"):
        block_summary(k, v[:, :1], perm=perm, offsets=offsets, num_video=8)
    with pytest.raises(ValueError, match="k_offsets: expected int32"):
        block_summary(k, v, perm=perm, offsets=offsets.float(), num_video=8)
    with pytest.raises(ValueError, match="key_valid: expected bool"):
        block_mean(k, perm=perm, offsets=offsets, valid=valid.int())
