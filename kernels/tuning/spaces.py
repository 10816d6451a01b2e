"""What can be chosen at the launch of a kernel, and what is chosen where nothing was measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["half", "float"]
"""Of the inputs' dtype: fp16 and bf16, or fp32."""
KINDS: Final = ("half", "float")
OPTIONS: Final = ("num_warps", "num_stages")
"""Of a launch; everything else in a setting is a constant of the kernel."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way of launching a kernel.

    Attributes:
        values: constants of the kernel, such as ``BM``, and ``num_warps`` and ``num_stages``.
    """

    values: Mapping[str, int]

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.values.items())

    @property
    def options(self) -> dict[str, int]:
        """Of the launch."""
        return {name: value for name, value in self.values.items() if name in OPTIONS}

    @property
    def constants(self) -> dict[str, int]:
        """Of the kernel."""
        return {name: value for name, value in self.values.items() if name not in OPTIONS}


@dataclass(frozen=True, slots=True)
class Space:
    """The settings that a kernel can be launched with.

    Attributes:
        half, single: what is taken where nothing was measured, for inputs of 16 and of 32 bits.
        choices: values to try, by name.
        why: what the numbers are.
    """

    half: Setting
    single: Setting
    choices: Mapping[str, tuple[int, ...]]
    why: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values that a setting has."""
        return tuple(self.half.values)

    def default(self, kind: Kind) -> Setting:
        """What is taken where nothing was measured."""
        return self.half if kind == "half" else self.single

    def candidates(self, kind: Kind) -> Iterator[Setting]:
        """Every combination, the default first."""
        first = self.default(kind)
        yield first
        for values in itertools.product(*(self.choices[name] for name in self.names)):
            found = Setting(dict(zip(self.names, values, strict=True)))
            if found != first:
                yield found


def _setting(num_warps: int, num_stages: int, **constants: int) -> Setting:
    return Setting({**constants, "num_warps": num_warps, "num_stages": num_stages})


SPACES: Final[Mapping[str, Space]] = {
    "merge": Space(
        _setting(4, 3, ROWS=32),
        _setting(4, 3, ROWS=32),
        {"ROWS": (8, 16, 32, 64), "num_warps": (2, 4, 8), "num_stages": (3,)},
        "rows of a program",
    ),
    "block_summary.mean": Space(
        _setting(4, 2, TILE=64, RUN=4),
        _setting(4, 2, TILE=64, RUN=4),
        {"TILE": (32, 64), "RUN": (1, 2, 4, 8), "num_warps": (2, 4, 8), "num_stages": (2,)},
        "tokens read at once, and blocks of a program",
    ),
    "block_summary.cov": Space(
        _setting(8, 2, TILE=64, RUN=32),
        _setting(8, 2, TILE=64, RUN=32),
        {"TILE": (32, 64), "RUN": (8, 16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
        "tokens read at once, and blocks of a program",
    ),
    "error_probe": Space(
        Setting({"BM": 64, "BN": 32, "STAGES": 4, "num_warps": 4}),
        Setting({"BM": 64, "BN": 32, "STAGES": 4, "num_warps": 4}),
        {"BM": (64, 128), "BN": (32, 64), "STAGES": (2, 4), "num_warps": (4, 8)},
        "queries and keys of a tile, and tiles on their way",
    ),
    "kmeans.assign": Space(
        _setting(8, 3, BM=128, BN=64),
        _setting(4, 3, BM=64, BN=64),
        {"BM": (64, 128), "BN": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
        "tokens and centroids of a tile",
    ),
    "kmeans.update": Space(
        _setting(4, 2, BN=32),
        _setting(4, 2, BN=32),
        {"BN": (16, 32, 64), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3)},
        "tokens read at once",
    ),
    "token_attention": Space(
        _setting(8, 3, BM=128, BN=64),
        _setting(4, 2, BM=64, BN=32),
        {"BM": (64, 128), "BN": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
        "queries and keys of a tile",
    ),
}
"""By operation, and part of it where it has several kernels."""
