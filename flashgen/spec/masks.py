"""The gallery of named masks: each is a condition on the positions `q` and `kv`, in the expression language.

A new mask is one more entry here. Its tile ranges, its CUDA and its tests follow from the condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy.logic.boolalg import Boolean

from flashgen.spec.bounds import KV, SEQLEN_KV, SEQLEN_Q, Q, RowBounds, derive_bounds
from flashgen.spec.expression import Kind, parse_expression

POSITIONS: Mapping[str, sympy.Symbol] = {"q": Q, "kv": KV, "seqlen_q": SEQLEN_Q, "seqlen_kv": SEQLEN_KV}
"""What a mask may speak of: positions on the key timeline, and the lengths."""


@dataclass(frozen=True)
class NamedMask:
    """One entry of the gallery. A parameter is a positive integer, named in the condition."""

    name: str
    condition: str
    about: str
    parameters: tuple[str, ...] = ()


MASKS: Mapping[str, NamedMask] = {
    mask.name: mask
    for mask in (
        NamedMask("full", "true", "every query sees every key"),
        NamedMask("causal", "kv <= q", "a query sees the keys up to its own position"),
        NamedMask(
            "window",
            "kv <= q and q - kv < window",
            "causal, and only the last `window` keys, its own included",
            parameters=("window",),
        ),
    )
}


def mask_label(name: str, parameters: tuple[tuple[str, int], ...]) -> str:
    """The mask as part of an identifier: ``causal``, ``window4096``."""
    return name + "_".join(str(value) for _, value in parameters)


@lru_cache(maxsize=256)
def mask_condition(name: str, parameters: tuple[tuple[str, int], ...]) -> Boolean:
    """The named mask's condition on `Q` and `KV`, with its parameters filled in."""
    names = {**POSITIONS, **{parameter: sympy.Integer(value) for parameter, value in parameters}}
    return parse_expression(MASKS[name].condition, names=names, expect=Kind.BOOLEAN)


@lru_cache(maxsize=256)
def mask_bounds(name: str, parameters: tuple[tuple[str, int], ...]) -> RowBounds:
    """The interval of keys that each row of the named mask keeps."""
    return derive_bounds(mask_condition(name, parameters))


__all__ = ["MASKS", "POSITIONS", "NamedMask", "mask_bounds", "mask_condition", "mask_label"]
