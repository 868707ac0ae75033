"""Masks and scores written as Python functions: their texts, kept for functions that cannot have changed.

A lambda written in a call is another object each time. What it stands for is its code and what the code takes
from around it. Where that is plain numbers and the functions of `flashgen.spec.trace`, the text is kept under
code and numbers; any other function is run anew by each call.
"""

from __future__ import annotations

import builtins
import dis
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal

from flashgen.spec import trace as language

_TEXTS_MAX = 1024

# What code may take from around it, besides numbers: it gives the same, whenever it is called.
_MODULES = frozenset({"flashgen", "flashgen.spec.trace", "math"})
_ATTRIBUTES = frozenset({*language.__all__, "pi", "e"})  # of these modules
_FUNCTIONS = frozenset(
    id(function) for function in (*map(vars(language).get, language.__all__), math.floor, abs, int, float)
)
_READS = frozenset({"LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD"})
_NOT_FOLLOWED = frozenset({"STORE_DEREF", "DELETE_DEREF", "MAKE_FUNCTION"})

_texts: dict[tuple[object, ...], str] = {}


def text_of(
    function: Callable[..., Any],
    *,
    kind: Literal["mask", "score"],
    tensors: tuple[str, ...],
    params: tuple[str, ...],
) -> str:
    """What `flashgen.spec.trace.trace` returns, and raises, for the function as it is now."""
    known = _known(function)
    key = (kind, tensors, params, known)
    if known is not None and key in _texts:
        return _texts[key]
    text = language.trace(function, kind=kind, tensors=tensors, params=params)
    if known is not None:
        if len(_texts) >= _TEXTS_MAX:
            _texts.clear()
        _texts[key] = text
    return text


def _known(function: Callable[..., Any]) -> tuple[object, ...] | None:
    """Everything that a function's text depends on; None where that cannot be told."""
    if type(function) is not FunctionType or function.__dict__ or function.__kwdefaults__:
        return None  # with a __dict__, it may say that it wraps another
    names = _globals_of(function.__code__)
    if names is None:
        return None
    found: list[object] = [function.__code__]
    for value in _values(function, names):
        kind = type(value)
        if kind is int or kind is bool or kind is float:
            found.append((kind, repr(value)))  # 1 equals True and 1.0, 0.0 equals -0.0
        elif id(value) in _FUNCTIONS or (kind is ModuleType and value.__name__ in _MODULES):  # type: ignore[attr-defined]
            found.append(id(value))
        else:
            return None
    return tuple(found)


def _values(function: FunctionType, names: tuple[str, ...]) -> Iterator[object]:
    """Defaults, what is closed over, and globals."""
    yield from function.__defaults__ or ()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            yield None
    for name in names:
        yield function.__globals__.get(name, vars(builtins).get(name))


@lru_cache(maxsize=_TEXTS_MAX)
def _globals_of(code: CodeType) -> tuple[str, ...] | None:
    """The globals that code reads; None where it does more than reading them, and attributes of modules."""
    names = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in _NOT_FOLLOWED:
            return None
        if instruction.opcode in dis.hasname:
            if instruction.opname not in _READS:
                return None
            if instruction.opname == "LOAD_GLOBAL":
                names.append(instruction.argval)
            elif instruction.argval not in _ATTRIBUTES:
                return None
    return tuple(names)


__all__ = ["text_of"]
