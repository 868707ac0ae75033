"""What a spec declares under ``attention``: mask and score, and the parameters and tensors they take."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from flashgen.errors import SpecError
from flashgen.spec.inputs import AXES, DType, TensorInput
from flashgen.spec.mathematics import DeclaredParameter, constant
from flashgen.spec.problems import shown, wrong
from flashgen.spec.record import Flag, Record, as_text, size
from flashgen.spec.suggest import did_you_mean, quoted
from flashgen.spec.symbols import SCORE_VARIABLES
from flashgen.spec.syntax import nowhere, split
from flashgen.spec.values import CONSTANTS, FUNCTIONS

_VARIABLES = (*SCORE_VARIABLES, "q_index", "head_dim")
# Members of the kernels' parameter struct, and what the mask's preparation reads and writes.
_GENERATED = re.compile(r"sink|key_first|key_last|key_found\d*|tile_counts|tile_list|.*_stride")


def check_name(name: str, what: str) -> None:
    """Holds the name of a tensor or a parameter to what can stand in expressions and in CUDA.

    Raises:
        PydanticCustomError: it cannot.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) or "__" in name:
        form = "at most 32 of a-z, 0-9 and '_', beginning with a letter"
        raise wrong(f"{quoted(name)} cannot name a {what}", form, at=(name,))
    if name in _VARIABLES or name in FUNCTIONS or name in CONSTANTS:
        raise wrong(f"'{name}' is a word of the language: a {what} needs another name", at=(name,))
    if keyword.iskeyword(name) or _GENERATED.fullmatch(name):
        raise wrong(f"'{name}' is a word of the generated code: a {what} needs another name", at=(name,))


class Formula(Record):
    """A mask or a score: the text of an expression. ``{window: 4096}`` is short for ``window(4096)``."""

    text: str

    @model_validator(mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"text": value}
        if isinstance(value, bool):
            return {"text": str(value).lower()}
        if not isinstance(value, Mapping):
            raise wrong(f"an expression or {{name: value}} is due here, but this is {shown(value)}")
        if set(value) == {"text"}:  # as Formula(text=...) gives it
            return value
        if len(value) != 1:
            raise wrong(f"one name is due here, not {len(value)}", "write an expression: causal and document")
        ((name, given),) = value.items()
        if not isinstance(name, str) or not name.isidentifier():
            raise wrong(f"{shown(name)} is no name")
        arguments = given if isinstance(given, list | tuple) else [given]
        for argument in arguments:
            if not isinstance(argument, int | float | str) or isinstance(argument, bool):
                raise wrong(f"{name} takes numbers, but this is {shown(argument)}", at=(name,))
            try:
                split(str(argument), nowhere)
            except SpecError as error:  # "3) or (true" would be no argument where it is put in brackets
                (problem,) = error.problems
                raise wrong(f"{name} takes numbers: {problem.message}", problem.hint, at=(name,)) from None
        return {"text": f"{name}({', '.join(map(str, arguments))})"}


class Parameter(Record):
    """A number that mask or score names: a constant, or one that is passed at call time.

    `value` is the constant as written. `runtime` is its kind, where it is passed: ``"any"`` is an integer
    where an expression needs one, else a float. `min` is the least that an integer may be.
    """

    value: Annotated[str, BeforeValidator(as_text)] | None = None
    runtime: Literal["int", "float", "any"] | None = None
    min: Annotated[int, size(-(2**31), 2**31 - 1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if value == "runtime":
            return {"runtime": "any"}
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return {"value": value}
        if isinstance(value, Mapping) and ("runtime" in value or "value" in value):
            return value
        forms = "write a number, 'runtime', {runtime: int, min: 0} or {runtime: float}"
        raise wrong(f"a parameter is a number or 'runtime', but this is {shown(value)}", forms)

    @model_validator(mode="after")
    def _consistent(self) -> Parameter:
        if self.value is not None:
            if self.runtime is not None or self.min is not None:
                raise wrong("a parameter is a constant or passed at call time, not both")
            try:
                constant(self.value)
            except SpecError as error:
                (problem,) = error.problems
                offset = problem.location.column - 1 if problem.location else 0
                message = f"a parameter is a number or 'runtime': {problem.message}"
                raise wrong(message, offset=offset) from None
        if self.min is not None and self.runtime == "float":
            raise wrong("only an integer can be held to a least value", "write {runtime: float}")
        return self

    def declared(self, name: str) -> DeclaredParameter:
        """The declaration as the mathematics takes it."""
        return DeclaredParameter(name, self.value, self.runtime, self.min)


class Tensor(Record):
    """A tensor that mask or score reads: an axis for each dimension, as `TensorInput` says."""

    index: tuple[str | int, ...]
    dtype: DType
    grad: Flag = False
    sorted: Flag = False

    @field_validator("index", mode="before")
    @classmethod
    def _axes(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise wrong(f"index must be a list of axes, but this is {shown(value)}", "write [head, q, kv]")
        axes: list[str | int] = []
        for at, axis in enumerate(value):
            if type(axis) is int and 1 <= axis <= 2**20:
                axes.append(axis)
                continue
            named = re.sub(r"\s*-\s*", " - ", axis) if isinstance(axis, str) else ""
            if named not in AXES:
                allowed = [*AXES, "a length from 1 to 2^20"]
                hint = did_you_mean(named, AXES, allowed)
                raise wrong(f"there is no axis {shown(axis)}", hint, at=(at,))
            if named in axes:
                raise wrong(f"axis '{named}' stands twice", at=(at,))
            axes.append(named)
        return tuple(axes)

    @model_validator(mode="after")
    def _consistent(self) -> Tensor:
        if self.grad and self.dtype in ("int32", "bool"):
            raise wrong(f"a tensor of {self.dtype} has no gradient", "leave 'grad' out", at=("grad",))
        if self.sorted and (self.dtype != "int32" or self.index[-1:] != ("kv",)):
            raise wrong("only an int32 tensor whose last axis is kv can be sorted", at=("sorted",))
        return self

    def named(self, name: str) -> TensorInput:
        """The declaration as the mathematics takes it."""
        return TensorInput(name, self.index, self.dtype, self.grad, self.sorted)


__all__ = ["Formula", "Parameter", "Tensor", "check_name"]
