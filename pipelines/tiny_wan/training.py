"""What both stages of training share: rates, noise from its own seed, checkpoints, CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.atomic import replace_with

Log = Callable[[dict[str, Any]], None]


class Graph:
    """A training step captured as a CUDA graph at its first call, replayed afterwards."""

    def __init__(
        self, update: Callable[..., dict[str, Tensor]], optimizer: torch.optim.Optimizer
    ) -> None:
        self.update, self.optimizer = update, optimizer
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        if self.graph is None:
            self._capture(inputs)
        else:
            for kept, new in zip(self.inputs, inputs, strict=True):
                kept.copy_(new)
        assert self.graph is not None
        self.graph.replay()
        return self.result

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Warm-up steps must not train: the rate is zero until the graph exists.
        rate = float(self.optimizer.param_groups[0]["lr"])
        fill_lr([self.optimizer], 0.0)
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.update(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self.update(*self.inputs)
        fill_lr([self.optimizer], rate)


def rate_at(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Linear warm-up, plateau, linear decay to zero over the last ``decay_share`` of the steps."""
    rise = min(1.0, (step + 1) / warmup)
    return rise * min(1.0, (steps - step) / max(1.0, decay_share * steps))


def fill_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def noise_of(shape: Sequence[int], seed: str, device: str) -> Tensor:
    """Standard normal numbers from a seed of their own, drawn on the device."""
    generator = torch.Generator(device).manual_seed(_hash(seed))
    return torch.randn(shape, generator=generator, device=device)


def _hash(text: str) -> int:
    value = 1469598103934665603
    for byte in text.encode():
        value = ((value ^ byte) * 1099511628211) % (1 << 63)
    return value


@contextlib.contextmanager
def autocast(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    with torch.autocast("cuda", torch.bfloat16):
        yield


def save_checkpoint(
    path: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, Tensor] | None = None,
) -> None:
    kept = {
        "step": step,
        "modules": {name: m.state_dict() for name, m in modules.items()},
        "optimizers": [o.state_dict() for o in optimizers],
        "ema": ema,
    }
    replace_with(path, lambda part: torch.save(kept, part))


def load_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, Tensor] | None = None,
) -> int:
    """Take up a checkpoint; returns the number of finished steps, 0 without one."""
    if not path.exists():
        return 0
    kept = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(kept["modules"][name])
    for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
        optimizer.load_state_dict(state)
        # loading puts the step counters on the CPU, where no CUDA graph can advance them
        for group in optimizer.param_groups:
            if group.get("capturable"):
                for parameter in group["params"]:
                    kept_step = optimizer.state[parameter].get("step")
                    if kept_step is not None:
                        optimizer.state[parameter]["step"] = kept_step.to(parameter.device)
    if ema is not None:
        for name, value in kept["ema"].items():
            ema[name].copy_(value)
    return int(kept["step"])
