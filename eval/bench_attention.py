"""One attention call, sparse against dense, in the same run.

Dense is torch's `F.scaled_dot_product_attention`. The two are timed in turn, so that whatever else
the machine does meets both, and what counts is the median of the paired ratios. Nothing is timed
before it was found correct.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import dit_accel
from dit_accel import presets
from dit_accel.errors import InputError
from dit_accel.eval.peak_memory import cuda_peak, in_new_process, resident_peak
from dit_accel.kernels.dense_attention import dense_attention
from dit_accel.method import Method

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class IncorrectError(RuntimeError):
    """A method that is not correct was not timed."""


@dataclass(frozen=True, slots=True)
class AttentionBench:
    """What was measured.

    Attributes:
        method, options: the preset and its effective options.
        grid, tokens, heads, head_dim, dtype, device, threads, torch_version: the problem.
        density: pairs computed exactly over all pairs, measured.
        dense_ms, sparse_ms: milliseconds of each repeat, in the order they were taken, in pairs.
        ratio: median over the pairs of sparse time over dense time.
        error: relative error of the sparse output to the dense one, Frobenius norms.
        dense_peak_bytes, sparse_peak_bytes: memory at the peak of one call beyond what was there
            before it, outputs included; ``None`` where it cannot be measured.
    """

    method: str
    options: dict[str, str]
    grid: tuple[int, int, int]
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    device: str
    threads: int
    torch_version: str
    density: float
    dense_ms: tuple[float, ...]
    sparse_ms: tuple[float, ...]
    ratio: float
    error: float
    dense_peak_bytes: int | None
    sparse_peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def grid_of(tokens: int) -> tuple[int, int, int]:
    """The grid of so many cells that is nearest to a cube, frames the shortest side.

    >>> grid_of(16384), grid_of(7)
    ((16, 32, 32), (1, 1, 7))
    """
    best = (1, 1, tokens)
    for frames in range(1, int(tokens ** (1 / 3)) + 2):
        if tokens % frames:
            continue
        plane = tokens // frames
        rows = next(n for n in range(int(plane**0.5), 0, -1) if plane % n == 0)
        grid = (frames, rows, plane // rows)
        if frames <= rows and sum(grid) < sum(best):
            best = grid
    return best


def structured_inputs(
    grid: tuple[int, int, int],
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that attend as video does: near tokens alike, heads all different.

    Random waves over the grid, of a few cells' length, and some noise.

    Returns:
        q, k, v: ``[1, H, L, D]``.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
    length = place.shape[0]

    def field(share: float, waves: Tensor, phases: Tensor) -> Tensor:
        smooth = (place @ waves + phases.unsqueeze(1)).sin_()
        return smooth.add_(torch.randn(heads, length, head_dim, generator=generator), alpha=share)

    waves = torch.randn(heads, 3, head_dim, generator=generator) * 3
    phases = torch.rand(heads, head_dim, generator=generator) * 6.28
    made = [
        field(0.3, waves, phases).mul_(1.6),
        field(0.3, waves, phases).mul_(1.6),
        field(0.3, torch.randn(heads, 3, head_dim, generator=generator) * 3, phases),
    ]
    q, k, v = (x.unsqueeze(0).to(device=device, dtype=dtype) for x in made)
    return q, k, v


def check(method: Method, *, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Raise an IncorrectError unless the method is right on a small, ragged problem.

    At full density it must agree with dense attention in fp64, within twice the error that dense
    attention itself makes in ``dtype``; as it is, its fp64 output must agree with itself in
    ``dtype`` where the plan is the same, and hold no NaN.
    """
    grid = (5, 9, 13)
    q, k, v = structured_inputs(grid, 2, head_dim, dtype=dtype, device=device, seed=1)
    exact = dense_attention(q.double(), k.double(), v.double())
    bound = 2 * float((dense_attention(q, k, v) - exact).abs().max()) + 4 * torch.finfo(dtype).eps
    if "density" in method.options:
        every = {**method.options, "density": 1.0, "route": "everything"}
        every = {name: value for name, value in every.items() if name in method.options}
        full = presets.build(method.name, **every)
        worst = float((dit_accel.attention(q, k, v, full, grid=grid) - exact).abs().max())
        if not worst <= bound:
            raise IncorrectError(
                f"{method.name}: at full density expected dense attention within {bound:.2g}, "
                f"got an error of {worst:.2g}; not timed"
            )
    out = dit_accel.attention(q, k, v, method, grid=grid)
    if not bool(out.isfinite().all()):
        raise IncorrectError(f"{method.name}: expected finite output, got NaN or inf; not timed")
    fine = dit_accel.attention(q.double(), k.double(), v.double(), method, grid=grid)
    # rounding may tip a block over the edge of the plan; such rows are few, and not an error
    rows = ((out - fine).abs() > 4 * bound).any(-1).double().mean()
    if float(rows) > 0.1:
        raise IncorrectError(
            f"{method.name}: expected {dtype} to agree with fp64 within {4 * bound:.2g}, got "
            f"{float(rows):.0%} of the rows outside; not timed"
        )


