"""One task a thread, on a CPU.

Torch splits every operation over its threads and waits for the slowest each time. A reference that
runs thousands of small operations then mostly waits, above all on a machine that is busy with
something else; whole chunks that need no one else's result do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeAlias

import torch

Task: TypeAlias = Callable[[], None]


def num_workers(device: torch.device) -> int:
    """How many tasks run at once on this device: torch's threads on a CPU, else one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@contextmanager
def run_tasks(workers: int) -> Iterator[Callable[[list[Task]], None]]:
    """A function that runs tasks and returns when all are done; in place, with one worker.

    The tasks run without gradients, and in the caller's inference mode.
    """
    if workers == 1:

        def serially(tasks: list[Task]) -> None:
            for task in tasks:
                task()

        yield serially
        return

    inference = torch.is_inference_mode_enabled()

    def run(task: Task) -> None:
        # both modes belong to a thread
        with torch.inference_mode(inference), torch.no_grad():
            task()

    threads = torch.get_num_threads()
    try:
        # the number holds for the calling thread alone; new threads start from the last one set
        with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:

            def together(tasks: list[Task]) -> None:
                for _ in pool.map(run, tasks):
                    pass

            yield together
    finally:
        torch.set_num_threads(threads)
