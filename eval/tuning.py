"""Find the fastest settings of kernels on this device, and keep what is both faster and right.

A candidate must give what the setting in use gives; labels and choices may differ where numbers
tie. The kernels of all candidates are compiled together before any is timed. The fastest few and
the setting in use are timed once more, in turn, and these times decide: of thirty noisy numbers the
least would mostly be luck.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dit_accel.cluster import KMeans
from dit_accel.eval.kernel_cases import SHAPES, Shape, inputs
from dit_accel.kernels.block_summary import block_mean, block_summary
from dit_accel.kernels.error_probe import error_probe
from dit_accel.kernels.first_use import rehearsal
from dit_accel.kernels.kmeans import kmeans
from dit_accel.kernels.merge import merge
from dit_accel.kernels.token_attention import token_attention
from dit_accel.kernels.tuning import SPACES, Setting, files, overridden, setting
from dit_accel.kernels.tuning.files import FORMAT, Entry, Table
from dit_accel.kernels.tuning.spaces import Kind
from dit_accel.layout import Blocked, Cyclic, Gilbert
from dit_accel.rest import Drop
from dit_accel.token_route import Gate

Call = Callable[[], Any]
Parts = tuple[Tensor, Tensor, Tensor]
LEAST_GAIN = 0.02
"""Share of the time that a setting must save to be taken."""
_FINALISTS, _TURNS = 3, 5
_TIES = 1e-3
"""Share of labels that may differ."""


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one kernel at one shape.

    Attributes:
        op, shape, tokens, head_dim, dtype: of what; ``tokens`` is the end of its range.
        before, after: settings in use and from now on.
        before_ms, after_ms, default_ms: what a call takes with them, and with the default.
        tried, failed, wrong: candidates in all, that did not run, and that gave something else.
    """

    op: str
    shape: str
    tokens: int
    head_dim: int
    dtype: Kind
    before: Setting
    after: Setting
    before_ms: float
    after_ms: float
    default_ms: float
    tried: int
    failed: int
    wrong: int

    def entry(self) -> Entry:
        """As a file has it."""
        return Entry(
            op=self.op,
            head_dim=self.head_dim,
            dtype=self.dtype,
            tokens=self.tokens,
            setting=dict(self.after.values),
            ms=round(self.after_ms, 4),
            default_ms=round(self.default_ms, 4),
        )


def bucket(tokens: int) -> int:
    """The end of the range that a length stands for: the next power of two.

    >>> bucket(32760), bucket(4096)
    (32768, 4096)
    """
    return 1 << max(0, tokens - 1).bit_length()


# -- problems -------------------------------------------------------------------------------------


def _merge(shape: Shape, parts: Parts) -> Call:
    q, k, v = parts
    lse, other = q.float().mean(-1), k.float().mean(-1)
    return lambda: merge(q, lse, v, other, backend="triton")


def _mean(shape: Shape, parts: Parts) -> Call:
    blocks = KMeans(first_iterations=2)(*parts, shape.context)
    q, order = blocks.q, blocks.queries
    summary = _summary(blocks, cov=False)

    def call() -> list[Tensor]:
        means = block_mean(q, perm=order.perm, offsets=order.offsets, backend="triton")
        return [means, *summary()]

    return call


def _cov(shape: Shape, parts: Parts) -> Call:
    return _summary(KMeans(first_iterations=2)(*parts, shape.context), cov=True)


def _summary(blocks: Blocked, *, cov: bool) -> Callable[[], list[Tensor]]:
    """Of clusters: blocks of a known length go through kernels that have no settings."""
    k, v, order = blocks.k, blocks.v, blocks.keys

    def call() -> list[Tensor]:
        made = block_summary(
            k,
            v,
            perm=order.perm,
            offsets=order.offsets,
            num_video=order.num_video,
            k_var=cov,
            cov=cov,
            backend="triton",
        )
        found = (made.k_mean, made.v_mean, made.k_var, made.cov_sum, made.cov_norm)
        return [one for one in found if one is not None]

    return call


