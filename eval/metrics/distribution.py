"""Distances between sets of clips, in the space of a network's features."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import InputError


def frechet(one: Tensor, other: Tensor) -> float:
    """FID: the Fréchet distance of two Gaussians fitted to features (Heusel et al. 2017).

    ``‖m₁ - m₂‖² + tr(S₁ + S₂ - 2 (S₁S₂)^½)``, in fp64, covariances over ``N - 1``. The trace of
    the root is the sum of the roots of the eigenvalues of ``S₁^½ S₂ S₁^½``, which is symmetric, so
    that nothing complex comes up where the covariances are singular.

    Args:
        one, other: features ``[N, D]`` and ``[M, D]``, at least two of each.

    Raises:
        InputError: they do not fit.
    """
    _check(one, other)
    (m1, s1), (m2, s2) = _moments(one), _moments(other)
    return frechet_of_moments(m1, s1, m2, s2)


def frechet_of_moments(m1: Tensor, s1: Tensor, m2: Tensor, s2: Tensor) -> float:
    """The same of means ``[D]`` and covariances ``[D, D]``."""
    values, vectors = torch.linalg.eigh(s1.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    between = torch.linalg.eigvalsh(root @ s2.double() @ root).clamp(min=0).sqrt().sum()
    apart = (m1.double() - m2.double()).square().sum()
    return float(apart + s1.double().trace() + s2.double().trace() - 2 * between)


def kernel_distance(one: Tensor, other: Tensor, *, paired: bool = False) -> float:
    """KID: unbiased squared MMD with the kernel ``(x·y / D + 1)³`` (Bińkowski et al. 2018).

    Of all samples at once, not of subsets; it may be below zero. In fp64.

    Args:
        one, other: features ``[N, D]`` and ``[M, D]``, at least two of each.
        paired: row ``i`` of both was made from the same prompt and seed. Such pairs are left out
            then, as in Gretton et al. 2012 (equation 4), since their likeness says nothing of the
            distributions; equal sets are at distance 0.

    Raises:
        InputError: they do not fit.
    """
    _check(one, other)
    x, y = one.double(), other.double()
    if paired and len(x) != len(y):
        raise InputError(f"features: expected as many of both, got {len(x)} and {len(y)}")
    within = sum(_off_diagonal_mean(_kernel(z, z)) for z in (x, y))
    between = _kernel(x, y)
    return float(within - 2 * (_off_diagonal_mean(between) if paired else between.mean()))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    count = kernel.shape[0]
    return (kernel.sum() - kernel.trace()) / (count * (count - 1))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    given = features.double()
    return given.mean(0), torch.cov(given.T).reshape(given.shape[1], given.shape[1])


def _check(one: Tensor, other: Tensor) -> None:
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise InputError(
            f"features: expected [N, D] and [M, D], got {list(one.shape)} and {list(other.shape)}"
        )
    if min(len(one), len(other)) < 2:
        raise InputError(
            f"features: expected at least two samples of each, got {len(one)} and {len(other)}"
        )
