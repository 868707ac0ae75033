"""The part of a spec that is mathematics: O = softmax(score, where mask) V."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import sympy
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from sympy import Expr
from sympy.logic.boolalg import Boolean

from flashgen.errors import SpecError
from flashgen.spec.declarations import Formula, Parameter, Tensor, check_name
from flashgen.spec.expression import Kind, parse_expression
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.label import mask_label, score_label
from flashgen.spec.mathematics import Align, Context, Mathematics, read_mask, read_mathematics
from flashgen.spec.problems import wrong
from flashgen.spec.record import Flag, Named, Record, as_text, both, size

if TYPE_CHECKING:
    from flashgen.spec.derivation import MaskDerivation

HeadCount = Annotated[int, size(1, 4096)]
HeadDimension = Annotated[int, size(8, 256, 8)]
_T = TypeVar("_T")


class Heads(Record):
    """Query heads, and the key/value heads that groups of them share (GQA; MQA where kv is 1)."""

    q: HeadCount
    kv: HeadCount

    @model_validator(mode="before")
    @classmethod
    def _same(cls, value: Any) -> Any:
        return both(value, "heads", ("q", "kv"))

    @model_validator(mode="after")
    def _grouped(self) -> Heads:
        if self.q % self.kv:
            raise wrong(f"heads.q must be a multiple of heads.kv, but {self.q} is not one of {self.kv}")
        return self

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q // self.kv


class HeadDim(Record):
    """Size of a head: of queries and keys, and of values and outputs."""

    qk: HeadDimension
    v: HeadDimension

    @model_validator(mode="before")
    @classmethod
    def _same(cls, value: Any) -> Any:
        return both(value, "head_dim", ("qk", "v"))


def _each_named(what: str) -> Callable[[Mapping[str, _T]], Named[_T]]:
    def named(items: Mapping[str, _T]) -> Named[_T]:
        for name in items:
            check_name(name, what)
        return Named(items)

    return named


class Attention(Record):
    """The mathematics, as written, and as it was read.

    The fields are the text. What the rest of flashgen works on are the properties: expressions in the symbols
    of `flashgen.spec.symbols`, with names of the gallery and constants filled in.
    """

    heads: Heads
    head_dim: HeadDim
    dtype: Literal["bf16", "fp16"] = "bf16"
    scale: Annotated[str, BeforeValidator(as_text)] = "1/sqrt(head_dim)"
    align: Align = "bottom_right"
    params: Annotated[
        Mapping[str, Parameter], Field(validate_default=True), AfterValidator(_each_named("parameter"))
    ] = {}
    tensors: Annotated[
        Mapping[str, Tensor], Field(validate_default=True), AfterValidator(_each_named("tensor"))
    ] = {}
    mask: Formula = Formula(text="full")
    score: Formula = Formula(text="score")
    sink: Annotated[Flag, Field(validate_default=True)] = False

    @field_validator("scale")
    @classmethod
    def _positive(cls, text: str, info: ValidationInfo) -> str:
        dims = info.data.get("head_dim") or HeadDim(qk=64, v=64)  # a wrong one is reported already
        with _told_of("scale"):
            value = scale_value(text, dims.qk, dims.v)
        if not (math.isfinite(value) and value > 0):
            raise wrong(f"scale must be a positive number, but this is {value:g}")
        return text

    @field_validator("tensors")
    @classmethod
    def _apart(cls, tensors: Named[Tensor], info: ValidationInfo) -> Named[Tensor]:
        for name in tensors:
            if name in info.data.get("params", ()):
                raise wrong(f"'{name}' is a parameter already: a tensor needs another name", at=(name,))
        return tensors

    @field_validator("mask")
    @classmethod
    def _condition(cls, mask: Formula, info: ValidationInfo) -> Formula:
        if (context := _context(info.data)) is not None:
            with _told_of("mask", mask.text):
                read_mask(mask.text, context)
        return mask

    @field_validator("score")
    @classmethod
    def _number(cls, score: Formula, info: ValidationInfo) -> Formula:
        if (context := _context(info.data)) is not None:
            mask = info.data.get("mask") or Formula(text="full")  # a wrong one is reported already
            with _told_of("score", score.text):
                read_mathematics(mask.text, score.text, context)
        return score

    @field_validator("sink")
    @classmethod
    def _brought(cls, sink: bool, info: ValidationInfo) -> bool:
        """A score such as the gallery's ``sink`` asks for one too."""
        context = _context(info.data)
        if context is None or not {"mask", "score"} <= info.data.keys():
            return sink
        return sink or read_mathematics(info.data["mask"].text, info.data["score"].text, context).sink

    @property
    def mathematics(self) -> Mathematics:
        """Mask and score, read."""
        return read_mathematics(self.mask.text, self.score.text, _context_of(self))

    @property
    def condition(self) -> Boolean:
        """Which keys each query keeps."""
        return self.mathematics.condition

    @property
    def score_expr(self) -> Expr:
        """What the softmax is taken of: `SCORE` itself where nothing is done to it."""
        return self.mathematics.score

    @property
    def inputs(self) -> tuple[TensorInput, ...]:
        """The tensors that mask or score read, by name."""
        return self.mathematics.inputs

    @property
    def runtime(self) -> tuple[RuntimeParameter, ...]:
        """The numbers that a call has to pass, by name."""
        return self.mathematics.runtime

    @property
    def unread(self) -> frozenset[str]:
        """The tensors and runtime parameters that stand in mask or score and cancel: ``p * 0``."""
        return self.mathematics.unread

    @property
    def mask_label(self) -> str:
        """The mask as part of a kernel's name: ``causal``, ``window4096``, ``mask1b03f9c2``."""
        return mask_label(self.mathematics)

    @property
    def score_label(self) -> str:
        """The score as part of a kernel's name: ``softcap50``; empty where nothing is done to it."""
        return score_label(self.mathematics)

    @property
    def derivation(self) -> MaskDerivation:
        """Which keys to visit, and what is left to be tested element by element."""
        from flashgen.spec.derivation import derive_mask

        return derive_mask(self.condition, align=self.align, inputs=self.inputs, runtime=self.runtime)


