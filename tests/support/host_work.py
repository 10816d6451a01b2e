"""Counts what one call of a method has a Hopper GPU do, without one: prints JSON.

    TRITON_INTERPRET=0 python tests/support/host_work.py METHOD

Tensors have no memory, and kernels are counted in place of being launched. Of torch's operations
those are counted that would launch something: neither allocations nor views.
"""

import collections
import importlib
import json
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from dit_accel import presets
from dit_accel.kernels import launch
from dit_accel.state import State
from dit_accel.types import Context, Geometry

METHODS = {
    "pisa": lambda: presets.pisa(density=0.15),
    "moment": lambda: presets.pisa(density=0.15, rest="moment"),
    "flashblock": lambda: presets.flashblock(inner="pisa", density=0.15),
    "psa": lambda: presets.psa(mode="topk", ratios=(0.05, 0.15, 0.25, 0.45)),
    "psa, thresholds": lambda: presets.psa(),
    "svg_ear": lambda: presets.svg_ear(density=0.22),
    "vmoba": lambda: presets.vmoba(),
}
_FREE = {"empty", "new_empty", "view", "alias", "expand", "squeeze", "unsqueeze", "select", "slice"}
_FREE |= {
    "unbind",
    "split_with_sizes",
    "detach",
    "permute",
    "transpose",
    "as_strided",
    "_unsafe_view",
    "t",
    "mT",
}
_AS_IT_IS = {"to", "contiguous"}
"""Free where there is nothing to be done."""


class Counted(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        made = func(*args, **(kwargs or {}))
        if name not in _FREE and not (name in _AS_IT_IS and made is args[0]):
            self.found[name] += 1
        return made


def pretend():
    """Makes tensors without memory tensors of a Hopper GPU to all operations."""
    importlib.import_module("dit_accel.kernels.block_attention.triton")
    for name, module in list(sys.modules.items()):
        if name.startswith("dit_accel.kernels"):
            for what, answer in (("triton_refusal", None), ("is_hopper", True)):
                if hasattr(module, what):
                    setattr(module, what, lambda *_, answer=answer: answer)
            kernels = ("topk", "pair_count", "label_order", "error_probe", "rank_levels")
            if name.endswith(tuple(f"{kernel}.api" for kernel in kernels)):
                module._refusal = lambda *_: None


def main(name):
    """The counts of a call in the second step."""
    launched = collections.Counter()

    def run(self, *args, grid, **options):
        launched[self.fn.__name__] += 1
        missing = set(self.arg_names[len(args) :]) - set(options)
        assert not missing, f"{self.fn.__name__}: {missing}"

    JITFunction.run = run
    launch._DIRECT = False
    pretend()
    method, state = METHODS[name](), State()
    with torch.inference_mode():
        q, k, v = (
            torch.empty(1, 24, 4608, 128, dtype=torch.bfloat16, device="meta") for _ in range(3)
        )

        def call(step):
            where = Geometry((1, 64, 64), slice(4096, 4608))
            method(q, k, v, Context(where, step=step, num_steps=50, state=state))

        call(0)
        call(1)
        launched.clear()
        with Counted() as torchs:
            call(1)
    print(json.dumps({"kernels": launched, "others": torchs.found}))


main(sys.argv[1])
