"""Make the samples of a run, in one process or in several, and take up what was left.

Processes share the prompts, never the variants of one prompt: what is compared was computed by the
same process. A sample depends on its seed alone, so that it does not matter who makes it.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.errors import InputError
from dit_accel.eval.measure import Bench, load_for
from dit_accel.eval.samples import Failure, Key, Settings
from dit_accel.eval.store import Store

Progress = Callable[[float, int], None]
"""Called with how many samples are done, parts of one included, and of how many."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of several processes this is.

    Attributes:
        number, count: its number, and of how many.
        local, local_count: the same on this machine.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1

    def sharing(self, device: str) -> int:
        """How many processes use one device of a kind: all the CPU, and GPUs evenly."""
        gpus = torch.cuda.device_count() if device == "cuda" else 1
        return -(-self.local_count // max(1, gpus))


def rank_of_environment() -> Rank:
    """As ``torchrun`` and ``accelerate launch`` say."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return Rank(*(int(os.environ.get(name, default)) for name, default in names.items()))


def settle(device: str) -> None:
    """Make a GPU the current one, so that nothing of this process comes to lie on another."""
    where = torch.device(device)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run stands.

    Attributes:
        finished, total: samples.
        failures: that were tried, with the reasons.
        missing: names of samples that nobody got to.
    """

    finished: int
    total: int
    failures: tuple[Failure, ...]
    missing: tuple[Key, ...]

    @property
    def complete(self) -> bool:
        """Whether every sample is there."""
        return self.finished == self.total


def outcome_of(store: Store) -> Outcome:
    """How the run in a store stands."""
    keys = store.run().settings.every_key()
    there = store.finished()
    failures = tuple(store.failures())
    failed = {failure.key for failure in failures}
    missing = tuple(key for key in keys if key not in there and key not in failed)
    return Outcome(sum(key in there for key in keys), len(keys), failures, missing)


def share(settings: Settings, rank: Rank) -> list[Key]:
    """The samples of one process: every ``count``-th prompt."""
    return [key for key in settings.every_key() if key.prompt % rank.count == rank.number]


def work(
    store: Store,
    settings: Settings,
    pipe: Any,
    rank: Rank = Rank(),
    progress: Progress | None = None,
) -> None:
    """Make every sample of a process's share that is not there yet.

    What fails is noted, and the others are made all the same, unless the GPU does not answer this
    process any more, as after an illegal memory access: that leaves the rest missing.
    """
    bench = Bench(pipe, settings, rank.sharing(settings.device))
    mine = share(settings, rank)
    there = store.finished()
    done = sum(key in there for key in mine)

    def tell(part: float = 0.0) -> None:
        if progress is not None:
            progress(done + part, len(mine))

    tell()
    for key in mine:
        if key in there:
            continue
        try:
            bench.make(store, key, lambda step, steps: tell(0.99 * step / steps))
        except Exception as error:
            text = settings.prompts[key.prompt].text
            told = f"{type(error).__name__}: {error}"
            store.fail(Failure(*_names(key, text), told, traceback.format_exc()))
            if not _device_goes_on():
                return
        done += 1
        tell()


def _device_goes_on() -> bool:
    """Whether a sample that failed leaves a GPU that can be used; its memory is given back."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _names(key: Key, text: str) -> tuple[str, int, str, int]:
    return key.variant, key.prompt, text, key.seed


# -- several processes -----------------------------------------------------------------------------


def run_jobs(
    store: Store, settings: Settings, jobs: int, progress: Progress | None = None
) -> list[str]:
    """Make all samples with processes of this machine, each with a GPU of its own where it can.

    Returns:
        What to say of processes that ended badly.
    """
    context = multiprocessing.get_context("spawn")
    gpus = torch.cuda.device_count() if settings.device == "cuda" else 0
    threads = max(1, torch.get_num_threads() // jobs)
    workers = [
        context.Process(target=_worker, args=(str(store.root), i, jobs, gpus, threads), daemon=True)
        for i in range(jobs)
    ]
    for worker in workers:
        worker.start()
    keys = set(settings.every_key())
    try:
        while any(worker.is_alive() for worker in workers):
            _tell(store, keys, progress)
            time.sleep(0.5)
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.join()
    _tell(store, keys, progress)
    return [
        f"process {i} ended with code {worker.exitcode}"
        for i, worker in enumerate(workers)
        if worker.exitcode
    ]


def _tell(store: Store, keys: set[Key], progress: Progress | None) -> None:
    if progress is not None:
        done = len(keys & store.finished()) + len(store.failures())
        progress(done, len(keys))


def _worker(root: str, number: int, count: int, gpus: int, threads: int) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    store = Store(root)
    settings = store.run().settings
    device = f"cuda:{number % gpus}" if gpus else settings.device
    settle(device)
    work(store, settings, load_for(settings, device), Rank(number, count, number, count))


def _follow_parent() -> None:
    """End with the process that started this one: killed outright, it ends nobody itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Group:
    """The processes that ``torchrun`` or ``accelerate launch`` started; of one it does nothing.

    Args:
        rank: this process.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        if rank.count > 1 and not torch.distributed.is_initialized():
            # a process may wait for the others as long as the longest share takes
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))

    def wait(self) -> None:
        """For all others."""
        if self.rank.count > 1:
            torch.distributed.barrier()

    def first(self, action: Callable[[], Any]) -> None:
        """Let the first process do something, and the others wait; an error of it is everyone's.

        Raises:
            InputError: the action raised one.
        """
        told: list[str | None] = [None]
        if self.rank.number == 0:
            try:
                action()
            except InputError as error:
                told = [str(error)]
        if self.rank.count > 1:
            torch.distributed.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise InputError(told[0])

    def close(self) -> None:
        """No more waiting."""
        if self.rank.count > 1:
            torch.distributed.destroy_process_group()


def run(
    pipe: Any,
    settings: Settings,
    out: str | Path,
    *,
    command: Sequence[str] = (),
    jobs: int = 1,
    group: Group | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Make a run, or what is missing of it.

    Args:
        pipe: the model, loaded where it is to run; not used with several jobs.
        settings: of the run; a folder with others is refused.
        out: the folder.
        command: for the record.
        jobs: processes to start on this machine.
        group: of processes that somebody else started.
        progress: of this process's share; of everything with several jobs.

    Returns:
        How the run stands, once every process of the group has done its share.

    Raises:
        InputError: the folder holds something else.
    """
    if jobs < 1:
        raise InputError(f"jobs: expected a positive integer, got {jobs}")
    group = group or Group(Rank())
    if jobs > 1 and group.rank.count > 1:
        raise InputError(
            f"jobs: expected 1 within {group.rank.count} processes that a launcher started, got "
            f"{jobs}"
        )
    store = Store(out)
    group.first(lambda: store.claim(settings, tuple(command)))
    ended: list[str] = []
    if jobs > 1:
        ended = run_jobs(store, settings, jobs, progress)
    else:
        work(store, settings, pipe, group.rank, progress)
    group.wait()
    outcome = outcome_of(store)
    if ended and outcome.missing:
        raise RuntimeError(f"{'; '.join(ended)}; {len(outcome.missing)} samples are missing")
    return outcome
