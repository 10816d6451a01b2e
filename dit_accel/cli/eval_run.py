"""``dit-accel eval run`` and ``dit-accel eval compare``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli.common import (
    device_of,
    dtype_of,
    err,
    out,
    print_wide,
    progress,
    quiet,
    shared_options,
)
from dit_accel.errors import InputError

if TYPE_CHECKING:
    from dit_accel.eval.run import Outcome, Rank


def run(
    ctx: typer.Context,
    target: Annotated[Path | None, typer.Option("--out", help="Folder of the run.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML of these options; the command line comes first.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="An embedded model, a directory, or a hub id.")
    ] = "tiny-wan",
    methods: Annotated[str, typer.Option(help="With commas; dense is always there.")] = "pisa",
    density: Annotated[
        str | None, typer.Option(help="With commas, for methods that have this option.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE", help="Option of a method; repeatable."),
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="builtin, a text file, or VBench's prompt suite (.json).")
    ] = "builtin",
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    seeds: Annotated[
        str, typer.Option(help="With commas; prompt n is made from each of them plus n.")
    ] = "0",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of guidance; 1 is none.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the files.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    floor: Annotated[
        str,
        typer.Option(help="Attention backend of diffusers for dense against dense; auto, or none."),
    ] = "auto",
    latents: Annotated[
        bool, typer.Option("--latents", help="Keep the latents after every step.")
    ] = False,
    warmup: Annotated[
        int, typer.Option(help="Steps before a process measures a variant; thrown away.")
    ] = 1,
    features: Annotated[
        str,
        typer.Option(help="For FID and KID: auto, embedded, inception, or a network's file."),
    ] = "auto",
    real: Annotated[
        Path | None, typer.Option(help="Folder of real clips or images for FID and KID.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Processes that share the prompts, and then the figures.")
    ] = 1,
) -> None:
    """Generate every prompt by every method, and measure what comes of it.

    What is in OUT already is kept, if its settings are the same: a run that was killed goes on.
    Under torchrun or accelerate launch the processes share the prompts.
    """
    given = {key: value for key, value in ctx.params.items() if key not in ("config", "target")}
    given["out"] = target
    if config is not None:
        given.update(_configured(ctx, config, given))
    if given["out"] is None:
        raise InputError("out: expected the folder of the run, got none")
    _run(given)


def _configured(ctx: typer.Context, path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a YAML file says and the command line does not."""
    import yaml

    from dit_accel.options import closest

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"config: expected YAML in {str(path)!r}, got {told}") from None
    if not isinstance(read, dict):
        raise InputError(f"config: expected a mapping in {str(path)!r}, got {read!r}")
    names = {key.replace("settings", "set"): key for key in given}
    found = {}
    for key, value in read.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise InputError(
                f"{path}: expected options among {', '.join(names)}, got {key!r}"
                f"{closest(name, names)}"
            )
        parameter = "target" if name == "out" else names[name]
        source = getattr(ctx.get_parameter_source(parameter), "name", "DEFAULT")
        if value is not None and source == "DEFAULT":
            found[names[name]] = value
    for name in ("out", "real"):
        if name in found:
            found[name] = Path(str(found[name]))
    kinds = {
        "limit": int, "steps": int, "height": int, "width": int, "frames": int, "fps": int,
        "jobs": int, "warmup": int, "guidance": int | float, "latents": bool, "model": str,
        "prompts": str, "negative_prompt": str, "dtype": str, "device": str, "floor": str,
        "features": str,
    }  # fmt: skip
    for name, value in found.items():
        kind = kinds.get(name)
        wrong = kind is not None and not isinstance(value, kind)
        if wrong or (kind is not bool and isinstance(value, bool)):
            expected = getattr(kind, "__name__", "another type")
            raise InputError(f"{path}: {name}: expected {expected}, got {value!r}")
    return found


