"""Swap a method into a pipeline, and out again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from dit_accel import presets
from dit_accel.errors import InputError
from dit_accel.flashblock import check_layers, needs_prefix
from dit_accel.launches import check_settings
from dit_accel.method import Method, Schedule
from dit_accel.pipelines import embedded
from dit_accel.pipelines.families import Family, family_of, models_of
from dit_accel.pipelines.hook import RootHook
from dit_accel.pipelines.norms import check_choice
from dit_accel.pipelines.session import (
    ATTRIBUTE,
    CONTEXT_PARALLEL,
    HOOK,
    Binding,
    Link,
    Session,
)

T = TypeVar("T")
EMBEDDED = "_dit_accel_embedded"
"""Name under which the transformer of an embedded model keeps that model's name."""


def accelerate(
    target: T, method: str | Method = "pisa", *, norm_rotary: str = "auto", **options: Any
) -> T:
    """Run a method in the self-attention of a pipeline.

    Weights are untouched; calling it again replaces the method.

    Args:
        target: a diffusers pipeline, or one of its transformers.
        method: the name of a preset, or a `Method`, such as ``Method.from_config("fast.yaml")``.
        norm_rotary: who computes norms and rotary embedding of queries and keys where the method
            runs: ``"auto"``, a kernel on a GPU that it is for, and diffusers' modules elsewhere;
            ``"triton"``, the kernel or an error; ``"diffusers"``. What ran in the latest call is
            ``session_of(pipe).log.norm_rotary``.
        options: of the preset, such as ``density=0.15``; ``dense_steps``, ``dense_layers`` and
            ``dense_below`` may be given beside a `Method` too. What is not given is the preset's
            default, or what an embedded model suggests
            (`dit_accel.pipelines.embedded.Embedded.method_options`).

    Returns:
        ``target`` itself.

    Raises:
        InputError: the family is not supported, or the method, an option or a layer does not fit.

    Example:
        >>> import dit_accel
        >>> pipe = dit_accel.pipelines.load("tiny-wan")
        >>> dit_accel.accelerate(pipe, "pisa", density=0.15) is pipe
        True
    """
    check_choice(norm_rotary)
    models = models_of(target)
    made = _made_for(models, method, options)
    for model in models.values():
        check_settings(model.device)
    prepare(target)
    for model in models.values():
        family = _family(model)
        for attn in family.self_attention(model):
            ours = family.processor(made)
            ours.norm_rotary = norm_rotary
            _keep_backend(attn.processor, ours)
            attn.set_processor(ours)
    return target


def restore(target: T) -> T:
    """Undo `accelerate`: every processor of ours gives way to the one that stood there before.

    Also takes the hooks off. Without anything to undo it does nothing.

    Args:
        target: a diffusers pipeline, or one of its transformers.

    Returns:
        ``target`` itself.

    Raises:
        InputError: the family is not supported.
    """
    for model in models_of(target).values():
        session = getattr(model, ATTRIBUTE, None)
        if session is None:
            continue
        family = _family(model)
        # a pipeline and its bare transformer may not share a name for it
        name = next(key for key, known in session.models if known is model)
        for path, original in session.originals.pop(name).items():
            attn = model.get_submodule(path)
            if isinstance(attn.processor, family.processor_type):
                _keep_backend(attn.processor, original)
                attn.set_processor(original)
        for attn in family.self_attention(model):
            delattr(attn, ATTRIBUTE)
        getattr(model, HOOK).remove()
        delattr(model, HOOK)
        delattr(model, ATTRIBUTE)
        del session.hosts[name]
        session.leave()
    vars(target).pop(ATTRIBUTE, None)
    return target


def processor(
    target: Any, method: str | Method = "pisa", *, norm_rotary: str = "auto", **options: Any
) -> Any:
    """A processor for diffusers' own ``transformer.set_attn_processor``, and a prepared target.

    Args:
        target: a diffusers pipeline, or one of its transformers.
        method, norm_rotary, options: as in `accelerate`.

    Returns:
        The processor. One instance serves every module of the target: what is not self-attention
        over the video runs diffusers' own code.

    Raises:
        InputError: as `accelerate`.

    Example:
        >>> import dit_accel
        >>> pipe = dit_accel.pipelines.load("tiny-wan")
        >>> ours = dit_accel.pipelines.processor(pipe, "pisa", density=0.15)
        >>> pipe.transformer.set_attn_processor(ours)
    """
    check_choice(norm_rotary)
    models = models_of(target)
    made = _made_for(models, method, options)
    prepare(target)
    ours = _family(next(iter(models.values()))).processor(made)
    ours.norm_rotary = norm_rotary
    return ours


def set_attn_processor(pipe: Any, given: Any, **options: Any) -> None:
    """``pipe.set_attn_processor`` of pipelines from `load`.

    Args:
        pipe: the pipeline.
        given: the name of a preset, a `Method`, or a processor (or diffusers' dictionary of them),
            which then goes to every attention module as in diffusers.
        options: of the preset or `Method`, and ``norm_rotary``.

    Raises:
        InputError: as `accelerate`; or options beside a processor.
    """
    if isinstance(given, str | Method):
        accelerate(pipe, given, **options)
        return
    if options:
        raise InputError(
            f"set_attn_processor: expected no options beside a processor, got {', '.join(options)}"
        )
    if not callable(given) and not isinstance(given, dict):
        raise InputError(
            "set_attn_processor: expected a preset's name, a Method or a processor, got "
            f"{type(given).__name__}"
        )
    prepare(pipe)
    for model in models_of(pipe).values():
        if hasattr(model, "set_attn_processor"):
            # diffusers empties the dictionary that it is given
            model.set_attn_processor(dict(given) if isinstance(given, dict) else given)
        else:  # AnyFlow's has none of its own
            _set_processors(model, given)


