"""Root mean square norm and rotary embedding of queries and keys, streams joined."""

from dit_accel.kernels.norm_rotary.api import Stream, norm_rotary, refusal

__all__ = ["Stream", "norm_rotary", "refusal"]
