"""Tilings that `flashgen tune` measured: one file per target ships with the package, the user's own comes
first.

An entry speaks for an element width, a pair of head dims, a class of masks and a bucket of lengths; and for
one mask and score, where there is more to them than one interval of keys a row. It is taken where the user
left the tiles open, the legality predicate holds, and the model does not see a reason why this workload
should be unlike the measured one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from itertools import product
from math import log2
from pathlib import Path
from typing import Any, Literal, NamedTuple

import platformdirs
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from flashgen.errors import PlanError
from flashgen.plan.model import MaskPlan, ScorePlan, Sm80Schedule, Sm90Schedule
from flashgen.plan.tiling import Tiling
from flashgen.plan.workload import Workload
from flashgen.spec.symbols import Q

SHIPPED = Path(__file__).parent / "tunings"
SEQLEN_BUCKETS = (512, 16384)  # powers of two; longer ones are like the longest
SEQLEN_MIN = 256  # shorter sequences are unlike any bucket: they are solved for
# The model's choice loses less than this to the best measured one (docs/solver.md). Where it predicts that a
# measured tiling loses more, the workload is unlike the one that was measured.
TRUST = 0.15

MaskClass = Literal["full", "causal", "window"]


class Key(NamedTuple):
    """What an entry speaks for."""

    element_bits: int
    head_dim_qk: int
    head_dim_v: int
    mask: MaskClass
    variant: str
    seqlen_q: int
    seqlen_kv: int


_SCHEDULES: Mapping[str, type[Sm80Schedule] | type[Sm90Schedule]] = {
    "sm80": Sm80Schedule,
    "sm90": Sm90Schedule,
}
# Built once: pydantic takes milliseconds for each.
_CHECKED = {family: TypeAdapter(kind) for family, kind in _SCHEDULES.items()}


class TuningWarning(UserWarning):
    """A file of the user's tunings cannot be used; plans are made without it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Tuned(_Record):
    """The best of the tilings that were measured on one workload."""

    element_bits: Literal[16]
    head_dim_qk: int
    head_dim_v: int
    mask: MaskClass
    variant: str = ""  # see `variant`
    seqlen_q: int  # bucket
    seqlen_kv: int

    family: Literal["sm80", "sm90"]
    tile_q: int
    tile_kv: int
    stages: int
    warps: int
    schedule: dict[str, bool | int | str]

    tflops: float
    tried: int  # tilings measured beside it, itself included
    rank_correlation: float | None  # Spearman, of the model's ranking with the measured one
    regret: float  # what the model's choice lost to this one
    source: str  # command, version and date

    @property
    def key(self) -> Key:
        """What it speaks for."""
        return Key(*(getattr(self, name) for name in Key._fields))

    @model_validator(mode="after")
    def _known_schedule(self) -> Tuned:
        kind = _SCHEDULES[self.family]
        if unknown := self.schedule.keys() - {f.name for f in fields(kind)}:
            raise ValueError(f"family {self.family} has no schedule field {', '.join(sorted(unknown))}")
        _CHECKED[self.family].validate_json(json.dumps(self.schedule), strict=True)
        return self

    @property
    def tiling(self) -> Tiling:
        """As a point of the lattice; whether it is legal is for `violations` to say."""
        given: dict[str, Any] = dict(self.schedule)
        schedule = _SCHEDULES[self.family](**given)
        return Tiling(self.family, self.tile_q, self.tile_kv, self.stages, self.warps, schedule)


class Tunings(_Record):
    """A file of tunings."""

    version: Literal[1] = 1
    target: str
    gpu: str
    entries: tuple[Tuned, ...]

    @property
    def text(self) -> str:
        """As it is written: entries in the order of their keys."""
        entries = tuple(sorted(self.entries, key=lambda entry: entry.key))
        return self.model_copy(update={"entries": entries}).model_dump_json(indent=1) + "\n"

    def with_entries(self, entries: Iterable[Tuned]) -> Tunings:
        """These, and the own ones that speak for anything else."""
        merged = {entry.key: entry for entry in (*self.entries, *entries)}
        return self.model_copy(update={"entries": tuple(merged.values())})


def mask_class(mask: MaskPlan) -> MaskClass:
    """Masks that visit their tiles alike: on no side bounded, to the right only, or from the left too.

    Of several intervals, or of a hull: what bounds all of them, and moves with q.
    """
    segments = mask.derivation.segments
    if all(segment.first is not None and segment.first.has(Q) for segment in segments):
        return "window"
    moving = all(segment.last is not None and segment.last.has(Q) for segment in segments)
    return "causal" if moving else "full"


def variant(work: Workload) -> str:
    """What is unlike others of its class of masks: ``causal_softcap50``; empty for plain intervals in bf16.

    In fp16, whose range is too narrow for the first key tile's maximum as reference, ``fp16`` beside it.
    """
    return "_".join(filter(None, (_mask_and_score(work), "fp16" if work.dtype == "fp16" else "")))


def _mask_and_score(work: Workload) -> str:
    plain = work.head.closed_form and work.score == ScorePlan() and not work.sink
    parts = (work.mask.label, work.score.label, "sink" if work.sink else "")
    return "" if plain else "_".join(filter(None, parts))


