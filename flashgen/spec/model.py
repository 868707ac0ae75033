"""`AttentionSpec`: what a user asks for, validated and frozen. It knows nothing of chips.

Each record takes the short forms of the language (``heads: 32``, ``mask: causal``, ``tiles: auto``) as well
as the long ones, from YAML and from Python alike, and says what is wrong in one `SpecError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PrivateAttr, model_validator

from flashgen.errors import Location
from flashgen.spec.attention import Attention, scale_value
from flashgen.spec.problems import shown, wrong
from flashgen.spec.record import Flag, Record, both, size
from flashgen.spec.suggest import did_you_mean, quoted

LANGUAGE = 1
"""The version of the language that this package reads."""


Length = Annotated[int, size(1, 2**30)]
Registers = Annotated[int, size(24, 256, 8)]


class Seqlen(Record):
    """Lengths of queries and keys."""

    q: Length
    kv: Length

    @model_validator(mode="before")
    @classmethod
    def _same(cls, value: Any) -> Any:
        return both(value, "seqlen", ("q", "kv"))


class Workload(Record):
    """The shapes that tiles are chosen for; a kernel takes any others too."""

    batch: Annotated[int, size(1, 2**20)] = 8
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
    q_register_steps: Annotated[int, size(0, 16)] | None = None
    q_stages: Annotated[int, size(1, 4)] | None = None
    extra_v_stages: Annotated[int, size(0, 4)] | None = None
    cluster: Annotated[int, size(1, 16)] | None = None
    tile_order: Literal["static", "dynamic", "stream_k"] | None = None
    section_mib: Annotated[int, size(1, 1 << 20)] | None = None
    key_order: Literal["descending", "ascending"] | None = None
    reference: Literal["running", "first"] | None = None
    edge_tiles: Literal["inline", "apart"] | None = None
    output_wait: Literal["early", "middle", "late"] | None = None
    rescale: Literal["early", "late"] | None = None
    distance_terms: Literal["early", "late"] | None = None
    pack_gqa: Flag | None = None
    o_buffer: Literal["q", "v", "own"] | None = None
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

    q: Annotated[int, size(16, 1024, 16)] | None = None
    kv: Annotated[int, size(8, 1024, 8)] | None = None
    stages: Annotated[int, size(1, 16)] | None = None
    warps: Annotated[int, size(1, 32)] | None = None
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


__all__ = ["LANGUAGE", "AttentionSpec", "Schedule", "Seqlen", "Tiles", "Workload"]
