"""How commands answer: tables and sizes for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    """A terminal to print tables to: wide where it is a pipe, and blind to markup in what it prints."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, width=None if stream.isatty() else 160, markup=False, emoji=False, highlight=False
    )


def new_table(*headers: str, **settings: Any) -> Table:
    """A table without rules; rich's settings may be added."""
    from rich.table import Table

    return Table(*headers, box=None, header_style="bold", pad_edge=False, **settings)


def print_json(value: Any) -> None:
    """Numbers are finite: JSON has no infinity."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def pair(first: int, second: int) -> str:
    """``32/8``, or ``32`` where both are the same."""
    return str(first) if first == second else f"{first}/{second}"


def size(count: float) -> str:
    """A number of bytes: ``1.5 MiB``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:.0f} B"