def _clusters(shape: Shape, parts: Parts) -> tuple[Tensor, int, Tensor]:
    video = shape.tokens - shape.text
    x = parts[1][:, :, :video]
    count = max(2, round(video / 75.6))
    return x, count, kmeans(x, count, iterations=1, backend="triton")[1]


def _assign(shape: Shape, parts: Parts) -> Call:
    x, count, start = _clusters(shape, parts)
    return lambda: kmeans(x, count, iterations=0, start=start, backend="triton")[0]


def _update(shape: Shape, parts: Parts) -> Call:
    from dit_accel.kernels.kmeans.clusters import Clusters
    from dit_accel.kernels.kmeans.triton import update_means

    x, count, start = _clusters(shape, parts)
    state = Clusters(x, count, 1, start, None, 0)
    state.labels.copy_(kmeans(x, count, iterations=0, start=start, backend="triton")[0])

    def call() -> Tensor:
        update_means(x, state, 1)
        return state.exact.clone()

    return call


def _probe(shape: Shape, parts: Parts) -> Call:
    blocks = Gilbert(64, 256)(*parts, shape.context)
    columns = blocks.keys.num_video
    queries = blocks.query_mean()[:, :, : blocks.queries.num_video].contiguous()
    means = blocks.summary().k_mean[:, :, :columns]
    weight = (queries @ means.mT * blocks.scale).contiguous()

    def call() -> Tensor:
        return error_probe(
            queries,
            blocks.k,
            weight,
            perm=blocks.keys.perm,
            offsets=blocks.keys.offsets,
            num_blocks=columns,
            scale=blocks.scale,
            backend="triton",
        )

    return call


def _tokens(shape: Shape, parts: Parts) -> Call:
    blocks = Cyclic()(*parts, shape.context)
    select = Gate()(blocks, Drop(), shape.context).chosen

    def call() -> tuple[Tensor, Tensor]:
        return token_attention(
            blocks.q,
            blocks.k,
            blocks.v,
            select,
            k_perm=blocks.keys.perm,
            k_offsets=blocks.keys.offsets,
            backend="triton",
        )

    return call


PROBLEMS: Mapping[str, Callable[[Shape, Parts], Call]] = {
    "merge": _merge,
    "block_summary.mean": _mean,
    "block_summary.cov": _cov,
    "error_probe": _probe,
    "kmeans.assign": _assign,
    "kmeans.update": _update,
    "token_attention": _tokens,
}
"""A call of every kernel that can be tuned; one for each of `SPACES`."""


# -- the search -----------------------------------------------------------------------------------


def agrees(got: Any, wanted: Any) -> bool:
    """Whether results are the same but for the order of sums, and labels but for ties.

    Floats may differ by twice the rounding of their dtype, relative to the largest; of fp32, in
    which sums of 16-bit numbers are kept, by 2**-13.
    """
    pairs = zip(_tensors(got), _tensors(wanted), strict=True)
    for new, old in pairs:
        if not old.is_floating_point():
            if float((new != old).double().mean()) > _TIES:
                return False
            continue
        finite, bound = old.isfinite(), max(2 * torch.finfo(old.dtype).eps, 2**-13)
        if not torch.equal(new.isfinite(), finite):
            return False
        new, old = (torch.where(finite, x, 0.0).double() for x in (new, old))
        if old.numel() and not float((new - old).abs().amax()) <= bound * float(old.abs().amax()):
            return False
    return True


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def search(
    op: str,
    name: str,
    shape: Shape,
    parts: Parts,
    timer: Callable[[Call], float],
    *,
    compile_together: bool = True,
) -> Found | None:
    """The fastest setting of a kernel that is right; ``None`` where none is looked at.

    Args:
        op: of `PROBLEMS`.
        name, shape, parts: the shape and its queries, keys and values.
        timer: milliseconds of a call.
        compile_together: before anything is timed; otherwise kernels are compiled in turn.
    """
    like, tokens = parts[0], parts[0].shape[2]
    kind: Kind = "half" if like.dtype.itemsize <= 2 else "float"
    space, before = SPACES[op], setting(op, like, tokens)
    call = PROBLEMS[op](shape, parts)
    with overridden(op, before) as asked:
        wanted = call()
    if not asked:
        return None
    candidates = [one for one in space.candidates(kind) if one != before]
    if compile_together:
        _compile(op, call, candidates)

    def timed(candidate: Setting) -> float:
        with overridden(op, candidate):
            return timer(call)

    times: dict[int, float] = {}
    failed = wrong = 0
    for place, candidate in enumerate(candidates):
        with overridden(op, candidate):
            try:
                right = agrees(call(), wanted)
            except Exception:  # too large for the device, or not compiled
                failed += 1
                continue
        if right:
            times[place] = timed(candidate)
        else:
            wrong += 1
    # the default is told beside whatever wins
    default = space.default(kind)
    fastest = [candidates[place] for place in sorted(times, key=times.__getitem__)]
    finalists = fastest[:_FINALISTS]
    told = [one for one in fastest[_FINALISTS:] if one == default]
    turns = [[timed(one) for one in (before, *finalists, *told)] for _ in range(_TURNS)]
    before_ms, *others = (median(column) for column in zip(*turns, strict=True))
    took = dict(zip(map(str, (*finalists, *told)), others, strict=True))
    after, after_ms = before, before_ms
    for one in finalists:
        if took[str(one)] < min(after_ms, before_ms * (1 - LEAST_GAIN)):
            after, after_ms = one, took[str(one)]
    default_ms = before_ms if before == default else took.get(str(default), float("nan"))
    where = op, name, bucket(tokens), like.shape[-1], kind
    counts = len(candidates), failed, wrong
    return Found(*where, before, after, before_ms, after_ms, default_ms, *counts)


