"""The one Jinja environment, and where the templates lie."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flashgen.codegen.elements import elements
from flashgen.codegen.layout import wrapped
from flashgen.codegen.printer import cuda

_PACKAGE = Path(__file__).resolve().parent.parent


def templates_dir() -> Path:
    """The templates: ``flashgen/_templates`` in a wheel, the top-level ``templates/`` in a checkout."""
    packaged = _PACKAGE / "_templates"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "templates"


@cache
def environment() -> Environment:
    """A template that names something the plan does not have fails; it never prints nothing."""
    env = Environment(
        loader=FileSystemLoader(templates_dir()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    env.filters["cuda"] = cuda
    env.filters["elements"] = elements
    env.filters["wrapped"] = wrapped
    return env
