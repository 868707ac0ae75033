"""A mask and a score as `flashgen.attention` is given them, made into what a spec says.

Texts, mappings and Python functions become text; tensors are declared from what they are and from how the
texts read them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flashgen.errors import LaunchError, SpecError
from flashgen.runtime.functions import text_of
from flashgen.runtime.inputs import INPUT_DTYPES
from flashgen.spec.gallery import GALLERY
from flashgen.spec.inputs import AXES, TensorInput
from flashgen.spec.syntax import nowhere, split

Expression = str | Mapping[str, Any] | Callable[..., Any]
"""A mask or a score: text of the language, ``{name: value}``, or a Python function of symbols."""

GivenTensor = Tensor | tuple[Tensor, Sequence[str | int]]
"""A tensor, with the names of its axes where they are not to be guessed."""

Axes = tuple[str | int, ...]

_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    **{dtype: name for name, dtype in INPUT_DTYPES.items()},
    torch.uint8: "bool",
}
_LEADING: tuple[Axes, ...] = (("batch",), ("batch", "head"))  # what axes are that no subscript speaks of
_TABLE = 0  # stands for the length of a tensor's own axis


class Given(NamedTuple):
    """What is known of a tensor beside its values and its lengths."""

    name: str
    dtype: torch.dtype
    dims: int
    axes: Axes | None  # as the caller says


@dataclass(frozen=True)
class Formula:
    """What `flashgen.attention` computes, whatever the tensors: JSON texts, and what they may read."""

    mask: str
    score: str = '"score"'
    tensors: tuple[tuple[str, Axes | None, str], ...] = ()  # name, axes (None: the gallery's own), dtype
    params: tuple[str, ...] = ()
    sink: bool = False

    @property
    def key(self) -> str:
        """Depends on nothing but what is asked for, so that another process finds the same."""
        return f"attention/{json.dumps(asdict(self))}"

    def fields(self) -> dict[str, Any]:
        """Those of the spec's `attention`."""
        return {
            "mask": json.loads(self.mask),
            "score": json.loads(self.score),
            "tensors": {
                name: {"index": list(axes), "dtype": dtype}
                for name, axes, dtype in self.tensors
                if axes is not None
            },
            "params": dict.fromkeys(self.params, "runtime"),
            "sink": self.sink,
        }


def texts_of(
    mask: Expression, score: Expression | None, tensors: tuple[str, ...], params: tuple[str, ...]
) -> tuple[str, str]:
    """Mask and score as JSON texts. `tensors` and `params` are the names that functions may take.

    Raises:
        SpecError: a function does what the language has no words for.
    """
    if callable(mask):
        mask = text_of(mask, kind="mask", tensors=tensors, params=params)
    if callable(score):
        score = text_of(score, kind="score", tensors=tensors, params=params)
    return json_text(mask, "mask"), json_text("score" if score is None else score, "score")


def json_text(formula: object, kind: str) -> str:
    """A mask or score, text or mapping, as JSON. Raises `SpecError` for what is neither."""

    def refused(value: object) -> NoReturn:
        hint = None
        if isinstance(formula, Mapping):
            hint = "a number of Python's goes there: int(size)"
        elif isinstance(value, Tensor):
            hint = "a tensor goes into `tensors`, and is read: mask='keep[q, kv]', tensors={'keep': keep}"
        raise SpecError(f"a {type(value).__name__} has no place in a {kind}", hint=hint)

    return json.dumps(formula, sort_keys=True, default=refused)


def given_tensor(name: str, given: GivenTensor) -> Given:
    """What is known of a tensor that a caller passes. Raises `LaunchError` for what is none."""
    if not (isinstance(given, Tensor) or _is_pair(given)):
        raise LaunchError(
            f"'{name}' is a {type(given).__name__}, not a tensor",
            hint=f"tensors={{'{name}': tensor}}, or (tensor, ['head', 'q', 'kv']) with its axes",
        )
    tensor = bare(given)
    if isinstance(given, Tensor):
        return Given(name, tensor.dtype, tensor.dim(), None)
    # under torch.compile, index() makes a number of a symbolic length
    axes = tuple(index(axis) if isinstance(axis, int) else axis for axis in given[1])
    return Given(name, tensor.dtype, tensor.dim(), axes)


def _is_pair(given: object) -> bool:
    if not isinstance(given, tuple) or len(given) != 2:
        return False
    tensor, axes = given
    return isinstance(tensor, Tensor) and isinstance(axes, list | tuple)


def bare(given: GivenTensor) -> Tensor:
    """The tensor itself."""
    return given if isinstance(given, Tensor) else given[0]


