"""What a pipeline's processors share: facts of the running forward, state, densities."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from dit_accel.attend import dense_pairs
from dit_accel.errors import InputError
from dit_accel.method import Method
from dit_accel.pipelines.binding import ATTRIBUTE, Binding, Link, binding_of
from dit_accel.pipelines.clock import Clock, Moment
from dit_accel.pipelines.compiled import attend as compiled_attend
from dit_accel.pipelines.compiled import norm_rotary as compiled_norm_rotary
from dit_accel.pipelines.compiled import scalar
from dit_accel.pipelines.dense_choice import choice_of, head_dim_of
from dit_accel.pipelines.densities import DensityLog, Record
from dit_accel.pipelines.families import Chunk
from dit_accel.pipelines.norms import DIFFUSERS, Angles, Projected, task_of
from dit_accel.projections import Over
from dit_accel.state import State
from dit_accel.types import Context, Geometry, Report

__all__ = ["ATTRIBUTE", "HOOK", "Binding", "Link", "MethodProcessor", "Session", "binding_of"]

HOOK = "_dit_accel_hook"
"""Name under which a transformer keeps its `RootHook`."""
CONTEXT_PARALLEL = (
    "expected the whole sequence on one device, got context parallelism, which is not supported yet"
)


class Session:
    """One pipeline with its transformers, or one transformer by itself.

    Attributes:
        state: memory of the methods; empty before and after every call.
        log: densities of the latest call, kept until the next one begins.
        hosts: the transformers, by their names in the pipeline.
        originals: the processors that stood there before ours, by transformer and module.
        ticks: int64 scalar, raised by every forward of a compiled transformer.
        filling: pairs, for each head and element of the batch, of a forward that fills a KV cache.

    A copy, or what comes out of a pickle, remembers the originals and nothing else; the copies of
    the transformers and of the pipeline make themselves known to it.
    """

    def __init__(self) -> None:
        # the pipeline owns the transformers, which own the session
        self._pipe: Callable[[], Any] = lambda: None
        self._scheduler: Callable[[], Any] = lambda: None
        self._clock = Clock()
        self._now: tuple[str, Geometry | None, Moment] | None = None
        self._cache: Callable[[], Tensor | None] = lambda: None
        self._chunk: tuple[int, bool] | None = None
        self.filling = 0
        self.state = State()
        self.log = DensityLog()
        self.hosts: dict[str, weakref.ref[nn.Module]] = {}
        self.originals: dict[str, dict[str, Any]] = {}
        self.ticks = scalar(0)

    def __getstate__(self) -> dict[str, Any]:
        return {"originals": self.originals}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Session.__init__(self)
        self.originals = state["originals"]

    def adopt(self, pipe: Any) -> None:
        """The scheduler of this pipeline is to tell the steps from now on."""
        self._pipe = weakref.ref(pipe)

    @property
    def models(self) -> Iterator[tuple[str, nn.Module]]:
        """The transformers, by their names in the pipeline."""
        for name, reference in self.hosts.items():
            model = reference()
            if model is not None:
                yield name, model

    def enter(
        self,
        model: str,
        geometry: Geometry | None,
        *,
        told: Any,
        timestep: Any,
        chunk: Chunk | None = None,
    ) -> None:
        """A forward of a transformer begins; without a geometry no method can run in it.

        In block diffusion a call is as long as its KV cache lives, steps are those of a chunk, and
        the state is emptied at every chunk. A forward that fills the cache is no step, and belongs
        to no chunk.
        """
        if chunk is not None:
            self._turn_to(chunk)
            if chunk.filling is not None:
                self._now = model, geometry, Moment(-1, None, "", False)
                self.filling = chunk.filling
                return
        scheduler = getattr(self._pipe(), "scheduler", None)
        if scheduler is None:
            # a pipeline made of the parts of another outlives it
            scheduler = self._scheduler()
        else:
            self._scheduler = weakref.ref(scheduler)
        moment = self._clock.tick(told=told, scheduler=scheduler, timestep=timestep)
        if moment.first or (self._now is not None and self._now[0] != model):
            # another transformer took over: what the one before remembers is of no more use
            self.state.clear()
        if moment.first and chunk is None:
            self.log.clear()
        self._now = model, geometry, moment

    def _turn_to(self, chunk: Chunk) -> None:
        """A new cache begins a call, and a new chunk begins without memory."""
        where = chunk.index, chunk.filling is not None
        if self._cache() is chunk.cache:
            if where != self._chunk:
                self._forget()
            self._chunk = where
            return
        self.leave()
        self.log.clear()
        me = weakref.ref(self)

        def end(reference: weakref.ref[Tensor]) -> None:
            session = me()
            if session is not None and session._cache is reference:
                session.leave()

        # nothing else tells that such a call is over, be it by an exception
        self._cache, self._chunk = weakref.ref(chunk.cache, end), where

    def leave(self) -> None:
        """The call of the pipeline is over."""
        self._now = None
        self._cache, self._chunk = (lambda: None), None
        self._forget()

    def _forget(self) -> None:
        self.state.clear()
        self._clock.reset()

    def context(self, binding: Binding) -> Context:
        """Where the attention call of a module happens.

        Raises:
            InputError: no forward of its transformer is under way, or its tokens make no grid.
        """
        if self._now is None or self._now[0] != binding.model:
            raise InputError(
                "attention: expected to be called by its transformer's forward, which tells the "
                "grid and the step, got a call from elsewhere"
            )
        model, geometry, moment = self._now
        if geometry is None:
            raise InputError("attention: expected tokens that make a grid, got a forward of others")
        return Context(
            geometry,
            step=moment.step,
            num_steps=moment.num_steps,
            layer=binding.layer,
            num_layers=binding.num_layers,
            # two transformers number their layers alike
            branch=f"{model}/{moment.branch}",
            state=self.state,
        )

    def record(self, binding: Binding, ctx: Context, report: Report) -> None:
        """Note what an attention call computed."""
        self.log.records.append(
            Record(
                binding.model,
                ctx.step,
                ctx.layer,
                ctx.branch,
                report.exact_pairs,
                report.all_pairs,
                binding.norms,
            )
        )
        binding.norms = DIFFUSERS


class MethodProcessor:
    """What the processors of all families share; diffusers' own class is the next base.

    Attributes:
        method: what runs.
        norm_rotary: who computes norms and rotary embedding of a call that does not step aside, of
            `norms.CHOICES`.
    """

    _parallel_config: Any
    _attention_backend: Any
    norm_rotary: str = "auto"

    def __init__(self, method: Method) -> None:
        super().__init__()
        if not isinstance(method, Method):
            raise InputError(
                f"{type(self).__name__}: expected a Method, got {type(method).__name__}"
            )
        self.method = method

    def steps_aside(self, attn: Any, hidden_states: Tensor, beside: int = 0) -> bool:
        """Whether diffusers' own code is to compute this call, which is then noted as dense.

        Never so while a graph is traced, which has to serve sparse steps as well.

        Args:
            attn, hidden_states: as diffusers calls the processor.
            beside: as in `note_dense`.

        Raises:
            InputError: as `begin`.
        """
        if torch.compiler.is_compiling():
            return False
        binding, ctx = self.begin(attn)
        depth = head_dim_of(attn, hidden_states)
        if not self.is_dense(binding, ctx, hidden_states, attn.heads, depth):
            return False
        self.note_dense(binding, ctx, hidden_states, attn.heads, beside)
        return True

    def normed(
        self,
        attn: nn.Module,
        parts: Sequence[Projected],
        over: Over,
        angles: Angles | str | None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Queries and keys after norms and rotation, by the kernel; ``None`` leaves it to modules.

        Args:
            attn: the module.
            parts, over, angles, dtype: as of `norms.task_of`.

        Returns:
            ``q``, ``k`` and ``v``, ``[B, L, H, D]``, streams joined.

        Raises:
            InputError: the kernel was named, and cannot do it.
        """
        task = task_of(self.norm_rotary, parts, over, angles, dtype)
        binding = binding_of(attn)
        if isinstance(task, str):
            if self.norm_rotary == "triton":
                raise InputError(
                    f"norm_rotary: expected norms and angles that the kernel takes, got 'triton', "
                    f"and {task}"
                )
            if not torch.compiler.is_compiling():
                binding.norms = task if task == DIFFUSERS else f"{DIFFUSERS}: {task}"
            return None
        if torch.compiler.is_compiling():
            return compiled_norm_rotary(binding.number, task)
        binding.norms = "triton"
        return task.run()

    def is_dense(
        self, binding: Binding, ctx: Context, like: Tensor, heads: int, head_dim: int
    ) -> bool:
        """Whether a call, ``like`` in batch, dtype and device, is left to dense attention: by the
        method, or since that is faster here.
        """
        if self.method.is_dense(ctx):
            return True
        choice = choice_of(self, ctx, like, heads, head_dim)
        if choice is not None:
            binding.session.log.note(choice)
        return choice is not None

    def attend(
        self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attention of a call that does not step aside.

        Args:
            attn: the module.
            q, k, v: ``[B, H, L, D]``.
            mask: for a step that turns out to be dense; a method has it from the geometry.

        Returns:
            ``[B, L, H * D]`` in ``q``'s dtype.

        Raises:
            InputError: as `begin`, and as the method.
        """
        if not torch.compiler.is_compiling():
            return self.run(attn, q, k, v, mask)
        if self._parallel_config is not None:
            raise self._sharded()
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise InputError(
                "attention: expected no gradients to be asked for, got a graph of them"
            )
        binding = binding_of(attn)
        return compiled_attend(binding.session.ticks, binding.number, q, k, v, mask)

    def run(self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`attend`, outside of any graph: here it is decided what this step is."""
        binding, ctx = self.begin(attn)
        if not self.is_dense(binding, ctx, q, q.shape[1], q.shape[3]):
            out, report = self.method(q, k, v, ctx)
            binding.record(ctx, report)
            return out.transpose(1, 2).flatten(2)
        # a compiled model alone comes here
        self.note_dense(binding, ctx, q, q.shape[1])
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        dense: Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend
        )
        return dense.flatten(2).type_as(q)

    def _sharded(self) -> InputError:
        return InputError(f"{self.method.name}: {CONTEXT_PARALLEL}")

    def begin(self, attn: nn.Module) -> tuple[Binding, Context]:
        """What a self-attention module is, and where its call happens.

        Raises:
            InputError: the transformer is not prepared, or the sequence is sharded.
        """
        if self._parallel_config is not None:
            raise self._sharded()
        binding = binding_of(attn)
        return binding, binding.context()

    def note_dense(
        self,
        binding: Binding,
        ctx: Context,
        hidden_states: Tensor,
        heads: int,
        beside: int = 0,
    ) -> None:
        """Record a call that diffusers' own code computes. ``hidden_states`` is ``[B, …]``.

        Args:
            beside: pairs of every head with tokens that the geometry knows nothing of.
        """
        where = ctx.geometry
        like = hidden_states.new_empty(()).expand(hidden_states.shape[0], heads, where.length)
        every = dense_pairs(like, where.key_valid) + beside
        binding.record(ctx, Report(every, every))