def _compile(op: str, call: Call, candidates: Sequence[Setting]) -> None:
    with rehearsal():
        for candidate in candidates:
            # what does not run says so when it is tried
            with contextlib.suppress(Exception), overridden(op, candidate):
                call()


def run(
    ops: Sequence[str],
    shapes: Sequence[str],
    *,
    dtype: torch.dtype,
    device: str,
    timer: Callable[[Call], float],
    compile_together: bool = True,
) -> Iterator[tuple[str, str, Found | None]]:
    """Search for every operation at every shape: operation, shape and result, one at a time."""
    for name in shapes:
        shape = SHAPES[name]
        parts = inputs(shape, dtype, device)
        for op in ops:
            found = search(op, name, shape, parts, timer, compile_together=compile_together)
            yield op, name, found


def table_of(found: Sequence[Found], architecture: int, device: str) -> Table:
    """A file's content. Of shapes within one range the longest counts, given last."""
    entries = {(*one.entry().key, one.tokens): one.entry() for one in found}
    versions = {name: _version(name) for name in ("torch", "triton")}
    return Table(
        format=FORMAT,
        architecture=architecture,
        device=device,
        versions=versions,
        entries=tuple(entries[key] for key in sorted(entries)),
    )


def keep(found: Sequence[Found], architecture: int, device: str, path: Any = None) -> Any:
    """Write what was found, beside what the file has of other shapes; its path.

    Args:
        path: of the file; by default the user's own.

    Raises:
        ValueError: there is a file, and it is no table of this architecture.
        OSError: it cannot be written.
    """
    target = path or files.own(architecture)
    before = files.read(target, architecture) if target.exists() else None
    files.write(target, files.merged(before, table_of(found, architecture, device)))
    return target


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def told(found: Found) -> str:
    """A result in one line."""
    changed = f"{found.before} -> {found.after}" if found.after != found.before else "as it was"
    return (
        f"{found.op}, {found.shape}: {found.before_ms:.3f} -> {found.after_ms:.3f} ms, {changed} "
        f"({found.tried} tried, {found.failed} did not run, {found.wrong} wrong)"
    )


def rows(found: Sequence[Found]) -> list[tuple[str, ...]]:
    """Results as a table's lines, the headings first."""
    lines: list[tuple[str, ...]] = [
        ("kernel", "shape", "tokens up to", "default ms", "before ms", "after ms", "setting")
    ]
    for one in found:
        times = (one.default_ms, one.before_ms, one.after_ms)
        lines.append(
            (
                one.op,
                one.shape,
                str(one.tokens),
                *(f"{ms:.3f}" for ms in times),
                str(one.after),
            )
        )
    return lines