@lru_cache(maxsize=1024)
def tables(texts: tuple[str, str], tensors: tuple[Given, ...]) -> tuple[tuple[int, int], ...]:
    """Which dimensions are axes of a tensor's own, as (tensor, dimension): their length is of the formula.

    Raises `SpecError` where the axes of a tensor cannot be made out.
    """
    return tuple(
        (at, dim)
        for at, tensor in enumerate(tensors)
        if not isinstance(axes := _axes(tensor, texts), TensorInput)
        for dim, axis in enumerate(axes)
        if axis == _TABLE
    )


@lru_cache(maxsize=1024)
def formula_of(
    texts: tuple[str, str],
    tensors: tuple[Given, ...],
    lengths: tuple[int, ...],
    params: tuple[str, ...],
    sink: bool,
) -> Formula:
    """The formula of a call; `lengths` are those of `tables`.

    Raises:
        SpecError: the axes of a tensor cannot be made out.
        LaunchError: a tensor's dtype is none that a formula reads.
    """
    left = iter(lengths)
    declared = []
    for tensor in tensors:
        if tensor.dtype not in _DTYPE_NAMES:
            cast = "float" if tensor.dtype.is_floating_point else "int"
            known = ", ".join(map(str, INPUT_DTYPES.values()))
            raise LaunchError(
                f"{tensor.name} is {tensor.dtype}; masks and scores read {known}",
                hint=f"cast it: {tensor.name}.{cast}()",
            )
        dtype, axes = _DTYPE_NAMES[tensor.dtype], _axes(tensor, texts)
        if isinstance(axes, TensorInput):
            # What the gallery says besides (that documents are sorted) holds where the dtype is its own.
            declared.append((tensor.name, None if axes.dtype == dtype else axes.index, dtype))
        else:
            resolved = tuple(next(left) if axis == _TABLE else axis for axis in axes)
            declared.append((tensor.name, resolved, dtype))
    return Formula(texts[0], texts[1], tuple(declared), params, sink)


def _axes(tensor: Given, texts: tuple[str, str]) -> Axes | TensorInput:
    """As said, or as the tensor is read: by its subscripts, or by the gallery's entry that brings it."""
    if tensor.axes is not None:
        return tensor.axes
    trees = [split(text, nowhere)[0] for text in map(json.loads, texts) if isinstance(text, str)]
    if subscripts := [found for tree in trees for found in _subscripts(tensor.name, tree)]:
        return _of_subscripts(tensor, subscripts)
    for entry in _entries(texts):
        for brought in GALLERY[entry].tensors:
            if brought.name == tensor.name:
                return brought
    if tensor.dims == 0:
        return ()
    raise SpecError(
        f"the axes of '{tensor.name}' are not known: nothing reads it with subscripts",
        hint=f"tensors={{'{tensor.name}': (tensor, ['head', 'q', 'kv'])}}, say; an axis is one of "
        f"{', '.join(AXES)}, or a length",
    )


def _subscripts(name: str, tree: ast.expr) -> Iterator[list[ast.expr]]:
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id=read), slice=inside) if read == name:
                yield list(inside.elts) if isinstance(inside, ast.Tuple) else [inside]


def _of_subscripts(tensor: Given, subscripts: list[list[ast.expr]]) -> Axes:
    lengths = {len(subscript) for subscript in subscripts}
    missing = tensor.dims - max(lengths)
    if len(lengths) > 1 or not 0 <= missing <= len(_LEADING):
        counts = " and ".join(map(str, sorted(lengths)))
        raise SpecError(
            f"'{tensor.name}' has {tensor.dims} dimensions, and is read with {counts} subscripts",
            hint=f"name its axes: tensors={{'{tensor.name}': (tensor, ['batch', 'kv'])}}, say",
        )
    leading: Axes = _LEADING[missing - 1] if missing else ()
    read = (_axis([ast.unparse(part) for part in parts]) for parts in zip(*subscripts, strict=True))
    return (*leading, *read)


def _axis(written: list[str]) -> str | int:
    """Of what stands at one place of a tensor's subscripts: keys are read at q too, ``doc[q] == doc[kv]``."""
    named = [text for text in written if text in AXES]
    return "kv" if "kv" in named else named[0] if named else _TABLE


def _entries(texts: tuple[str, str]) -> list[str]:
    """The gallery's entries that the texts speak of, and those that these do."""
    found: list[str] = []
    pending = [name for text in map(json.loads, texts) for name in _names(text)]
    while pending:
        name = pending.pop()
        if name in GALLERY and name not in found:
            found.append(name)
            pending.extend(_names(GALLERY[name].formula))
    return found


def _names(text: Any) -> list[str]:
    if isinstance(text, Mapping):
        return list(text)
    tree = split(text, nowhere)[0]
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


__all__ = [
    "Expression",
    "Formula",
    "Given",
    "GivenTensor",
    "bare",
    "formula_of",
    "given_tensor",
    "tables",
    "texts_of",
]
