"""The gallery: named masks and scores, each a formula in the expression language.

A new one is one more `Entry` here and a spec in ``specs/``. The tiles that it visits, its CUDA, its
derivative and its tests follow from the formula. An entry's formula may speak of other entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flashgen.spec.inputs import TensorInput


@dataclass(frozen=True)
class EntryParameter:
    """What an entry is called with: ``window(4096)``. A constant is held to `least`."""

    name: str
    kind: Literal["int", "float"] = "int"
    least: int | None = 1


@dataclass(frozen=True)
class Entry:
    """A named mask (a condition) or score (a number).

    `tensors` are read by the formula and given by the caller, unless the spec declares a tensor of the same
    name itself. `sink`: the softmax gets a learnable logit per head. `sample` gives what the entry can be
    tried with: the text of a value for every parameter, and for every tensor that of its elements, in the
    names of its axes (`distance` for the axis q - kv, `i` for that of a table).
    """

    name: str
    kind: Literal["mask", "score"]
    formula: str
    about: str
    parameters: tuple[EntryParameter, ...] = ()
    tensors: tuple[TensorInput, ...] = ()
    sink: bool = False
    reference: str = ""
    sample: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def call(self) -> str:
        """How it is written: ``causal``, ``window(size)``."""
        arguments = ", ".join(parameter.name for parameter in self.parameters)
        return f"{self.name}({arguments})" if arguments else self.name


def _mask(name: str, formula: str, about: str, *parameters: EntryParameter, **rest: object) -> Entry:
    return Entry(name, "mask", formula, about, parameters, **rest)  # type: ignore[arg-type]


def _score(name: str, formula: str, about: str, *parameters: EntryParameter, **rest: object) -> Entry:
    return Entry(name, "score", formula, about, parameters, **rest)  # type: ignore[arg-type]


_SIZE = EntryParameter("size")

GALLERY: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (
        _mask("full", "true", "every query sees every key"),
        _mask("causal", "kv <= q", "a query sees the keys up to its own position"),
        _mask(
            "window",
            "kv <= q and q - kv < size",
            "causal, and only the last `size` keys, its own included",
            _SIZE,
            reference="Beltagy et al., Longformer, arXiv:2004.05150; Mistral 7B, arXiv:2310.06825",
            sample={"size": "40"},
        ),
    )
}

__all__ = ["GALLERY", "Entry", "EntryParameter"]
