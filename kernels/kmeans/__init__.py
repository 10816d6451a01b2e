"""Euclidean k-means of every head's tokens."""

from dit_accel.kernels.kmeans.api import kmeans

__all__ = ["kmeans"]
