"""Arguments that several commands share."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from flashgen.arch import Arch
    from flashgen.spec import AttentionSpec

_PACKAGE = Path(__file__).resolve().parent.parent
_Command = TypeVar("_Command", bound=Callable[..., Any])


def gallery() -> dict[str, Path]:
    """The shipped specs by name: ``flashgen/_specs`` in a wheel, the top-level ``specs/`` in a checkout."""
    packaged = _PACKAGE / "_specs"
    folder = packaged if packaged.is_dir() else _PACKAGE.parent / "specs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def spec_path(value: str) -> Path:
    """A spec's file, or the one in the gallery that has this name."""
    path = Path(value)
    if path.is_file():
        return path
    shipped = gallery()
    if value in shipped:
        return shipped[value]
    close = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {close[0]}, of the gallery?" if close else "`flashgen specs` lists the gallery"
    raise click.UsageError(f"{value}: no such file; {hint}", click.get_current_context(silent=True))


def spec_argument(command: _Command) -> _Command:
    return click.argument("spec_file", metavar="SPEC", type=spec_path)(command)


def specs_argument(command: _Command) -> _Command:
    return click.argument("spec_files", metavar="SPEC...", type=spec_path, nargs=-1, required=True)(command)


def target_option(command: _Command) -> _Command:
    return click.option(
        "--target", metavar="TARGET", help="The chip, as `flashgen targets` lists them; overrides the spec's."
    )(command)


def json_option(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, to stdout.")(
        command
    )


def read_spec(path: Path, target: str | None) -> tuple[AttentionSpec, Arch]:
    """The spec and the chip it is for: ``--target``, else the spec's own, else the default.

    Raises SpecError where the file is no spec, or the target is not one of ours.
    """
    from flashgen.arch import DEFAULT_TARGET, arch
    from flashgen.spec import load_spec

    spec = load_spec(path)
    if target is not None:
        return spec, arch(target)
    if spec.target == "auto":
        return spec, arch(DEFAULT_TARGET)
    return spec, arch(spec.target, location=spec.locate("target"))


def torch_needed() -> None:
    """Raises LaunchError, with how to get it, where torch cannot be imported."""
    from importlib.util import find_spec

    from flashgen.errors import LaunchError

    if find_spec("torch") is None:
        raise LaunchError(
            "running a kernel needs torch, which is not installed", hint="pip install 'flashgen[torch]'"
        )
