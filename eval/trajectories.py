"""Whole generations by a method beside the dense one, to see where an error comes from.

Every method generates twice from the same noise. *Freely*, as always: what counts in the end.
*Forced*: after every step the latents are put back on the dense trajectory, so that each step's
prediction differs from the dense one by that step's own error and nothing else. Between the two
stands everything that the trajectory does to errors: adding up, and amplifying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.eval.metrics.fidelity import psnr, ssim
from dit_accel.pipelines.families import models_of
from dit_accel.pipelines.generate import Generation, generate
from dit_accel.pipelines.request import Request


@dataclass(frozen=True, slots=True)
class Path:
    """The course of one generation.

    Attributes:
        frames: ``[T, 3, H, W]`` in [0, 1].
        latents: fp32 ``[S, ...]``, after every step.
        outputs: fp32 ``[S, G, ...]``, what the transformer predicted, by guidance branch, the
            conditional one first.
        sigmas: ``[S + 1]`` noise levels of the scheduler; ``None`` where it has none.
        density: measured.
    """

    frames: Tensor
    latents: Tensor
    outputs: Tensor
    sigmas: Tensor | None
    density: float | None

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the density, for a safetensors file."""
        kept = {"frames": self.frames, "latents": self.latents, "outputs": self.outputs}
        return kept if self.sigmas is None else {**kept, "sigmas": self.sigmas}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], density: float | None) -> Path:
        """The inverse of `tensors`."""
        return cls(
            tensors["frames"],
            tensors["latents"],
            tensors["outputs"],
            tensors.get("sigmas"),
            density,
        )


Runner = Callable[[Callable[[int, Tensor], Tensor | None]], Generation]


def follow(pipe: Any, run: Runner, *, forced: Tensor | None = None) -> Path:
    """Note the course of a generation.

    Args:
        pipe: with a method on it.
        run: generates, given an ``on_latents``.
        forced: latents ``[S, ...]`` that take the place of those made, step by step.
    """
    latents: list[Tensor] = []
    outputs: list[list[Tensor]] = [[]]

    def see(module: Any, args: Any, output: Any) -> None:
        sample = output[0] if isinstance(output, tuple) else output.sample
        outputs[-1].append(sample.float().cpu())

    def step(number: int, made: Tensor) -> Tensor | None:
        latents.append(made.float().cpu())
        outputs.append([])
        return None if forced is None else forced[number].to(made)

    handles = [model.register_forward_hook(see) for model in models_of(pipe).values()]
    try:
        made = run(step)
    finally:
        for handle in handles:
            handle.remove()
    sigmas = getattr(pipe.scheduler, "sigmas", None)
    return Path(
        made.frames,
        torch.stack(latents),
        torch.stack([torch.stack(branches) for branches in outputs[: len(latents)]]),
        None if sigmas is None else torch.as_tensor(sigmas).float().cpu(),
        made.density,
    )


def runner(pipe: Any, request: Request) -> Runner:
    """What `follow` runs."""
    return lambda on_latents: generate(pipe, request, on_latents=on_latents)


@dataclass(frozen=True, slots=True)
class Course:
    """One method's generation of one prompt beside the dense one.

    All errors are relative L2. The chain from first to last: ``branch`` (what the model predicts on
    the dense trajectory, guidance branches by themselves), ``guided`` (with guidance), ``added``
    (these added up over the steps, as vectors), ``latent`` (where the free generation ends), and
    ``psnr``.

    Attributes:
        density: of the free generation.
        branch: root mean square over steps and branches.
        guided: root mean square over the steps.
        added: ``‖Σ dσ_s δ_s‖`` over the norm of the dense end, for guided errors ``δ_s``; ``None``
            without noise levels.
        latent: at the end of the free generation.
        psnr, ssim: of its frames to the dense ones.
        branch_cosine: between the two branches' prediction errors, mean over the steps.
        coherence: ``‖Σ dσ δ‖² / Σ ‖dσ δ‖²``: 1 for errors of the steps that know nothing of each
            other, the number of steps for equal ones.
        amplified: ``latent / added``, what the trajectory makes of the errors put into it.
        guided_by_step: prediction error with guidance, on the dense trajectory.
        latent_by_step: of the free generation.
    """

    density: float | None
    branch: float
    guided: float
    added: float | None
    latent: float
    psnr: float
    ssim: float
    branch_cosine: float | None
    coherence: float | None
    amplified: float | None
    guided_by_step: tuple[float, ...]
    latent_by_step: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def compare(dense: Path, free: Path, forced: Path, guidance: float) -> Course:
    """What a method's two generations say beside the dense one.

    Args:
        dense, free, forced: of the same request.
        guidance: scale of classifier-free guidance, for models with two branches.
    """
    delta = forced.outputs - dense.outputs  # [S, G, ...]
    plain = _norms(delta) / _norms(dense.outputs)
    mixed, truth = with_guidance(delta, guidance), with_guidance(dense.outputs, guidance)
    guided = _norms(mixed, 1) / _norms(truth, 1)
    drift = _norms(free.latents - dense.latents, 1) / _norms(dense.latents, 1)
    cosine = None
    if delta.shape[1] == 2:
        together = (delta[:, 0] * delta[:, 1]).flatten(1).sum(-1)
        both = _norms(delta).prod(-1)
        cosine = float((together / both.clamp(min=1e-30)).mean())
    added = coherence = None
    if dense.sigmas is not None and len(dense.sigmas) == len(mixed) + 1:
        width = dense.sigmas.diff().double().view(-1, *[1] * (mixed.ndim - 1))
        moved = width * mixed
        total, single = float(moved.sum(0).norm()), float(moved.square().sum())
        added = total / float(dense.latents[-1].double().norm())
        coherence = total**2 / single if single else None
    return Course(
        density=free.density,
        branch=float(plain.square().mean().sqrt()),
        guided=float(guided.square().mean().sqrt()),
        added=added,
        latent=float(drift[-1]),
        psnr=psnr(free.frames, dense.frames),
        ssim=ssim(free.frames, dense.frames),
        branch_cosine=cosine,
        coherence=coherence,
        amplified=float(drift[-1]) / added if added else None,
        guided_by_step=tuple(guided.tolist()),
        latent_by_step=tuple(drift.tolist()),
    )


def with_guidance(outputs: Tensor, guidance: float) -> Tensor:
    """``u + g (c − u)`` of ``[S, 2, ...]``, in fp64; of ``[S, 1, ...]`` the one branch."""
    outputs = outputs.double()
    if outputs.shape[1] == 1:
        return outputs[:, 0]
    conditional, other = outputs.unbind(1)
    return other + guidance * (conditional - other)


def _norms(x: Tensor, lead: int = 2) -> Tensor:
    return x.double().flatten(lead).norm(dim=-1)
