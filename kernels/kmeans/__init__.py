"""Euclidean k-means of every head's tokens."""

from dit_accel.kernels.kmeans.api import kmeans
from dit_accel.kernels.kmeans.bisection import bisected

__all__ = ["bisected", "kmeans"]
