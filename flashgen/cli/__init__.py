"""The command ``flashgen``.

Exit codes, which scripts rely on: 0 done, 1 a check failed, 2 bad usage or a bad spec.
Errors go to stderr as ``error: FILE:LINE:COL: ...``; a traceback is shown with ``--debug`` only.

The modules beside this one hold a group of commands each. They import only click at the top, and what does
the work inside the command, so that ``flashgen --help`` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

import click

from flashgen._version import __version__
from flashgen.cli.bench import bench
from flashgen.cli.build import build
from flashgen.cli.environment import cache, doctor
from flashgen.cli.lists import specs, targets
from flashgen.cli.plan import plan, render
from flashgen.cli.run import run
from flashgen.cli.tune import tune
from flashgen.errors import FlashgenError

INTERRUPTED = 130  # what shells report for a process that SIGINT ended


class Root(click.Group):
    """The command group, with flashgen's exit codes and error format instead of click's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the pipeline, not of the alphabet."""
        return list(self.commands)

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any
    ) -> NoReturn:
        """Run one command line (default: ``sys.argv[1:]``) and exit with its code."""
        arguments = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in arguments  # wherever it stands, and also where the rest does not parse
        extra.pop("standalone_mode", None)
        warnings.showwarning = _show_warning
        try:
            code = super().main(
                [argument for argument in arguments if argument != "--debug"],
                "flashgen",
                standalone_mode=False,
                **extra,
            )
        except Exception as error:
            if debug:
                raise
            sys.exit(_report(error))
        sys.exit(code)


def _report(error: Exception) -> int:
    """Print an error to stderr as its user reads it; returns the exit code."""
    if isinstance(error, FlashgenError):
        for problem in error.problems:
            _print(str(problem))
        return error.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "flashgen"
        _print(f"{error.format_message()}\n    `{command} --help` shows the usage")
        return error.exit_code
    if isinstance(error, click.ClickException):
        _print(error.format_message())
        return error.exit_code
    if isinstance(error, click.Abort):
        _print("interrupted")
        return INTERRUPTED
    if isinstance(error, OSError):
        _print(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 1
    summary = str(error).partition("\n")[0]
    _print(
        f"internal error: {type(error).__name__}: {summary}\n"
        "    this is a bug in flashgen; --debug shows where"
    )
    return 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """flashgen's own warnings are for its users, who did not write the line that issued them."""
    if category.__module__.startswith("flashgen."):
        click.echo(click.style("warning:", fg="yellow", bold=True) + f" {message}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


def _print(text: str) -> None:
    click.echo(click.style("error:", fg="red", bold=True) + " " + text, err=True)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flashgen", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks; may stand anywhere.")
def main() -> None:
    """Attention kernels from specs: YAML -> plan -> CUDA -> cubin -> torch op.

    SPEC is a YAML file, or the name of a spec in the gallery (`flashgen specs`).
    """


for _command in (build, plan, render, run, bench, tune, specs, targets, cache, doctor):
    main.add_command(_command)