def _context(fields: Mapping[str, Any]) -> Context | None:
    """What mask and score may speak of; None where names of it were refused."""
    if not {"params", "tensors"} <= fields.keys():
        return None
    return Context(
        # a wrong one is reported already, and stands in no way of reading the rest
        head_dim=fields["head_dim"].qk if "head_dim" in fields else 64,
        align=fields.get("align", "bottom_right"),
        parameters=tuple(parameter.declared(name) for name, parameter in fields["params"].items()),
        tensors=tuple(tensor.named(name) for name, tensor in fields["tensors"].items()),
    )


@lru_cache(maxsize=256)
def _context_of(attention: Attention) -> Context:
    context = _context(dict(attention))
    assert context is not None
    return context


@contextmanager
def _told_of(key: str, text: str = "") -> Iterator[None]:
    """Hands an expression's mistake to pydantic, at its column, or at its value in ``{window: 0}``."""
    try:
        yield
    except SpecError as error:
        (problem,) = error.problems
        offset = problem.location.column - 1 if problem.location else None
        name, _, rest = text.partition("(")
        at = (name.strip(),) if rest and offset is not None and offset > len(name) else ()
        raise wrong(f"{key}: {problem.message}", problem.hint, at=at, offset=offset) from None


@lru_cache(maxsize=256)
def scale_value(text: str, head_dim_qk: int, head_dim_v: int) -> float:
    """The number that a scale's expression stands for; `head_dim` in it is that of the queries and keys."""
    sizes = {"head_dim": head_dim_qk, "head_dim_qk": head_dim_qk, "head_dim_v": head_dim_v}
    names = {name: sympy.Integer(size) for name, size in sizes.items()}
    return float(parse_expression(text, names=names, expect=Kind.REAL))


__all__ = ["Attention", "HeadDim", "Heads", "scale_value"]