def bucket(seqlen: int) -> int | None:
    """The next power of two within limits; None for a sequence too short to be like any."""
    low, high = SEQLEN_BUCKETS
    return None if seqlen < SEQLEN_MIN else min(max(1 << (seqlen - 1).bit_length(), low), high)


def key_of(work: Workload) -> Key | None:
    """What an entry for this workload speaks for; None where none can."""
    q, kv = bucket(work.seqlen_q), bucket(work.seqlen_kv)
    if q is None or kv is None:
        return None
    return Key(16, work.head_dim_qk, work.head_dim_v, mask_class(work.mask), variant(work), q, kv)


def find(files: Sequence[Tunings], work: Workload) -> tuple[Tuned, Tunings] | None:
    """The entry for a workload, and its file; earlier files take precedence.

    Where queries and keys are equally long and this length was not measured, the nearest one that was. For a
    variant that was not measured at all, bf16, or its class of masks; for windows where none was measured,
    causal masks, whose tiles are as long as they are early.
    """
    key = key_of(work)
    if key is None:
        return None
    known = {entry.key: (entry, file) for file in reversed(files) for entry in file.entries}
    classes: tuple[MaskClass, ...] = ("window", "causal") if key.mask == "window" else (key.mask,)
    names = dict.fromkeys((key.variant, _mask_and_score(work), ""))
    for mask, name in product(classes, names):
        wanted = key._replace(mask=mask, variant=name)
        if wanted in known:
            return known[wanted]
        alike = [k for k in known if k[:5] == wanted[:5] and k.seqlen_q == k.seqlen_kv]
        if key.seqlen_q == key.seqlen_kv and alike:
            return known[min(alike, key=lambda k: (abs(log2(k.seqlen_q / key.seqlen_q)), -k.seqlen_q))]
    return None


def adapted(entry: Tuned, work: Workload) -> Tuned:
    """The entry without the choices that this workload does not allow, where the measured one did."""
    choices = dict(entry.schedule)
    first = work.first_reference_by_default
    if entry.variant == variant(work):
        first = work.suits_first_reference
    if choices.get("reference") == "first" and not first:
        choices["reference"] = "running"
    if entry.variant != variant(work) and choices.get("reference") == "first" and not choices.get("pack_gqa"):
        choices |= work.score_choices
    if entry.variant != variant(work) and choices.get("q_register_steps"):
        choices["q_register_steps"] = 0  # a score may need those registers
    if entry.key != key_of(work) and choices.get("cluster", 1) != 1:
        choices["cluster"] = 1  # which costs where tiles are short: both blocks walk the keys of either
    if choices.get("distance_terms") == "early" and not work.head.distances:
        choices["distance_terms"] = "late"
    if choices.get("tile_order") == "stream_k" and not work.mask.keeps_all:
        choices["tile_order"] = "dynamic"
    return entry.model_copy(update={"schedule": choices})


def tunings_for(target: str) -> tuple[Tunings, ...]:
    """The user's tunings for a target, then the shipped ones; either may be missing."""
    paths = (user_path(target), SHIPPED / f"{target}.json")
    return tuple(found for path in paths if (found := _usable(path)) is not None)


def user_path(target: str) -> Path:
    """Where `flashgen tune` keeps a user's tunings: beside the cached kernels."""
    chosen = os.environ.get("FLASHGEN_CACHE_DIR")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("flashgen"))
    return folder / "tunings" / f"{target}.json"


def read(path: Path) -> Tunings | None:
    """A file of tunings; None where there is none.

    Raises:
        PlanError: it cannot be read, is no file of tunings, or its schedules are those of another version.
    """
    try:
        return Tunings.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlanError(f"the tunings in {path} cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise PlanError(
            f"{path} holds no tunings that this version reads: {reason}",
            hint="remove it; `flashgen tune` writes a new one",
        ) from None


def write(path: Path, tunings: Tunings) -> None:
    """Put tunings in place of what the file held, at once: no reader finds half of them."""
    pending = _pending(path)
    pending.write_text(tunings.text)
    os.replace(pending, path)


def require_writable(path: Path) -> None:
    """Raises PlanError where `write` could not put tunings: to be asked before minutes of measuring."""
    try:
        pending = _pending(path)
        pending.touch()
        pending.unlink()
    except OSError as error:
        raise PlanError(
            f"tunings cannot be written to {path}: {error.strerror or error}",
            hint="choose another file with --out, or another FLASHGEN_CACHE_DIR",
        ) from None


def _pending(path: Path) -> Path:
    """What is written beside a file before it takes its place; its folder is made."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}")


def _usable(path: Path) -> Tunings | None:
    try:
        stamp = path.stat()
    except OSError:
        return None
    return _read_once(path, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=32)
def _read_once(path: Path, changed_ns: int, size: int) -> Tunings | None:
    try:
        return read(path)
    except PlanError as error:
        warnings.warn(str(error), TuningWarning, stacklevel=2)
        return None


__all__ = [
    "Tuned",
    "TuningWarning",
    "Tunings",
    "adapted",
    "bucket",
    "find",
    "key_of",
    "mask_class",
    "read",
    "require_writable",
    "tunings_for",
    "user_path",
    "variant",
    "write",
]
