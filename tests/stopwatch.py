"""Time limits of tests, in seconds of a machine that is quiet.

A busy machine is slower even in CPU time (shared caches, a core's other thread, its clock): a limit in plain
seconds either fails there or is too wide to notice anything.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUIET = 0.045
"""CPU seconds that `_work` takes on a quiet core of a server; `import sympy` takes 0.45 there."""


def _work() -> None:
    ast.unparse(ast.parse(inspect.getsource(argparse)))


def spent() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def slowness() -> float:
    """How many times longer than on a quiet machine Python's work takes here and now; at least 1. Of several
    tries the slowest: what slowed the block down may have passed in part.
    """
    seconds = []
    for _ in range(5):
        started = time.process_time()
        _work()
        seconds.append(time.process_time() - started)
    return max(1.0, max(seconds) / QUIET)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails where the block, and the processes it waited for, take more CPU time than a quiet machine may."""
    started = spent()
    try:
        yield
    finally:
        took = spent() - started
        assert took < seconds or took < seconds * slowness(), f"took {took:.2f} s of {seconds}"
