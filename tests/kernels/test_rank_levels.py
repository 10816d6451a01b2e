"""Levels by rank against a loop, and the kernel, interpreted, against both."""

import pytest
import torch

from dit_accel.kernels.rank_levels import rank_levels

pytest.importorskip("triton")


def by_loop(score, worth, bounds, inclusive):
    levels = torch.zeros(score.shape, dtype=torch.int8)
    for b in range(score.shape[0]):
        for h in range(score.shape[1]):
            for i in range(score.shape[2]):
                line = score[b, h, i].tolist()
                value = worth[b, h, min(i, worth.shape[2] - 1)].tolist()
                limits = bounds[b, 0, min(i, bounds.shape[2] - 1)].tolist()
                total = 0.0
                for j in sorted(range(len(line)), key=lambda j: -line[j]):
                    if line[j] == float("-inf"):
                        continue
                    reach = total + value[j]
                    levels[b, h, i, j] = sum(
                        reach <= limit if inclusive else total < limit for limit in limits
                    )
                    total = reach
    return levels


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_levels_follow_the_ranking(ties, inclusive, backend):
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(2, 2, 3, 37, generator=generator)
    if ties:
        score = score.round()
    score[..., 5] = -torch.inf
    score[1, 1, 2] = -torch.inf
    # whole numbers, so that sums are exact in fp32
    worth = torch.randint(0, 9, (2, 2, 1 if inclusive else 3, 37), generator=generator)
    worth = worth if inclusive else worth.float()
    bounds = torch.tensor([0.0, 30.0, 31.0, 1e9]).expand(2, 1, 1, -1)
    got = rank_levels(score, worth, bounds, inclusive=inclusive, backend=backend)
    assert torch.equal(got, by_loop(score, worth, bounds, inclusive))
    assert got.unique().numel() >= 3


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_codes_are_written_where_they_belong(backend):
    generator = torch.Generator().manual_seed(1)
    score = torch.randn(2, 2, 3, 19, generator=generator)
    bounds = torch.tensor([2.0, 5.0, 9.0]).view(1, 1, 1, -1)
    number = rank_levels(score, torch.ones(1, 1, 1, 19), bounds, backend="reference")
    around = torch.full((2, 2, 4, 23), 99, dtype=torch.int8)
    within = around[:, :, :3, 1:20]
    options = {"codes": (0, 8, 4, 15), "out": within, "backend": backend}
    assert rank_levels(score, torch.ones(1, 1, 1, 19), bounds, **options) is within
    assert torch.equal(within, torch.tensor((0, 8, 4, 15), dtype=torch.int8)[number.int()])
    assert (around == 99).sum() == around.numel() - within.numel()


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_shares_are_of_what_a_row_is_worth(ties, counted):
    generator = torch.Generator().manual_seed(2)
    score = torch.rand(1, 3, 2, 37, generator=generator)
    score[0, 2, 1] = 0.25
    score[0, 0, :, 7] = -torch.inf
    if ties:
        score = (score * 4).round()
    worth = torch.randint(0, 3, (1, 1, 1, 37), generator=generator)
    worth = worth > 0 if counted else worth.float()
    shares = torch.tensor([0.0, 0.25, 0.3, 0.9, 1.0], dtype=torch.float64)
    total = worth.double().expand_as(score).masked_fill(score == -torch.inf, 0).sum(-1)
    for inclusive in (False, True):
        options = {"inclusive": inclusive, "shares": True}
        bounds = (shares * total.unsqueeze(-1)).float().double()
        wanted = torch.stack(
            [
                by_loop(
                    score[:, h : h + 1],
                    worth.expand(-1, -1, 2, -1),
                    bounds[:, h : h + 1],
                    inclusive,
                )[:, 0]
                for h in range(3)
            ],
            1,
        )
        limits = shares.view(1, 1, 1, -1)
        for backend in ("triton",) if ties else ("reference", "triton"):
            got = rank_levels(score, worth, limits, backend=backend, **options)
            assert torch.equal(got, wanted), (backend, inclusive)
        assert got.unique().numel() > 3


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_lies_beyond_the_scores_is_written_too(backend):
    score = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(3))
    worth, bounds = torch.ones(1, 1, 1, 5, dtype=torch.bool), torch.tensor([[[[2.0]]]])
    out = torch.full((1, 2, 6, 9), 99, dtype=torch.int8)[..., :8]
    rank_levels(score, worth, bounds, out=out, beyond=7, backend=backend)
    assert torch.equal(out[:, :, :3, :5], rank_levels(score, worth, bounds, backend="reference"))
    assert (out[:, :, 3:] == 7).all()
    assert (out[..., 5:] == 7).all()


def test_what_does_not_fit_is_told():
    score = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match=r"worth: expected \[1\|1, 1\|1, 2\|1, 3\]"):
        rank_levels(score, score[..., :2], score)
    with pytest.raises(ValueError, match="codes: expected 4 of 0 to 15, got"):
        rank_levels(score, score, score, codes=(0, 1, 2, 16))
    with pytest.raises(ValueError, match="out: expected int8"):
        rank_levels(score, score, score, out=torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match="fp32, not"):
        rank_levels(score.double(), score, score, backend="triton")
