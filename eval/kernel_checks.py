"""Whether a kernel is right, before anything is timed: against fp64 on small, ragged problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_importance import block_importance
from dit_accel.kernels.error_probe import error_probe
from dit_accel.kernels.kmeans import kmeans
from dit_accel.kernels.token_attention import token_attention
from dit_accel.kernels.token_select import token_select


class IncorrectError(RuntimeError):
    """An operation that is not correct was not timed."""


class Problem:
    """Two batch elements, three heads, an odd length, blocks of every size, some padding."""

    def __init__(self, dtype: torch.dtype, depth: int, device: str, length: int = 1013) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.length = device, length
        shape = (2, 3, length, depth)
        self.q, self.k, self.v = (self.noise(*shape).to(dtype) for _ in range(3))
        perm = torch.rand(2, 3, length, generator=self.generator, device=device).argsort(-1)
        cuts = [0, 0, 64, 65, 192, 192, 400, 431, 439, 700, length - 1, length]
        self.perm = perm
        self.offsets = torch.tensor(cuts, dtype=torch.int32, device=device).view(1, 1, -1)
        self.blocks = len(cuts) - 1
        self.valid = torch.rand(2, length, generator=self.generator, device=device) < 0.9

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def holes(self, x: Tensor) -> Tensor:
        """Padding poisoned with NaN, which must reach no result."""
        return x.masked_fill(~self.valid[:, None, :, None], torch.nan)


def within(name: str, got: Tensor, wanted: Tensor, bound: float) -> None:
    """Raise an IncorrectError unless the largest error is within a bound."""
    worst = float((got.double() - wanted.double()).abs().max())
    if not worst <= bound:
        raise IncorrectError(f"{name}: expected an error of at most {bound:.2g}, got {worst:.2g}")


def check_error_probe(dtype: torch.dtype, depth: int, device: str) -> None:
    """Logits as in fp32, though the keys have 16 bits."""
    for padded in (False, True):
        p = Problem(dtype, depth, device)
        queries, weight = p.noise(2, 3, 77, depth), 2 * p.noise(2, 3, 77, p.blocks)
        k = p.holes(p.k) if padded else p.k
        options: dict[str, Any] = {
            "perm": p.perm,
            "offsets": p.offsets,
            "num_blocks": p.blocks,
            "scale": depth**-0.5,
            "key_valid": p.valid if padded else None,
        }
        got = error_probe(queries, k, weight, **options)
        exact = error_probe(
            queries.double(), k.double(), weight.double(), backend="reference", **options
        )
        # two numbers of 8 bits make 16: an error of 2**-17 of logits of up to 5 or so, a block over
        within("error_probe", got, exact, 2e-4 * float(exact.max()))


def check_kmeans(dtype: torch.dtype, depth: int, device: str) -> None:
    """Means of the labels before, labels of the nearest rounded centroid, the same every time."""
    backends = ["auto"]
    try:
        kmeans(Problem(dtype, depth, device).q, 3, iterations=0, backend="flash_kmeans")
        backends.append("flash_kmeans")
    except ValueError:
        pass  # not installed
    # more than one part of a head for every multiprocessor
    p = Problem(dtype, depth, device, length=6007)
    for backend in backends:
        for x, valid in ((p.q, None), (p.holes(p.q), p.valid)):
            options: dict[str, Any] = {"valid": valid, "seed": 3, "backend": backend}
            before, _ = kmeans(x, 37, iterations=1, **options)
            labels, centroids = kmeans(x, 37, iterations=2, **options)
            again, same = kmeans(x, 37, iterations=2, **options)
            if not (torch.equal(labels, again) and torch.equal(centroids, same)):
                raise IncorrectError(f"kmeans {backend}: expected the same result twice")
            counts = torch.ones_like(p.valid) if valid is None else valid
            rows = p.q.double()
            member = F.one_hot(before.long(), 37).double() * counts[:, None, :, None]
            number = member.sum(2).unsqueeze(-1)
            mean = member.mT @ rows / number.clamp(min=1)
            mean = torch.where(number > 0, mean, centroids.double())
            within(f"kmeans {backend} centroids", centroids, mean, 1e-4)
            distance = torch.cdist(rows, centroids.to(dtype).double())
            got = distance.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            off = ((got - distance.amin(-1)) * counts[:, None]).max()
            within(f"kmeans {backend} distances", off, torch.zeros_like(off), 1e-3)


def check_block_importance(dtype: torch.dtype, depth: int, device: str) -> None:
    """Sums of shares, which are kept in fp16 where inputs are of 16 bits."""
    p = Problem(dtype, depth, device)
    options: dict[str, Any] = {
        "q_tokens": p.perm[..., :501],
        "q_bounds": p.offsets[..., :9],
        "k_tokens": p.perm.flip(-1),
        "k_bounds": p.offsets,
        "scale": depth**-0.5,
    }
    got = block_importance(p.q, p.k, **options)
    exact = block_importance(p.q.double(), p.k.double(), backend="reference", **options)
    within("block_importance", got, exact, (1e-4 + 2**-11) * float(exact.max()))


def check_gate(dtype: torch.dtype, depth: int, device: str) -> None:
    """The pairs that sorting in fp64 selects, but for some whose gates fp32 cannot tell apart."""
    p = Problem(dtype, depth, device)
    mean = p.noise(2, 3, 130, depth)
    own = (torch.rand(2, 3, p.length, generator=p.generator, device=device) * 120).long()
    full = torch.rand(2, 1, 130, generator=p.generator, device=device) < 0.9
    for mode in ("threshold", "topk"):
        options: dict[str, Any] = {
            "num_video": 127,
            "text_span": (1000, p.length),
            "threshold": 0.25,
            "mode": mode,
        }
        got = token_select(p.q, mean, own, full, **options).select()
        exact = token_select(
            p.q.double(), mean.double(), own, full, backend="reference", **options
        ).select()
        differs = got != exact
        if int(differs.sum()) > 2 * 6:
            raise IncorrectError(f"gate: expected fp64's choice, got {int(differs.sum())} others")
        whole, means = p.q.round(), mean.round()
        got = token_select(whole, means, own, full, **options).select()
        exact = token_select(
            whole.double(), means.double(), own, full, backend="reference", **options
        ).select()
        if not torch.equal(got, exact):
            raise IncorrectError("gate: expected the first among equals to be selected")


def check_token_attention(dtype: torch.dtype, depth: int, device: str) -> None:
    """At most twice the error of torch's own attention in this dtype, under the same mask."""
    p = Problem(dtype, depth, device)
    select = torch.rand(2, 3, p.length, p.blocks, generator=p.generator, device=device) < 0.3
    select[0, 0, 5] = False
    select[1, 2] = True
    bounds = p.offsets[..., 1:].long().expand(2, 3, -1).contiguous()
    place = torch.arange(p.length, device=device).expand(2, 3, -1).contiguous()
    block = torch.empty_like(p.perm)
    block.scatter_(-1, p.perm, torch.searchsorted(bounds, place, right=True))
    for padded in (False, True):
        k, v = (p.holes(p.k), p.holes(p.v)) if padded else (p.k, p.v)
        out, lse = token_attention(
            p.q,
            k,
            v,
            select,
            k_perm=p.perm,
            k_offsets=p.offsets,
            key_valid=p.valid if padded else None,
        )
        mask = select.gather(-1, block.unsqueeze(-2).expand(-1, -1, p.length, -1))
        if padded:
            mask = mask & p.valid[:, None, None]
        some = mask.any(-1, keepdim=True)
        logits = (p.q.double() @ p.k.double().mT * depth**-0.5).masked_fill(~mask, -torch.inf)
        exact = torch.where(some, logits.softmax(-1), 0.0) @ p.v.double()
        plain = F.scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=mask | ~some)
        error = float(((plain - exact) * some).abs().max())
        within("token_attention", out, exact, 2 * error + 4 * torch.finfo(torch.float32).eps)
        wanted = logits.logsumexp(-1)
        if not torch.equal(lse == -torch.inf, ~some.squeeze(-1)):
            raise IncorrectError("token_attention lse: expected -inf where nothing is selected")
        within("token_attention lse", lse[some[..., 0]], wanted[some[..., 0]], 1e-3)


CHECKS: dict[str, Callable[[torch.dtype, int, str], None]] = {
    "error_probe": check_error_probe,
    "kmeans": check_kmeans,
    "block_importance": check_block_importance,
    "gate": check_gate,
    "token_attention": check_token_attention,
}
"""Checks by operation, for a dtype, a head size and a device."""
