"""What attention modules and pipelines hold of their session, so that copies find theirs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from dit_accel.errors import InputError
from dit_accel.pipelines.compiled import number_of
from dit_accel.pipelines.norms import DIFFUSERS
from dit_accel.types import Context, Report

if TYPE_CHECKING:
    from dit_accel.pipelines.session import Session

ATTRIBUTE = "_dit_accel"
"""Name under which a transformer keeps its session, an attention module its `Binding`, and a
pipeline its `Link`."""


class Link:
    """On a pipeline, for its copies: they find their session by it."""

    def __init__(self, pipe: Any, session: Session) -> None:
        self._pipe, self._session = weakref.ref(pipe), session
        session.adopt(pipe)

    def __getstate__(self) -> tuple[Any, Session]:
        return self._pipe(), self._session

    def __setstate__(self, state: tuple[Any, Session]) -> None:
        Link.__init__(self, *state)


class Binding:
    """What an attention module is within its session.

    Attributes:
        session: whose.
        model: name of the transformer in the pipeline.
        layer, num_layers: which of its layers this is, and how many there are.
        number: int64 scalar under which a compiled graph finds this.
        norms: who computed norms and rotary embedding of the call under way; see `Record`.
    """

    def __init__(
        self, session: Session, model: str, layer: int, num_layers: int, module: nn.Module
    ) -> None:
        self.session, self.model = session, model
        self.layer, self.num_layers = layer, num_layers
        self._module = weakref.ref(module)
        self.number = number_of(self)
        self.norms = DIFFUSERS

    def __getstate__(self) -> tuple[Any, ...]:
        return self.session, self.model, self.layer, self.num_layers, self._module()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        Binding.__init__(self, *state)

    @property
    def module(self) -> Any:
        """The attention module itself."""
        return self._module()

    def context(self) -> Context:
        """Where the call happens; see `Session.context`."""
        return self.session.context(self)

    def record(self, ctx: Context, report: Report) -> None:
        """Note what the call computed."""
        self.session.record(self, ctx, report)


def binding_of(attn: nn.Module) -> Binding:
    """The binding of a self-attention module.

    Raises:
        InputError: its transformer was never prepared.
    """
    binding = getattr(attn, ATTRIBUTE, None)
    if not isinstance(binding, Binding):
        raise InputError(
            "set_attn_processor: expected a transformer prepared by dit_accel.pipelines.load or "
            f"dit_accel.pipelines.processor(pipe, ...), got a {type(attn).__name__} that was not"
        )
    return binding
