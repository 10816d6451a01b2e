"""Every kernel compiles for every architecture, without a GPU, and hardly spills on Hopper."""

import os
import subprocess
import sys

import pytest

from dit_accel.kernels.specimen import ARCHITECTURES, overwritten

pytest.importorskip("triton")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture):
    # a process of its own: in this one Triton interprets
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "dit_accel.kernels.specimen", "--arch", str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    rows = [line.split() for line in run.stdout.splitlines()[1:]]
    assert len(rows) >= 1
    if architecture == 90:
        # bytes a thread: some registers, not a tile (a row of 128 accumulators has 256)
        assert [row for row in rows if int(row[-2]) > 200] == []


def test_a_barrier_whose_memory_is_given_away_is_found():
    ptx = """
	add.s32 	%r4, %r9, 128;
	@%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
	add.s32 	%r5, %r9, 136;
	@%p1 mbarrier.init.shared::cta.b64 [%r5], 2;
	st.shared.v2.b32 	[global_smem+144], {%r1, %r2};
	st.shared.b64 	[global_smem+136], %rd1;
"""
    assert overwritten(ptx) == [136]
    assert overwritten(ptx.replace("+136", "+152")) == []
