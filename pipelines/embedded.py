"""Models that are shipped inside the package."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from dit_accel import presets
from dit_accel.errors import InputError


class VocabularyWarning(UserWarning):
    """A prompt has words that an embedded model never saw."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A model inside the package: a stock diffusers pipeline directory.

    Attributes:
        name: what `dit_accel.pipelines.load` knows it by.
        summary: one line.
        folder: under this package.
        defaults: arguments of the pipeline's call that the model was made for.
        method_options: of presets, where they have them and nothing else is said. A short sequence
            wants smaller blocks than the presets' defaults, which are meant for large models.
        fps: frames per second that its clips were made for.
    """

    name: str
    summary: str
    folder: str
    defaults: Mapping[str, Any]
    method_options: Mapping[str, Any]
    fps: int

    @property
    def directory(self) -> Path:
        """Where the pipeline lies.

        Raises:
            InputError: the package was installed without it.
        """
        path = Path(__file__).parent / self.folder
        if not (path / "model_index.json").is_file():
            raise InputError(f"model: expected the weights of {self.name} at {path}, got nothing")
        return path


_TABLE: Final = {
    "tiny-wan": Embedded(
        name="tiny-wan",
        summary="shapes that move, in a small Wan trained on procedural clips (17 frames, 128×128)",
        folder="tiny_wan/weights",
        defaults=MappingProxyType(
            {
                "height": 128,
                "width": 128,
                "num_frames": 17,
                "num_inference_steps": 20,
                "guidance_scale": 6.0,
            }
        ),
        method_options=MappingProxyType(
            # clusters as large: of keys, and of queries larger by as much as in SVG-EAR's paper
            {"block_size": 16, "block_q": 16, "block_k": 16, "q_clusters": 36, "k_clusters": 144}
        ),
        fps=8,
    )
}


def names() -> tuple[str, ...]:
    """Names of the embedded models."""
    return tuple(_TABLE)


def catalogue() -> tuple[Embedded, ...]:
    """All embedded models."""
    return tuple(_TABLE.values())


def find(name: str) -> Embedded | None:
    """The embedded model of a name, or ``None``."""
    return _TABLE.get(name)


def defaults(name: str) -> dict[str, Any]:
    """Arguments for ``pipe(prompt, **defaults(name))``, as the model was made for.

    Raises:
        InputError: no embedded model has this name.

    Example:
        >>> from dit_accel.pipelines import embedded
        >>> embedded.defaults("tiny-wan")["num_frames"]
        17
    """
    if name not in _TABLE:
        raise InputError(f"model: expected one of {', '.join(_TABLE)}, got {name!r}")
    return dict(_TABLE[name].defaults)


def options_for(model: str | None, preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a preset on a model: as given, and what the embedded model suggests beside it.

    Args:
        model: an embedded model's name; any other, or ``None``, suggests nothing.
        preset: the name of a preset.
        given: options that somebody chose.
    """
    inside = _TABLE.get(model) if model is not None else None
    suggested = {} if inside is None else inside.method_options
    known = presets.get(preset).accepts(given)
    return {**{key: value for key, value in suggested.items() if key in known}, **given}


def vocabulary(tokenizer: Any) -> list[str]:
    """The words that a word-level tokenizer knows, in alphabetical order."""
    special = set(tokenizer.all_special_tokens)
    return sorted(word for word in tokenizer.get_vocab() if word not in special)


def unknown_words(tokenizer: Any, prompts: str | Iterable[str] | None) -> list[str]:
    """Words of prompts outside the vocabulary of a word-level tokenizer, each once, in order."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    known = set(vocabulary(tokenizer))
    words = (word for text in texts for word in re.split(r"[\s,.]+", text.lower()) if word)
    return list(dict.fromkeys(word for word in words if word not in known))


def vocabulary_message(name: str, tokenizer: Any, unknown: list[str]) -> str:
    """What a user is told about unknown words."""
    return (
        f"{name} does not know {', '.join(map(repr, unknown))}; it knows: "
        f"{', '.join(vocabulary(tokenizer))}"
    )


def warn_of_unknown_words(pipe: Any, name: str) -> None:
    """Make a pipeline answer a word outside its vocabulary with a `VocabularyWarning`."""
    # neither a closure nor a bound method: the pipeline can then be copied and pickled
    pipe.encode_prompt = functools.partial(_encode_prompt, pipe, name)


def _encode_prompt(
    pipe: Any, name: str, prompt: Any, negative_prompt: Any = None, *args: Any, **kwargs: Any
) -> Any:
    unknown = unknown_words(pipe.tokenizer, prompt)
    unknown += unknown_words(pipe.tokenizer, negative_prompt)
    if unknown:
        message = vocabulary_message(name, pipe.tokenizer, list(dict.fromkeys(unknown)))
        warnings.warn(message, VocabularyWarning, stacklevel=3)
    return type(pipe).encode_prompt(pipe, prompt, negative_prompt, *args, **kwargs)
