"""Specs from and to YAML."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flashgen.errors import Location, Problem, SpecError
from flashgen.spec.attention import Attention
from flashgen.spec.declarations import Parameter
from flashgen.spec.document import MAX_BYTES, read_document, too_large, write_document
from flashgen.spec.model import LANGUAGE, AttentionSpec, _Places
from flashgen.spec.problems import problems_of
from flashgen.spec.suggest import did_you_mean
from flashgen.spec.symbols import SCORE

MAX_PROBLEMS = 20
"""How many mistakes one report lists."""


def load_spec(path: str | PathLike[str]) -> AttentionSpec:
    """Read a spec file.

    Raises:
        SpecError: the file cannot be read, or what `parse_spec` says of it.
    """
    filename = str(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        parent = Path(path).parent
        nearby = [str(parent / other.name) for other in parent.glob("*.y*ml")] if parent.is_dir() else []
        raise SpecError(f"{filename}: no such file", hint=did_you_mean(filename, nearby) or None) from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{filename}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > MAX_BYTES:
        raise SpecError(too_large(), location=Location(filename, 1, 1))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        place = Location(filename, before.count(b"\n") + 1, len(before) - before.rfind(b"\n"))
        raise SpecError("the file is not UTF-8 text", location=place) from None
    return parse_spec(text, filename)


def parse_spec(text: str, filename: str = "<spec>") -> AttentionSpec:
    """Read a spec from YAML text; `filename` stands in messages.

    Raises:
        SpecError: with every mistake that was found, each with its line and column.
    """
    document = read_document(text, filename)
    problems = list(document.problems)
    if ("flashgen",) not in document.keys:
        hint = f"begin with 'flashgen: {LANGUAGE}', the version of the language"
        problems.append(Problem("key 'flashgen' is missing", Location(filename, 1, 1), hint))
    try:
        spec = AttentionSpec.model_validate(document.data)
    except ValidationError as error:
        problems += problems_of(error, AttentionSpec, document.data, document.locate, document.valueless)
    if problems:
        raise SpecError(_sorted(problems))
    spec._places = _Places(document.values)
    return spec


def dump_spec(spec: AttentionSpec) -> str:
    """The spec as YAML, every key written out; `parse_spec` reads it back to an equal spec."""
    attention, workload, tiles = spec.attention, spec.workload, spec.tiles
    sizes = {"q": tiles.q, "kv": tiles.kv, "stages": tiles.stages, "warps": tiles.warps}
    given: dict[str, Any] = {key: size for key, size in sizes.items() if size is not None}
    if tiles.schedule:
        given["schedule"] = dict(tiles.schedule)
    return write_document(
        {
            "flashgen": spec.flashgen,
            "name": spec.name,
            "attention": {
                "heads": _short(attention.heads.q, attention.heads.kv, ("q", "kv")),
                "head_dim": _short(attention.head_dim.qk, attention.head_dim.v, ("qk", "v")),
                "dtype": attention.dtype,
                "scale": attention.scale,
                **_formulas(attention),
                "align": attention.align,
            },
            "passes": list(spec.passes),
            "workload": {
                "batch": workload.batch,
                "seqlen": _short(workload.seqlen_q, workload.seqlen_kv, ("q", "kv")),
            },
            "tiles": given or "auto",
            "target": spec.target,
        }
    )


def _formulas(attention: Attention) -> dict[str, Any]:
    """Mask and score, and of what they take only what there is."""
    written: dict[str, Any] = {"mask": attention.mask.text}
    if attention.score_expr != SCORE:
        written["score"] = attention.score.text
    if attention.params:
        written["params"] = {name: _parameter(given) for name, given in attention.params.items()}
    if attention.tensors:
        written["tensors"] = {
            name: {"index": list(tensor.index), **tensor.model_dump(exclude={"index"}, exclude_defaults=True)}
            for name, tensor in attention.tensors.items()
        }
    if attention.sink:
        written["sink"] = True
    return written


def _parameter(parameter: Parameter) -> Any:
    if parameter.value is not None:
        return parameter.value
    if parameter.runtime == "any" and parameter.min is None:
        return "runtime"
    return parameter.model_dump(exclude_none=True)


def _short(a: int, b: int, keys: tuple[str, str]) -> Any:
    return a if a == b else {keys[0]: a, keys[1]: b}


def _sorted(problems: list[Problem]) -> list[Problem]:
    def position(problem: Problem) -> tuple[int, int]:
        return (problem.location.line, problem.location.column) if problem.location else (0, 0)

    ordered = sorted(problems, key=position)
    more = len(ordered) - MAX_PROBLEMS
    return [*ordered[:MAX_PROBLEMS], Problem(f"and {more} more")] if more > 0 else ordered


__all__ = ["dump_spec", "load_spec", "parse_spec"]
