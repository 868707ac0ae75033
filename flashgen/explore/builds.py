"""Many plans compiled at a time, into the cache from where whoever asks next takes them.

Imports no torch: every worker process imports this module.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from flashgen.build import build
from flashgen.errors import BuildError
from flashgen.plan import KernelPlan


def build_all(plans: Sequence[KernelPlan], done: Callable[[], None]) -> list[str | None]:
    """Compile plans in parallel processes; `done` is called after each.

    Returns for each plan None, or why it is not to be used: it does not compile, it spills, or takes other
    resources than planned.
    """
    if not plans:
        return []
    workers = min(len(plans), os.cpu_count() or 1)
    # spawned, not forked: a forked child inherits locks of threads, and a CUDA context, that it cannot use
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _leave_interrupts) as pool:
        futures = [pool.submit(_failure, plan) for plan in plans]
        try:
            for _ in as_completed(futures):
                done()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _failure(plan: KernelPlan) -> str | None:
    try:
        build(plan, on_mismatch="raise")
    except BuildError as error:
        return error.problems[0].message
    return None


def _leave_interrupts() -> None:
    """Ctrl-C reaches the whole process group; the parent alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


__all__ = ["build_all"]
