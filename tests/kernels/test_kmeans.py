"""The kernels of k-means, interpreted, against the plain implementation."""

import pytest
import torch

from dit_accel.kernels.kmeans import kmeans

pytest.importorskip("triton")
CLUSTERS = 7


def blobs(dtype=torch.float32, seed=0, length=150, depth=32):
    generator = torch.Generator().manual_seed(seed)
    middle = 3 * torch.randn(2, 2, 9, depth, generator=generator)
    member = torch.randint(0, 9, (2, 2, length, 1), generator=generator)
    x = middle.gather(2, member.expand(-1, -1, -1, depth))
    return (x + torch.randn(x.shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_the_kernel_agrees_with_fp64(iterations, padded):
    x = blobs()
    valid = None
    if padded:
        valid = torch.rand(2, 150, generator=torch.Generator().manual_seed(2)) < 0.7
        x = x.masked_fill(~valid[:, None, :, None], torch.nan)
    options = {"iterations": iterations, "valid": valid, "seed": 3}
    labels, centroids = kmeans(x, CLUSTERS, backend="triton", **options)
    wanted, exact = kmeans(x.double(), CLUSTERS, **options)
    counts = torch.ones_like(wanted, dtype=torch.bool) if valid is None else valid[:, None]
    assert ((labels == wanted) | ~counts).all()
    assert ((labels >= 0) & (labels < CLUSTERS)).all()
    torch.testing.assert_close(centroids.double(), exact, rtol=0, atol=1e-5)


def test_low_precision_rounds_centroids_and_nothing_else():
    """Labels are the nearest of the rounded centroids, means are those of the labels."""
    x = blobs(torch.float16)
    start = blobs(seed=5, length=CLUSTERS)
    labels, centroids = kmeans(x, CLUSTERS, iterations=1, start=start, backend="triton")

    def check_nearest(labels, centres):
        distance = torch.cdist(x.double(), centres.to(x.dtype).double())
        got = distance.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        assert (got <= distance.amin(-1) + 1e-5).all()

    first, _ = kmeans(x, CLUSTERS, iterations=0, start=start, backend="triton")
    check_nearest(first, start)
    for c in range(CLUSTERS):
        member = (first == c).unsqueeze(-1)
        mean = (x.double() * member).sum(2) / member.sum(2).clamp(min=1)
        mean = torch.where(member.any(2), mean, start[:, :, c].double())
        torch.testing.assert_close(centroids[:, :, c].double(), mean, rtol=0, atol=1e-5)
    check_nearest(labels, centroids)


def test_an_empty_cluster_stays_and_the_first_of_equals_wins():
    x = torch.zeros(1, 1, 20, 16)
    start = torch.zeros(1, 1, 3, 16)
    start[0, 0, 0] = 9.0
    labels, centroids = kmeans(x, 3, iterations=3, start=start, backend="triton")
    assert (labels == 1).all()
    assert torch.equal(centroids, start)


def test_a_settled_head_ends_early_and_the_others_go_on():
    x = blobs(length=60)
    x[0, 0] = x[0, 0, :1]
    ten, _ = kmeans(x, CLUSTERS, iterations=10, backend="triton")
    wanted, _ = kmeans(x.double(), CLUSTERS, iterations=10)
    assert (ten == wanted).all()


def test_what_cannot_run_here_is_told():
    x = blobs()
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        kmeans(x.double(), CLUSTERS, iterations=1, backend="triton")
    with pytest.raises(ValueError, match="got 'flash_kmeans': it"):
        kmeans(x, CLUSTERS, iterations=1, backend="flash_kmeans")


def test_a_rehearsal_goes_through_one_iteration(monkeypatch):
    """All iterations have the same kernels, and nothing is kept of what they find."""
    triton = pytest.importorskip("dit_accel.kernels.kmeans.triton")
    steps = []
    real = triton._assign_all
    monkeypatch.setattr(
        triton, "_assign_all", lambda x, state, step: steps.append(step) or real(x, state, step)
    )
    x = torch.randn(1, 1, 40, 16, generator=torch.Generator().manual_seed(0))
    for rehearsing, wanted in ((True, [0, 1]), (False, [0, 1, 2, 3])):
        monkeypatch.setattr(triton, "rehearsing", lambda now=rehearsing: now)
        steps.clear()
        kmeans(x, 3, iterations=3, backend="triton")
        assert steps == wanted
