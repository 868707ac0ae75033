"""pydantic's account of what is wrong -> flashgen's `Problem`s: one clear sentence per mistake."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from flashgen.errors import Location, Problem
from flashgen.spec.suggest import closest, did_you_mean, quoted

Path = tuple[str | int, ...]

_OURS = "spec"


def wrong(
    message: str, hint: str | None = None, *, at: Path = (), offset: int | None = None
) -> PydanticCustomError:
    """What a validator raises. `at` leads from the validated value to its wrong part, `offset` into text."""
    context = {"message": message, "hint": hint, "at": at, "offset": offset}
    return PydanticCustomError(_OURS, "{message}", context)


def shown(value: Any) -> str:
    """A wrong value as it stands in a message: short, on one line, and never its whole content."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value) if abs(value) < 10**20 else "a very large number"
        case str():
            return quoted(value)
        case None:
            return "nothing"
        case Mapping() | BaseModel():
            return "a mapping"
        case list() | tuple():
            return "a list"
    return f"of type {type(value).__name__}"


def problems_of(
    error: ValidationError,
    model: type[BaseModel],
    data: Mapping[str, Any],
    locate: Callable[[Path, int | None, bool], Location | None] | None = None,
    reported: Collection[Path] = (),
) -> list[Problem]:
    """One problem per mistake.

    `locate(path, offset, key)` places a value, a character in it, or its key; without it, characters are
    placed in the value itself. `reported` are keys that the
    reader has refused already and left out of `data`: what follows from their absence is not repeated.
    """
    locate = locate or _Unfiled(data)
    problems: dict[Problem, None] = {}
    details = error.errors(include_url=False)
    misspelt = {
        (*loc[:-1], close)
        for loc in (detail["loc"] for detail in details if detail["type"] == "extra_forbidden")
        if (close := closest(str(loc[-1]), _keys(model, loc[:-1])))
    }
    for detail in details:
        if detail["type"] == "missing" and detail["loc"] in misspelt:
            continue  # the unknown key is reported, with this one suggested for it
        if any(detail["loc"] in (path, path[:-1]) for path in reported):
            continue
        kind, value, full = detail["type"], detail["input"], detail["loc"]
        context = detail.get("ctx", {})
        path = _given(data, (*full, *context.get("at", ())))
        dotted = ".".join(map(str, path))
        inside = len(path) > len(full)  # the offset is one into the text as it stands
        place = locate(path, None if inside else context.get("offset"), kind == "extra_forbidden")
        if kind == _OURS:
            problem = Problem(context["message"], place, context["hint"] or None)
        elif kind == "extra_forbidden":
            name, allowed = str(full[-1]), _keys(model, full[:-1])
            problem = Problem(f"unknown key {quoted(name)}", place, did_you_mean(name, allowed, allowed))
        elif kind == "missing":
            problem = Problem(f"key '{full[-1]}' is missing{f' in {dotted}' if dotted else ''}", place)
        else:
            message, hint = _described(kind, value, context, _keys(model, full))
            problem = Problem(f"{dotted} must be {message}, but this is {shown(value)}", place, hint)
        problems[problem] = None
    return list(problems)


def _described(
    kind: str, value: Any, context: Mapping[str, Any], keys: Sequence[str]
) -> tuple[str, str | None]:
    match kind:
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"])
            return f"one of {', '.join(allowed)}", did_you_mean(str(value), allowed) or None
        case "int_type" | "int_parsing" | "int_from_float":
            return "an integer", None
        case "bool_type" | "bool_parsing":
            return "true or false", None
        case "string_type":
            return "text", "put it in quotes" if type(value) is int else None
        case "greater_than_equal":
            return f"at least {context['ge']}", None
        case "less_than_equal":
            return f"at most {context['le']}", None
        case "multiple_of":
            return f"a multiple of {context['multiple_of']}", None
        case "model_type" | "model_attributes_type" | "dict_type":
            return "a mapping", f"keys: {', '.join(keys)}" if keys else None
    return f"valid ({kind.replace('_', ' ')})", None


@dataclass(frozen=True)
class _Unfiled:
    """Places characters of a value that was given in Python: ``attention.mask:1:7``."""

    data: Mapping[str, Any]

    def __call__(self, path: Path, offset: int | None, key: bool) -> Location | None:
        if offset is None:
            return None
        value: Any = self.data
        for step in path:
            value = value[step]
        before = str(value)[:offset]
        return Location(".".join(map(str, path)), before.count("\n") + 1, offset - before.rfind("\n"))


def _keys(model: type[BaseModel], path: Path) -> list[str]:
    """The keys allowed at a path from the root of a spec."""
    inner: Any = model
    for step in path:
        if get_origin(inner) is Mapping:
            inner = get_args(inner)[1]
            continue
        field = inner.model_fields.get(str(step)) if _is_model(inner) else None
        inner = field.annotation if field else None
    return list(inner.model_fields) if _is_model(inner) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _given(data: Any, path: Path) -> Path:
    """The path as far as the user wrote it: `heads: 0` has no `heads.q`."""
    for depth, step in enumerate(path):
        inside = isinstance(data, Mapping) and step in data
        if not inside and not (isinstance(data, list | tuple) and step in range(len(data))):
            return path[:depth]
        data = data[step]
    return path
