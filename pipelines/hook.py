"""The root hook: tells a session what no processor is told, before every forward.

The work is done by a forward pre-hook of torch, and not by a wrapped ``forward`` as in diffusers'
own hooks: accelerate's CPU offload takes its wrappers off and puts them on again around every call,
and takes along what was wrapped around them. Only the cache context, which diffusers hands to
nothing but the hooks in its registry, needs a place there.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from diffusers.hooks.hooks import (
    BaseState,
    CacheContext,
    HookFunctionReference,
    HookRegistry,
    ModelHook,
    StateManager,
)
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from dit_accel.errors import InputError
from dit_accel.pipelines.compiled import enter, number_of
from dit_accel.pipelines.families import family_of
from dit_accel.pipelines.session import HOOK, Session

NAME = "dit_accel"


class _Nothing(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Listener(ModelHook):
    """Receives the cache context, and the reset at the end of a call."""

    _is_stateful = True

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._manager = StateManager(_Nothing)

    @property
    def told(self) -> CacheContext | None:
        """The context of the forward under way, if the pipeline gives any."""
        try:
            return self._manager.context
        except ValueError:
            return None

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._manager.reset()
        self._session.leave()
        return module


class RootHook:
    """On one transformer of a session, from construction until `remove`.

    A copy of the transformer has a copy of this, which belongs to that copy's session.
    """

    def __init__(self, name: str, model: nn.Module, session: Session) -> None:
        listener = _Listener(session)
        registry = HookRegistry.check_if_exists_or_initialize(model)
        # First in the order and without a wrapper: other hooks can then come and go in any order.
        registry.hooks[NAME] = listener
        registry._hook_order.insert(0, NAME)
        registry._fn_refs.insert(0, HookFunctionReference())
        registry.invalidate_child_registries_cache()
        handle = model.register_forward_pre_hook(_tell, with_kwargs=True, prepend=True)
        self.__setstate__((name, model, session, listener, handle))

    def __getstate__(self) -> tuple[Any, ...]:
        return self._name, self._model(), self.session, self._listener, self._handle

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._name, model, self.session, self._listener, self._handle = state
        self._model = weakref.ref(model)
        self.signature = inspect.signature(type(model).forward)
        self.number = number_of(self)
        self.session.hosts[self._name] = self._model

    def enter(self, given: dict[str, Any]) -> None:
        """A forward begins, with these arguments by name."""
        model = self._model()
        family = family_of(model)
        assert family is not None
        geometry = None
        try:
            geometry = family.geometry(model, given)
        except InputError:
            # what stands there may be stock, which needs no grid
            ours = family.processor_type
            if any(isinstance(attn.processor, ours) for attn in family.self_attention(model)):
                raise
        self.session.enter(
            self._name,
            geometry,
            told=self._listener.told,
            timestep=given.get("timestep"),
            chunk=None if family.chunk is None else family.chunk(model, given),
        )

    def remove(self) -> None:
        """Take the hook off; nothing remains."""
        self._handle.remove()
        registry = HookRegistry.check_if_exists_or_initialize(self._model())
        at = registry._hook_order.index(NAME)
        del registry.hooks[NAME], registry._hook_order[at], registry._fn_refs[at]
        registry.invalidate_child_registries_cache()


def _tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # found by the module, and no method of an object: a copy of the module keeps this very function
    hook: RootHook = getattr(module, HOOK)
    given = hook.signature.bind(module, *args, **kwargs).arguments
    if not torch.compiler.is_compiling():
        hook.enter(given)
        if _has_compiled_blocks(module):
            # one iteration of CUDA graphs is a forward, and not a block, which would free what the
            # block before it returned
            torch.compiler.cudagraph_mark_step_begin()
        return
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    enter(hook.session.ticks, hook.number, " ".join(tensors), list(tensors.values()))


def _has_compiled_blocks(model: nn.Module) -> bool:
    """Whether blocks are compiled one by one, as `compile_repeated_blocks` does."""
    lists = (child for child in model.children() if isinstance(child, nn.ModuleList))
    return any(
        getattr(block, "_compiled_call_impl", None) is not None
        or isinstance(block, OptimizedModule)
        for blocks in lists
        for block in blocks
    )
