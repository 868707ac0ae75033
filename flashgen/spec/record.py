"""The base of a spec's parts, and what their fields have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashgen.errors import SpecError
from flashgen.spec.problems import problems_of, shown, wrong

Flag = Annotated[bool, Field(strict=True)]
_Item = TypeVar("_Item", covariant=True)


class Record(BaseModel):
    """A frozen part of a spec. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise SpecError(problems_of(error, type(self), data)) from None

    # As in pydantic's own subclasses: parts of a larger spec are validated without this __init__, so that
    # their mistakes are collected with the others instead of ending the validation.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class Named(Mapping[str, _Item]):
    """Parts of a spec by name: a mapping that cannot change, so that a spec can be hashed."""

    def __init__(self, items: Mapping[str, _Item]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: str) -> _Item:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def size(least: int, most: int, multiple: int = 1) -> Any:
    """An integer's limits, for `Annotated`."""
    return Field(strict=True, ge=least, le=most, multiple_of=multiple)


def both(value: Any, name: str, keys: tuple[str, str]) -> Any:
    """``32`` as short for ``{q: 32, kv: 32}``."""
    if type(value) is int:
        return dict.fromkeys(keys, value)
    if isinstance(value, Mapping | BaseModel):
        return value
    form = f"{{{keys[0]}: .., {keys[1]}: ..}}"
    raise wrong(f"{name} must be an integer or {form}, but this is {shown(value)}")


def as_text(value: Any) -> Any:
    """A number where the text of an expression is due; anything else as it is."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


__all__ = ["Flag", "Named", "Record", "as_text", "both", "size"]
