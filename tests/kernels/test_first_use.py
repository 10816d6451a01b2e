"""Kernels of a call compiled together: in processes of their own, where Triton does not interpret,
and with a driver that knows an architecture but no device."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.runtime._async_compile")

DRIVER = """
import threading, torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

class Absent(DriverBase):
    def __init__(self): pass
    @classmethod
    def is_active(cls): return True
    def map_python_to_cpp_type(self, ty): raise NotImplementedError
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")
    def get_benchmarker(self): raise NotImplementedError
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def launcher_cls(self, src, metadata): launchers.append(src.fn.fn.__name__)

driver.set_active(Absent())
compiled, launchers = [], []
knobs.compilation.listener = lambda *, src, **rest: compiled.append(
    (src.fn.fn.__name__, threading.current_thread() is threading.main_thread())
)
from dit_accel.kernels import first_use
from dit_accel.kernels.merge.triton import merge, merge_kernel
from dit_accel.kernels.topk.triton import topk_kernel, topk_mask
from dit_accel.kernels.packed import remembered

out, lse = torch.ones(1, 2, 64, 64), torch.ones(1, 2, 64)
score, wanted = torch.ones(1, 2, 3, 200), torch.full((1, 2), 5)
"""


def run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + code],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_launched_and_all_is_compiled_in_the_background(tmp_path):
    run(
        """
calls = []
def call():
    assert first_use.rehearsing()
    calls.append(1)
    merged, norm = merge(out, lse, out, lse)
    mask = topk_mask(score, wanted)
    assert not merged.any() and not norm.any() and not mask.any(), "zeros stand for results"
    remembered(score, wanted, "poisoned", lambda: mask)

first_use.once("key", call)
first_use.once("key", call)
assert len(calls) == 1
assert sorted(compiled) == [("merge_kernel", False), ("topk_kernel", False)], compiled
for kernel in (merge_kernel, topk_kernel):
    (known,) = kernel.device_caches[0][0].values()
    assert known.asm["cubin"]
assert sorted(launchers) == ["merge_kernel", "topk_kernel"]
assert not first_use.rehearsing()
assert remembered(score, wanted, "poisoned", lambda: "fresh") == "fresh"
# with nothing left to compile the launch itself is reached, which a driver without a device lacks
try:
    merge(out, lse, out, lse)
except Exception:
    pass
else:
    raise SystemExit("expected a launch")
assert len(compiled) == 2
""",
        tmp_path,
    )


def test_what_goes_wrong_leaves_no_trace(tmp_path):
    run(
        """
from triton.runtime.jit import JITFunction
before = JITFunction.run
def call():
    topk_mask(score, wanted)
    raise ZeroDivisionError

first_use.once("key", call)
assert JITFunction.run is before
assert not first_use.rehearsing()
assert torch.empty_like(score).shape == score.shape
assert [name for name, _ in compiled] == ["topk_kernel"]
""",
        tmp_path,
    )


def test_other_threads_launch_meanwhile(tmp_path):
    run(
        """
import time
told = []
def other():
    try:
        merge(out, lse, out, lse)
    except Exception as error:
        told.append(type(error).__name__)

def call():
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()

first_use.once("key", call)
assert told, "expected a launch, which a driver without a device lacks"
assert [name for name, _ in compiled] == ["merge_kernel"]
""",
        tmp_path,
    )


def test_the_first_import_of_a_kernel_may_be_here(tmp_path):
    """As it is in every process; Triton's own launch is what `launch` must take the place of."""
    run(
        """
import sys
from triton.runtime.jit import JITFunction
for name in [one for one in sys.modules if one.startswith("dit_accel.kernels")]:
    if name != "dit_accel.kernels.first_use":
        del sys.modules[name]
with first_use.rehearsal():
    from dit_accel.kernels import launch as launching
assert launching._RUN is JITFunction.run
""",
        tmp_path,
    )
