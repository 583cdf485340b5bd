"""Many small trainings on one machine: a pool of processes that share a GPU, or one process after another on a CPU."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from tqdm import tqdm

Job = dict[str, Any]


def run(
    jobs: Sequence[Job], work: Callable[[Job], str], ready: Callable[[Job], bool], *, workers: int, minutes: float
) -> list[Job]:
    """Run every job once it is ``ready`` (its fp32 model is there), in the order given; returns those not started when
    the minutes were over. ``work`` runs in a process of its own and returns a line to show; a job that fails is told
    on stderr and the others go on."""
    waiting, running = list(jobs), dict[Future[str], Job]()
    end = time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    quiet = not sys.stderr.isatty()
    with ProcessPoolExecutor(workers, mp_context=context) as pool, tqdm(total=len(jobs), disable=quiet) as bar:
        while (waiting and time.monotonic() < end) or running:
            for job in [j for j in waiting if ready(j)][: workers - len(running)]:
                if time.monotonic() < end:
                    waiting.remove(job)
                    running[pool.submit(_guarded, work, job)] = job
            if not running:
                break  # what is left waits for a job that failed
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                running.pop(future)
                bar.update()
                tqdm.write(future.result(), file=sys.stderr)
    return waiting


def _guarded(work: Callable[[Job], str], job: Job) -> str:
    try:
        return work(job)
    except Exception:  # one run that fails must not end the table
        return f"failed: {job}\n{traceback.format_exc()}"
