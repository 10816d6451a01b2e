"""Root mean square norm and rotary embedding of queries and keys, streams joined."""

from dit_accel.kernels.norm_rotary.api import KNOWN, Stream, norm_rotary, refusal

__all__ = ["KNOWN", "Stream", "norm_rotary", "refusal"]
