"""Sums in a score that count the score twice, which named ones hide: ``alibi + softcap(30)``."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flashgen.spec.gallery import Entry
from flashgen.spec.suggest import shortened


@dataclass(frozen=True)
class CountedTwice:
    """What is wrong with a sum, at its second term that holds the score."""

    term: ast.expr
    message: str
    hint: str


def counted_twice(tree: ast.expr, named: Mapping[ast.AST, Entry]) -> CountedTwice | None:
    """The first sum in which a named score, one of `named`, stands beside another or beside `score`.

    Where a term takes `score` away, whoever wrote it has counted.
    """
    for terms in _sums(tree):
        entries = [[named[part] for part in ast.walk(term) if part in named] for term, _ in terms]
        taken = (term for term, added in terms if not added)
        if any(part in named or _is_score(part) for term in taken for part in ast.walk(term)):
            continue
        holding = [
            (term, within)
            for (term, added), within in zip(terms, entries, strict=True)
            if added and (within or _is_score(term))
        ]
        names = [entry for _, within in holding for entry in within]
        if names and len(holding) > 1:
            plain = any(not within for _, within in holding)
            return CountedTwice(holding[1][0], *_told(names, len(holding), plain=plain))
    return None


def _told(entries: Sequence[Entry], count: int, *, plain: bool) -> tuple[str, str]:
    each = list(dict.fromkeys(entries))
    sinks = [entry.name for entry in each if entry.sink]
    names = " and ".join(f"'{entry.name}'" for entry in each)
    message = f"the sum counts 'score' {'twice' if count == 2 else f'{count} times'}: it is part of {names}"
    if plain and count == 2:
        return message, "leave 'score' out"
    if sinks:
        return message, f"leave '{sinks[0]}' out, and write 'sink: true' beside the score"
    formulas = "; ".join(f"{entry.call} is {shortened(entry.formula)}" for entry in each)
    less = "- score" if count == 2 else f"- {count - 1} * score"
    return message, f"add '{less}', or write the formulas with one 'score' in all: {formulas}"


def _sums(tree: ast.expr) -> Iterator[list[tuple[ast.expr, bool]]]:
    """The terms of each sum that is no part of another, and whether they are added or taken away."""
    parts: set[ast.AST] = set()
    for node in ast.walk(tree):
        if node not in parts and _is_sum(node):
            yield list(_terms(node, True, parts))


def _terms(node: ast.AST, added: bool, parts: set[ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    parts.add(node)
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            yield from _terms(left, added, parts)
            yield from _terms(right, added == isinstance(op, ast.Add), parts)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            yield from _terms(operand, added == isinstance(op, ast.UAdd), parts)
        case ast.expr():
            yield node, added


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)


def _is_score(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "score"


__all__ = ["CountedTwice", "counted_twice"]
