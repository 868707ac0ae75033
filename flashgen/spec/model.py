"""`AttentionSpec`: what a user asks for, validated and frozen. It knows nothing of chips.

Each record takes the short forms of the language (``heads: 32``, ``mask: causal``, ``tiles: auto``) as well
as the long ones, from YAML and from Python alike, and says what is wrong in one `SpecError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal

import sympy
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from sympy.logic.boolalg import Boolean

from flashgen.errors import Location, SpecError
from flashgen.spec.bounds import RowBounds
from flashgen.spec.expression import Kind, parse_expression
from flashgen.spec.masks import MASKS, mask_bounds, mask_condition, mask_label
from flashgen.spec.problems import problems_of, shown, wrong
from flashgen.spec.suggest import did_you_mean, quoted

LANGUAGE = 1
"""The version of the language that this package reads."""


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


def _size(least: int, most: int, multiple: int = 1) -> Any:
    return Field(strict=True, ge=least, le=most, multiple_of=multiple)


HeadCount = Annotated[int, _size(1, 4096)]
Length = Annotated[int, _size(1, 2**30)]
HeadDimension = Annotated[int, _size(8, 256, 8)]
Flag = Annotated[bool, Field(strict=True)]
Registers = Annotated[int, _size(24, 256, 8)]


def _both(value: Any, name: str, keys: tuple[str, str]) -> Any:
    if type(value) is int:
        return dict.fromkeys(keys, value)
    if isinstance(value, Mapping | BaseModel):
        return value
    form = f"{{{keys[0]}: .., {keys[1]}: ..}}"
    raise wrong(f"{name} must be an integer or {form}, but this is {shown(value)}")


class Heads(Record):
    """Query heads, and the key/value heads that groups of them share (GQA; MQA where kv is 1)."""

    q: HeadCount
    kv: HeadCount

    @model_validator(mode="before")
    @classmethod
    def _same(cls, value: Any) -> Any:
        return _both(value, "heads", ("q", "kv"))

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
        return _both(value, "head_dim", ("qk", "v"))


class Mask(Record):
    """A mask of the gallery in `flashgen.spec.masks`, with its parameters."""

    name: str
    parameters: tuple[tuple[str, int], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _named_mask(value, {})
        if not isinstance(value, Mapping):
            raise wrong(f"mask must be a name or {{name: value}}, but this is {shown(value)}", _mask_hint())
        if "name" in value and set(value) <= {"name", "parameters"}:  # as Mask(name=...) gives it
            return _named_mask(value["name"], dict(value.get("parameters", ())))
        if len(value) != 1:
            raise wrong(f"mask takes one name, not {len(value)}", _mask_hint())
        ((name, parameter),) = value.items()
        return _named_mask(name, {name: parameter})

    @property
    def label(self) -> str:
        """As part of a kernel's name: ``causal``, ``window4096``."""
        return mask_label(self.name, self.parameters)

    @property
    def condition(self) -> Boolean:
        """Which (q, kv) are kept: a sympy Boolean in `flashgen.spec.bounds.Q` and `KV`."""
        return mask_condition(self.name, self.parameters)

    @property
    def bounds(self) -> RowBounds:
        """The interval of keys that each row keeps."""
        return mask_bounds(self.name, self.parameters)


