"""Kernels as they are launched, to be compiled without a GPU.

    TRITON_INTERPRET=0 python -m dit_accel.kernels.specimen [OPERATION ...] [--arch N]

Every ``triton.py`` lists its kernels in ``SPECIMENS``. Triton must not be in its interpreter.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that every kernel must compile for."""


@dataclass(frozen=True, slots=True)
class Specimen:
    """One way of launching a kernel.

    Attributes:
        name: of the kernel and its setting.
        kernel: the jitted function.
        signature: Triton's type of every argument that is no constant, such as ``"*bf16"``.
        constants: of all others.
        options: of the launch, such as ``num_warps``.
        least, most: the oldest and the newest architecture that it is for.
        aligned: integers that Triton finds divisible by 16 at launch, as strides mostly are.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    least: int = 80
    most: int = max(ARCHITECTURES)
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes: registers a thread, bytes spilled a thread, shared bytes."""

    registers: int
    spilled: int
    shared: int


def typed(kernel: Any, constants: Mapping[str, Any], **types: str) -> dict[str, str]:
    """A kernel's signature: 32-bit integers, but for what is constant or told otherwise."""
    names = (name for name in kernel.arg_names if name not in constants)
    return {name: types.get(name, "i32") for name in names}


def alike(
    launches: Iterable[tuple[Any, Mapping[str, Any]]], types: Mapping[str, str], num_warps: int = 4
) -> list[Specimen]:
    """Kernels and their constants, as `typed` would have them, launched with as many warps."""
    return [
        Specimen(
            kernel.__name__,
            kernel,
            typed(kernel, constants, **types),
            constants,
            {"num_warps": num_warps},
        )
        for kernel, constants in launches
    ]


def specimens() -> Iterator[tuple[str, Specimen]]:
    """All of them, with the operation that each belongs to."""
    import dit_accel.kernels as room

    for found in sorted(pkgutil.iter_modules(room.__path__), key=lambda module: module.name):
        if not found.ispkg:
            continue
        for part in ("triton", "hopper"):
            name = f"{room.__name__}.{found.name}.{part}"
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
                continue
            for specimen in module.SPECIMENS:
                yield found.name, specimen


def compile_for(specimen: Specimen, architecture: int) -> Usage:
    """Compile for an architecture, and read what it takes from the binary."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = specimen.kernel
    names = kernel.arg_names
    untold = [n for n in names if n not in specimen.signature and n not in specimen.constants]
    if untold:
        raise ValueError(f"{specimen.name}: expected all arguments, got none for {untold}")
    signature = {name: specimen.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in specimen.constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in specimen.aligned
    }
    made = _source_of(kernel)(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    binary = triton.compile(made, target=target, options=dict(specimen.options))
    reused = overwritten(binary.asm["ptx"])
    if reused:
        raise RuntimeError(f"{specimen.name}: expected barriers to be left alone, got {reused}")
    return _usage(binary.asm["cubin"], binary.metadata.shared)


def overwritten(ptx: str) -> list[int]:
    """Bytes of shared memory that are made a barrier, and written to as something else.

    The compiler gives memory whose last use it has seen to whatever comes next, and a barrier that
    is made and never waited for has its last use at once. Nothing orders the two writes.
    """
    places = dict(re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx))
    made = re.findall(r"mbarrier\.init\S*\s+\[(%r\d+)\]", ptx)
    barriers = {int(places[register]) for register in made if register in places}
    written = {int(at) for at in re.findall(r"st\.shared\S*\s+\[global_smem\+(\d+)\]", ptx)}
    return sorted(barriers & written)


def _source_of(kernel: Any) -> Any:
    """The class of sources that a kernel is: Triton's or Gluon's."""
    from triton.compiler import ASTSource

    if type(kernel).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    return ASTSource


def _usage(cubin: bytes, shared: int) -> Usage:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers = re.search(r"REG:(\d+)", said)
    stack, local = re.search(r"STACK:(\d+)", said), re.search(r"LOCAL:(\d+)", said)
    if registers is None:
        raise RuntimeError(f"cuobjdump: expected registers, got {said!r}")
    spilled = sum(int(found[1]) for found in (stack, local) if found is not None)
    return Usage(int(registers[1]), spilled, shared)


def main(words: list[str]) -> int:
    """Compile everything, or the operations named, for all architectures or ``--arch N``."""
    wanted = [int(words[i + 1]) for i, word in enumerate(words) if word == "--arch"]
    named = [word for word in words if not word.startswith("--") and not word.isdigit()]
    print(f"{'operation':18} {'kernel':44} {'sm':>4} {'regs':>5} {'spilled':>8} {'shared':>8}")
    for operation, specimen in specimens():
        if named and operation not in named:
            continue
        for architecture in wanted or ARCHITECTURES:
            if not specimen.least <= architecture <= specimen.most:
                continue
            usage = compile_for(specimen, architecture)
            print(
                f"{operation:18} {specimen.name:44} {architecture:>4} {usage.registers:>5} "
                f"{usage.spilled:>8} {usage.shared:>8}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