def run(
    tokens: int = 16384,
    heads: int = 4,
    head_dim: int = 64,
    density: float | None = 0.15,
    method: str = "pisa",
    repeats: int = 5,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    memory: bool = True,
) -> AttentionBench:
    """Time one attention call, sparse and dense in turn.

    Args:
        tokens: video tokens; the grid is the one nearest to a cube.
        heads, head_dim: ``H`` and ``D``; the batch is 1.
        density: of the method, if it has that option; ``None`` for its default.
        method: name of a preset.
        repeats: timed pairs, after one that is not.
        threads: torch's threads during the run; as they are by default.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: one of `DTYPES`.
        seed: of the inputs.
        options: further options of the preset.
        memory: also measure memory, which runs every call once more; on a CPU in a new process.

    Raises:
        InputError: an argument does not fit.
        IncorrectError: the method is wrong on a small problem.
    """
    for name, value in (
        ("tokens", tokens),
        ("heads", heads),
        ("head_dim", head_dim),
        ("repeats", repeats),
        ("threads", 1 if threads is None else threads),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: expected a positive integer, got {value!r}")
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: expected one that is here, got {device!r} without CUDA")
    given = dict(options or {})
    if density is not None and "density" in presets.get(method).options:
        given.setdefault("density", density)
    chosen = presets.build(method, **given)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _run(
            chosen, given, grid_of(tokens), heads, head_dim, repeats, device, dtype, seed, memory
        )
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _run(
    method: Method,
    given: dict[str, Any],
    grid: tuple[int, int, int],
    heads: int,
    head_dim: int,
    repeats: int,
    device: str,
    dtype: str,
    seed: int,
    memory: bool,
) -> AttentionBench:
    check(method, head_dim=head_dim, dtype=DTYPES[dtype], device=device)
    q, k, v = structured_inputs(
        grid, heads, head_dim, dtype=DTYPES[dtype], device=device, seed=seed
    )

    def dense() -> Tensor:
        return dense_attention(q, k, v)

    def sparse() -> Tensor:
        return dit_accel.attention(q, k, v, method, grid=grid)

    reference = dense().double()
    got, report = dit_accel.attention(q, k, v, method, grid=grid, return_report=True)
    error = float((got.double() - reference).norm() / reference.norm())
    del reference, got

    dense_ms: list[float] = []
    sparse_ms: list[float] = []
    for i in range(repeats):
        # whoever goes first finds the other's leavings in the caches: take turns
        for call, times in ((dense, dense_ms), (sparse, sparse_ms))[:: 1 if i % 2 else -1]:
            times.append(_milliseconds(call, device))
    peaks: dict[str, int | None] = {"dense": None, "sparse": None}
    if memory and device.startswith("cuda"):
        peaks = {"dense": cuda_peak(dense), "sparse": cuda_peak(sparse)}
    elif memory:
        text = {name: str(value) for name, value in given.items()}
        for which, name, chosen in (("dense", "dense", {}), ("sparse", method.name, text)):
            peaks[which] = in_new_process(
                __name__,
                resident_peak_of.__name__,
                *(name, chosen, grid, heads, head_dim, dtype, seed, torch.get_num_threads()),
            )
    return AttentionBench(
        method=method.name,
        options={name: str(value) for name, value in method.options.items()},
        grid=grid,
        tokens=grid[0] * grid[1] * grid[2],
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.cuda.get_device_name() if device.startswith("cuda") else device,
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        density=report.density,
        dense_ms=tuple(dense_ms),
        sparse_ms=tuple(sparse_ms),
        ratio=median(s / d for s, d in zip(sparse_ms, dense_ms, strict=True)),
        error=error,
        dense_peak_bytes=peaks["dense"],
        sparse_peak_bytes=peaks["sparse"],
    )


def _milliseconds(call: Callable[[], Tensor], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def resident_peak_of(
    name: str,
    options: dict[str, str],
    grid: tuple[int, int, int],
    heads: int,
    head_dim: int,
    dtype: str,
    seed: int,
    threads: int,
) -> int | None:
    """Resident peak of one call of a preset, with options as text, in this process."""
    torch.set_num_threads(threads)
    parsed = {key: presets.parse_option(name, key, text) for key, text in options.items()}
    method = presets.build(name, **parsed)
    small = structured_inputs((4, 8, 8), heads, head_dim, dtype=DTYPES[dtype])
    dit_accel.attention(*small, method, grid=(4, 8, 8))  # code, threads and libraries are loaded
    frames, rows, columns = grid
    inputs = structured_inputs(
        (frames, rows, columns), heads, head_dim, dtype=DTYPES[dtype], seed=seed
    )
    return resident_peak(lambda: dit_accel.attention(*inputs, method, grid=(frames, rows, columns)))


def render(result: AttentionBench) -> Table:
    """The result as a table."""
    where = (
        f"{result.device}, {result.threads} threads" if result.device == "cpu" else result.device
    )
    table = Table(
        title=f"{result.method} on {result.tokens:,} tokens ({'x'.join(map(str, result.grid))}), "
        f"{result.heads} heads of {result.head_dim}, {result.dtype}, {where}"
    )
    for heading in ("", "density", "median ms", "fastest ms", "time / dense", "peak extra MiB"):
        table.add_column(heading, justify="left" if not heading else "right")

    def mebibytes(count: int | None) -> str:
        return "n/a" if count is None else f"{count / 2**20:.0f}"

    for name, density, times, ratio, peak in (
        ("dense", 1.0, result.dense_ms, 1.0, result.dense_peak_bytes),
        (result.method, result.density, result.sparse_ms, result.ratio, result.sparse_peak_bytes),
    ):
        table.add_row(
            name,
            f"{density:.3f}",
            f"{median(times):.1f}",
            f"{min(times):.1f}",
            f"{ratio:.3f}",
            mebibytes(peak),
        )
    table.caption = (
        f"median of {len(result.dense_ms)} paired, interleaved runs; relative error to dense "
        f"{result.error:.3g}; torch {result.torch_version}"
    )
    return table
