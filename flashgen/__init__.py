"""flashgen: write an attention as a short YAML spec, get a CUDA kernel solved for your chip.

`import flashgen` is light: names are resolved on first use, so that planning and printing never wait for
torch or CuPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashgen._version import __version__

if TYPE_CHECKING:
    from flashgen.runtime import attention, load, prepare
    from flashgen.spec import AttentionSpec
    from flashgen.spec.trace import exp, floor, log, maximum, minimum, sigmoid, sqrt, tanh, where

_HOME = {
    "AttentionSpec": "flashgen.spec",
    "attention": "flashgen.runtime",
    "load": "flashgen.runtime",
    "prepare": "flashgen.runtime",
    # for masks and scores that are written as Python functions
    **dict.fromkeys(
        ("exp", "floor", "log", "maximum", "minimum", "sigmoid", "sqrt", "tanh", "where"),
        "flashgen.spec.trace",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flashgen' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "AttentionSpec",
    "__version__",
    "attention",
    "exp",
    "floor",
    "load",
    "log",
    "maximum",
    "minimum",
    "prepare",
    "sigmoid",
    "sqrt",
    "tanh",
    "where",
]
