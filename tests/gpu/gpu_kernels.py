"""Kernels for the GPU tests: by family, built once however many shapes they are tried with."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import cache
from typing import NoReturn

import torch
from attention_cases import Case

from flashgen.arch import arch
from flashgen.errors import PlanError
from flashgen.plan import solve
from flashgen.runtime import Kernel, load
from flashgen.runtime.devices import target_of
from flashgen.spec import parse_spec

FAMILIES = ("sm80", "sm90")
HANG_S = 10.0  # thousands of times what the longest of these launches takes


def kernel_of(case: Case, family: str) -> Kernel:
    """The kernel of `family` for a case: its lengths, batch and number of heads play no part."""
    general = replace(case, heads_kv=1, batch=4, seqlen_q=1024, seqlen_kv=1024)
    tiles = {} if case.tiles == "auto" else case.tiles
    schedule = {**tiles.get("schedule", {}), "family": family}
    return _kernel(replace(general, tiles={**tiles, "schedule": schedule}).text())


@cache
def missing(family: str) -> str | None:
    """Why kernels of `family` cannot run here, or None."""
    device = torch.device("cuda", 0)
    if family == "sm90" and torch.cuda.get_device_capability(device) != (9, 0):
        return f"the sm90 family needs compute capability 9.0; this is {torch.cuda.get_device_name(device)}"
    try:
        solve(Case(tiles={"schedule": {"family": family}}).spec(), arch(target_of(device)))
    except PlanError as error:
        return f"no plan of family {family}: {error}"
    return None


@cache
def _kernel(text: str) -> Kernel:
    return load(parse_spec(text, "case.yaml"))


def finish(case: Case, family: str) -> None:
    """Wait for the current stream; ends the process when it takes longer than any kernel does.

    Nothing else ends a kernel that hangs, and whatever waits for the GPU waits for ever.
    """
    event = torch.cuda.Event()
    event.record()
    until = time.monotonic() + HANG_S
    while not event.query():
        if time.monotonic() > until:
            _give_up(f"{family} does not finish within {HANG_S:g} s: {case}")


def _give_up(message: str) -> NoReturn:
    os.write(2, f"\nHANG: {message}\n".encode())  # pytest's capture would be lost
    os._exit(3)
