"""What kernels in Gluon share: names that changed from Triton 3.6 to 3.9, an order of writes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""A box of a tensor descriptor into shared memory, by TMA."""
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""All threads of a program wait for each other, or in a group of warps all of the group."""


@gluon.jit
def before_hand_over():
    """What was written into shared memory is there before ``warp_specialize`` writes to it.

    Arguments are handed over in shared memory, perhaps where a buffer lay that no group of warps
    uses. Without this, a warp that is late in initialising an ``mbarrier`` there writes over them:
    seen on an H200 with Triton 3.6, as reads from the number that such a barrier holds.
    """
    barrier()