def _named_mask(name: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(name, str) or name not in MASKS:
        if isinstance(name, str) and re.search(r"[^A-Za-z0-9_-]", name):
            raise wrong("masks are named, not yet written as expressions", _mask_hint())
        suggestion = did_you_mean(name, MASKS) if isinstance(name, str) else ""
        raise wrong(f"there is no mask {shown(name)}", f"{suggestion} {_mask_hint()}".strip())
    wanted = MASKS[name].parameters
    if parameters and not wanted:
        raise wrong(f"mask '{name}' takes no value", f"write 'mask: {name}'")
    if set(parameters) != set(wanted):
        raise wrong(f"mask '{name}' needs a value", f"write 'mask: {{{name}: 4096}}'")
    for value in parameters.values():
        if type(value) is not int or not 1 <= value <= 2**30:
            raise wrong(f"{name} must be an integer from 1 to 2^30, but this is {shown(value)}", at=(name,))
    return {"name": name, "parameters": tuple((key, parameters[key]) for key in wanted)}


def _mask_hint() -> str:
    forms = (f"{{{m.name}: <integer>}}" if m.parameters else m.name for m in MASKS.values())
    return f"allowed: {', '.join(forms)}"


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class Attention(Record):
    """The mathematics: O = softmax(scale * Q K^T, masked) V."""

    heads: Heads
    head_dim: HeadDim
    dtype: Literal["bf16", "fp16"] = "bf16"
    scale: Annotated[str, BeforeValidator(_as_text)] = "1/sqrt(head_dim)"
    mask: Mask = Mask(name="full")
    align: Literal["bottom_right", "top_left"] = "bottom_right"

    @field_validator("scale")
    @classmethod
    def _positive(cls, text: str, info: ValidationInfo) -> str:
        dims = info.data.get("head_dim") or HeadDim(qk=64, v=64)  # a wrong one is reported already
        try:
            value = scale_value(text, dims.qk, dims.v)
        except SpecError as error:
            (problem,) = error.problems
            offset = problem.location.column - 1 if problem.location else 0
            raise wrong(f"scale: {problem.message}", problem.hint, offset=offset) from None
        if not (math.isfinite(value) and value > 0):
            raise wrong(f"scale must be a positive number, but this is {value:g}")
        return text


@lru_cache(maxsize=256)
def scale_value(text: str, head_dim_qk: int, head_dim_v: int) -> float:
    """The number that a scale's expression stands for; `head_dim` in it is that of the queries and keys."""
    sizes = {"head_dim": head_dim_qk, "head_dim_qk": head_dim_qk, "head_dim_v": head_dim_v}
    names = {name: sympy.Integer(size) for name, size in sizes.items()}
    return float(parse_expression(text, names=names, expect=Kind.REAL))


class Seqlen(Record):
    """Lengths of queries and keys."""

    q: Length
    kv: Length

    @model_validator(mode="before")
    @classmethod
    def _same(cls, value: Any) -> Any:
        return _both(value, "seqlen", ("q", "kv"))


class Workload(Record):
    """The shapes that tiles are chosen for; a kernel takes any others too."""

    batch: Annotated[int, _size(1, 2**20)] = 8
    seqlen: Seqlen = Seqlen(q=4096, kv=4096)

    @property
    def seqlen_q(self) -> int:
        """Queries per sequence."""
        return self.seqlen.q

    @property
    def seqlen_kv(self) -> int:
        """Keys per sequence."""
        return self.seqlen.kv


class Schedule(Record, Mapping[str, Any]):
    """How a kernel family runs its tiles. A mapping of what was given; the rest is the solver's to choose.

    The fields are those of `Sm80Schedule` and `Sm90Schedule` in `flashgen.plan`, which says what each does.
    """

    family: Literal["sm80", "sm90"] | None = None
    q_in_registers: Flag | None = None
    p_in_registers: Flag | None = None
    overlap: Flag | None = None
    ping_pong: Flag | None = None
    q_stages: Annotated[int, _size(1, 4)] | None = None
    cluster: Annotated[int, _size(1, 16)] | None = None
    tile_order: Literal["static", "dynamic"] | None = None
    key_order: Literal["descending", "ascending"] | None = None
    output_wait: Literal["early", "late"] | None = None
    rescale: Literal["early", "late"] | None = None
    pack_gqa: Flag | None = None
    o_aliases_q: Flag | None = None
    producer_registers: Registers | None = None
    consumer_registers: Registers | None = None

    def __getitem__(self, key: str) -> Any:
        value = getattr(self, key) if key in type(self).model_fields else None
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return (name for name in type(self).model_fields if getattr(self, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Tiles(Record):
    """The tiling: what is given is kept, what is None is solved for. Sizes are rows and keys."""

    q: Annotated[int, _size(16, 1024, 16)] | None = None
    kv: Annotated[int, _size(8, 1024, 8)] | None = None
    stages: Annotated[int, _size(1, 16)] | None = None
    warps: Annotated[int, _size(1, 32)] | None = None
    schedule: Schedule = Schedule()

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        if value == "auto":
            return {}
        if isinstance(value, str):
            hint = did_you_mean(value, ["auto"], ["auto", "a mapping"])
            raise wrong(f"tiles must be auto or a mapping, but this is {shown(value)}", hint)
        return value


def _slug(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) or ".." in name:
        raise wrong(
            f"name {quoted(name)} cannot name a folder and a kernel",
            "at most 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit, without '..'",
        )
    return name


def _target(target: str) -> str:
    if target != "auto" and not re.fullmatch(r"sm_[0-9]{2,3}[af]?", target):
        hint = did_you_mean(target, ["auto", "sm_80", "sm_90a"], ["auto", "a target such as sm_80 or sm_90a"])
        raise wrong(f"target {quoted(target)} is neither auto nor a GPU architecture", hint)
    return target


def _passes(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not value:
        raise wrong(f"passes must be a list, but this is {shown(value)}", "write 'passes: [forward]'")
    for index, item in enumerate(value):
        if item == "backward":
            raise wrong("the backward pass is not generated yet", "write 'passes: [forward]'", at=(index,))
        if item != "forward":
            hint = did_you_mean(str(item), ["forward"], ["forward"])
            raise wrong(f"there is no pass {shown(item)}", hint, at=(index,))
    if len(value) > 1:
        raise wrong("passes names a pass twice", at=(1,))
    return tuple(value)


def _version(value: Any) -> Any:
    if type(value) is not int or value != LANGUAGE:
        raise wrong(f"flashgen must be {LANGUAGE}, the version of the language, but this is {shown(value)}")
    return value


@dataclass(frozen=True)
class _Places:
    """Where the values stand in the file. Takes no part in equality: a spec is what it says, not where."""

    values: Mapping[tuple[str | int, ...], Location] = field(default_factory=dict, compare=False)


class AttentionSpec(Record):
    """One attention and how to tile it.

    Built by `load_spec`, `parse_spec`, or in Python with the same names and short forms:
    ``AttentionSpec(name="mine", attention={"heads": 32, "head_dim": 128, "mask": "causal"})``.

    Raises:
        SpecError: all that is wrong with it.
    """

    flashgen: Annotated[int, BeforeValidator(_version)] = LANGUAGE
    name: Annotated[str, AfterValidator(_slug)]
    attention: Attention
    passes: Annotated[tuple[Literal["forward"], ...], BeforeValidator(_passes)] = ("forward",)
    workload: Workload = Workload()
    tiles: Tiles = Tiles()
    target: Annotated[str, AfterValidator(_target)] = "auto"

    _places: _Places = PrivateAttr(default_factory=_Places)

    @property
    def scale(self) -> float:
        """The factor of Q K^T."""
        return scale_value(self.attention.scale, self.attention.head_dim.qk, self.attention.head_dim.v)

    def locate(self, *path: str | int) -> Location | None:
        """Where a value stands in the YAML it came from: ``spec.locate("tiles", "kv")``; None from Python."""
        return self._places.values.get(path)


__all__ = [
    "LANGUAGE",
    "Attention",
    "AttentionSpec",
    "HeadDim",
    "Heads",
    "Mask",
    "Record",
    "Schedule",
    "Seqlen",
    "Tiles",
    "Workload",
]