def session_of(target: Any) -> Session:
    """What is known of a prepared pipeline's latest call: ``session_of(pipe).log.density``.

    Raises:
        InputError: it was never prepared.
    """
    for model in models_of(target).values():
        session = getattr(model, ATTRIBUTE, None)
        if session is not None:
            return session
    raise InputError(
        f"session_of: expected a pipeline after accelerate or load, got a {type(target).__name__} "
        "that was never prepared"
    )


def prepare(target: Any) -> Session:
    """Install the hooks that tell processors where they are; processors stay as they are.

    Transformers of one pipeline share a session, so that steps go on where one hands over to the
    next. Without effect on what was prepared before.
    """
    models = models_of(target)
    known = [getattr(model, ATTRIBUTE, None) for model in models.values()]
    session = next((one for one in known if one is not None), None)
    if session is None:
        session = Session()
    if all(model is not target for model in models.values()):
        setattr(target, ATTRIBUTE, Link(target, session))
    for name, model in models.items():
        if getattr(model, ATTRIBUTE, None) is None:
            _attach(session, name, model)
        _note_originals(model)
    return session


def make_method(method: str | Method, **options: Any) -> Method:
    """The method of a name and options, or a `Method` with another schedule.

    Raises:
        InputError: it is neither, or an option does not fit.
    """
    if isinstance(method, str):
        return presets.build(method, **options)
    if not isinstance(method, Method):
        raise InputError(
            f"method: expected a preset's name or a Method, got {type(method).__name__}"
        )
    schedule = {"dense_steps", "dense_layers", "dense_below"}
    for name in options:
        if name not in schedule:
            raise InputError(
                f"{method.name}: expected only dense_steps, dense_layers or dense_below beside a "
                f"Method, got {name!r}"
            )
    if not options:
        return method
    kept = {name: getattr(method.schedule, name) for name in schedule}
    return replace(
        method,
        schedule=Schedule(**{**kept, **options}),
        options={**method.options, **options},
    )


def _made_for(models: dict[str, Any], method: str | Method, options: dict[str, Any]) -> Method:
    """`make_method`, with what an embedded model suggests, and the layers checked."""
    if isinstance(method, str):
        name = getattr(next(iter(models.values())), EMBEDDED, None)
        options = embedded.options_for(name, method, options)
    made = make_method(method, **options)
    for name, model in models.items():
        family = _family(model)
        reason = family.refuses(model)
        parallel = getattr(model, "_parallel_config", None)
        if getattr(parallel, "context_parallel_config", None) is not None:
            reason = CONTEXT_PARALLEL
        if reason is None and family.chunk is None:
            reason = needs_prefix(made)
        if reason is not None:
            raise InputError(f"{made.name}: {reason}")
        count = len(family.self_attention(model))
        made.check_layers(count, name)
        check_layers(made, count, name)
    return made


def _family(model: Any) -> Family:
    family = family_of(model)
    assert family is not None
    return family


def _attach(session: Session, name: str, model: Any) -> None:
    family = _family(model)
    modules = family.self_attention(model)
    for layer, attn in enumerate(modules):
        setattr(attn, ATTRIBUTE, Binding(session, name, layer, len(modules), attn))
    session.originals[name] = {}
    setattr(model, ATTRIBUTE, session)
    setattr(model, HOOK, RootHook(name, model, session))


def _set_processors(model: Any, given: Any) -> None:
    """What diffusers' ``set_attn_processor`` does, with its names in a dictionary."""
    modules = {
        f"{path}.processor": module
        for path, module in model.named_modules()
        if hasattr(module, "set_processor")
    }
    if not isinstance(given, dict):
        given = dict.fromkeys(modules, given)
    if given.keys() != modules.keys():
        raise InputError(
            f"set_attn_processor: expected a processor for each of {len(modules)} modules, such as "
            f"{next(iter(modules))!r}, got {len(given)}"
        )
    for name, module in modules.items():
        module.set_processor(given[name])


def _note_originals(model: Any) -> None:
    """Remember every processor that is not ours, for `restore`."""
    session, ours = getattr(model, ATTRIBUTE), _family(model).processor_type
    name = next(key for key, known in session.models if known is model)
    for path, module in model.named_modules():
        if hasattr(module, "set_processor") and not isinstance(module.processor, ours):
            session.originals[name][path] = module.processor


def _keep_backend(old: Any, new: Any) -> None:
    """``model.set_attention_backend`` outlives a change of processors."""
    for name in ("_attention_backend", "_parallel_config"):
        # what is set on the processor itself; defaults differ, as those of AnyFlow's two kinds do
        if name in vars(old) and hasattr(new, name):
            setattr(new, name, getattr(old, name))
