"""A method that notes where it was called."""

from dit_accel import Method, Schedule
from dit_accel.layout import LAYOUTS
from dit_accel.rest import Centroid
from dit_accel.route import PooledScore


class Spy:
    """A route; ``seen`` has step, number of steps, layer, branch and geometry of every call."""

    needs = ()

    def __init__(self):
        self.seen = []
        self.inner = PooledScore(density=0.3, bias=False)

    def __call__(self, blocked, rest, ctx):
        self.seen.append((ctx.step, ctx.num_steps, ctx.layer, ctx.branch, ctx.geometry))
        return self.inner(blocked, rest, ctx)


def spying(**schedule):
    """Blocks of four in the model's order, and a `Spy`."""
    return Method(LAYOUTS["raster"](4), Spy(), Centroid(), Schedule(**schedule), name="spy")