def _run(given: Mapping[str, Any]) -> None:
    from dit_accel.eval.variants import entries_of, floor_for, variants_of
    from dit_accel.pipelines.request import Request

    # whatever can be refused is refused before anything is loaded
    entries = entries_of(given["methods"])
    densities = _numbers("density", given["density"], float)
    seeds = _numbers("seeds", given["seeds"], int)
    shared = shared_options(given["settings"])
    chosen_dtype = dtype_of(given["dtype"])
    if given["jobs"] < 1:
        raise InputError(f"jobs: expected a positive integer, got {given['jobs']}")
    if given["fps"] is not None and not 1 <= given["fps"] <= 240:
        raise InputError(f"fps: expected an integer from 1 to 240, got {given['fps']}")
    variants_of(entries, densities, shared, given["model"], None)
    quiet()
    from dit_accel.eval.features.extractor import extractor_of
    from dit_accel.eval.prompts import prompts_of
    from dit_accel.eval.run import Group, rank_of_environment, settle
    from dit_accel.eval.run import run as make
    from dit_accel.eval.variants import settings_of
    from dit_accel.pipelines import load

    prompts_of(given["prompts"], given["model"], given["limit"])
    extractor_of(given["features"], given["model"])
    rank = rank_of_environment()
    device = _device(given["device"], rank)
    settle(device)
    with err.status(f"loading {given['model']}"):
        pipe = load(given["model"], dtype=chosen_dtype, device=device)
        pipe.set_progress_bar_config(disable=True)
    name = str(pipe.transformer.dtype).removeprefix("torch.")
    kind = device.partition(":")[0]
    floor = {"auto": floor_for(kind, name), "none": None}.get(given["floor"], given["floor"])
    asked = Request(
        "",
        given["negative_prompt"],
        given["height"],
        given["width"],
        given["frames"],
        given["steps"],
        given["guidance"],
    )
    chosen = settings_of(
        pipe,
        model=given["model"],
        variants=variants_of(entries, densities, shared, given["model"], floor),
        prompts=given["prompts"],
        limit=given["limit"],
        seeds=seeds,
        request=asked,
        fps=given["fps"],
        latents=given["latents"],
        warmup=given["warmup"],
    )
    if given["jobs"] > 1:
        # each process loads its own
        pipe = None
        _release()
    group = Group(rank)
    command = ["dit-accel", *sys.argv[1:]]
    with progress(shown=rank.number == 0) as bars:
        task = bars.add_task("samples", total=None)

        def step(done: float, total: int) -> None:
            bars.update(task, completed=done, total=total)

        outcome = make(
            pipe,
            chosen,
            given["out"],
            command=command,
            jobs=given["jobs"],
            group=group,
            progress=step,
        )
    group.close()
    if rank.number == 0:
        # other processes of a launcher have nothing left to do
        _tell(given, outcome, max(given["jobs"], rank.local_count))
    if not outcome.complete:
        raise typer.Exit(1)


def _tell(given: Mapping[str, Any], outcome: Outcome, jobs: int) -> None:
    from dit_accel.eval import export
    from dit_accel.eval.looks import Choices
    from dit_accel.eval.store import Store
    from dit_accel.eval.summary import summarise

    store = Store(given["out"])
    with progress() as bars:
        task = bars.add_task("figures", total=outcome.finished)
        summary = summarise(
            store,
            Choices(given["features"], given["real"]),
            lambda done, total: bars.update(task, completed=done, total=total),
            jobs=jobs,
        )
    export.write(store, summary)
    print_wide(export.table(summary))
    for note in summary.notes:
        out.print(note, highlight=False)
    reasons: dict[str, list[str]] = {}
    for variant in summary.variants:
        if variant.role == "method":
            for name, reason in variant.absent.items():
                listed = reasons.setdefault(reason, [])
                listed.extend([name] if name not in listed else [])
    for reason, names in reasons.items():
        out.print(f"not there: {', '.join(names)}: {reason}", highlight=False)
    for failure in outcome.failures:
        err.print(
            f"[red]failed:[/red] {failure.variant} {failure.key.name}: {failure.error}",
            highlight=False,
            soft_wrap=True,
        )
    total = f"{outcome.finished} of {outcome.total} samples"
    out.print(f"{total} in {given['out']}", highlight=False, soft_wrap=True)


def _release() -> None:
    """Give back a GPU's memory that nothing uses any more, for other processes."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _device(given: str | None, rank: Rank) -> str:
    import torch

    device = device_of(given)
    if device == "cuda" and rank.count > 1:
        # more processes than GPUs share them
        return f"cuda:{rank.local % max(1, torch.cuda.device_count())}"
    return device


def _numbers(name: str, given: Any, kind: type) -> tuple[Any, ...]:
    """Numbers from ``"0.1,0.2"``, or from what YAML has."""
    if given is None:
        return ()
    listed = given.split(",") if isinstance(given, str) else given
    listed = listed if isinstance(listed, list) else [listed]
    try:
        if any(isinstance(one, bool) for one in listed):
            raise ValueError
        return tuple(kind(one) for one in listed)
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected numbers with commas, got {given!r}") from None


def compare(
    before: Annotated[Path, typer.Argument(help="Folder of a run.")],
    after: Annotated[Path, typer.Argument(help="Folder of another.")],
    every: Annotated[
        bool, typer.Option("--all", help="Also show what did not change beyond noise.")
    ] = False,
    target: Annotated[Path | None, typer.Option("--out", help="Also write JSON there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Say what changed from one run to another, beyond noise."""
    from dit_accel.eval import compare as comparing
    from dit_accel.eval import records
    from dit_accel.eval.figures import MEASURES
    from dit_accel.pipelines import media

    if target is not None:
        media.check_writable(target, force=force)
    with err.status("comparing"):
        found = comparing.compare(before, after)
    for line in found.settings:
        out.print(f"settings: {line}", highlight=False, soft_wrap=True)
    for names, folder in ((found.only_before, before), (found.only_after, after)):
        if names:
            out.print(f"only in {folder}: {', '.join(names)}", highlight=False, soft_wrap=True)
    shown = comparing.table(found, MEASURES, every=every)
    if shown.row_count:
        print_wide(shown)
    else:
        out.print("Nothing changed beyond noise.")
    few = sum(change.verdict == "too few" for change in found.changes)
    if few:
        out.print(
            f"{few} of {len(found.changes)} figures have too few samples to tell (--all)",
            highlight=False,
        )
    for note in found.notes:
        out.print(note, highlight=False)
    if target is not None:
        media.write_text(target, records.dumps(found))
