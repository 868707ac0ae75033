"""Python functions as masks and scores: which texts are kept, and that none outlives what it was made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import flashgen
from flashgen.errors import SpecError
from flashgen.runtime import functions
from flashgen.spec import trace as language

SIZE: Any = 20
NAMES: dict[str, Any] = {"tensors": ("slope",), "params": ("size",)}


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The texts that were traced, not found."""
    texts: list[str] = []
    trace = language.trace

    def counted(*arguments: Any, **names: Any) -> str:
        texts.append(trace(*arguments, **names))
        return texts[-1]

    monkeypatch.setattr(functions, "_texts", {})
    monkeypatch.setattr(language, "trace", counted)
    yield texts


def mask_of(function: Callable[..., Any]) -> str:
    return functions.text_of(function, kind="mask", **NAMES)


def window(size: Any) -> Callable[..., Any]:
    return lambda q, kv: q - kv < size


KEPT: dict[str, Callable[[], Callable[..., Any]]] = {
    "constants": lambda: lambda q, kv: (kv <= q) & (q - kv < 4096),
    "closed over": lambda: window(7),
    "a default": lambda: lambda q, kv, size_=8: q - kv < size_,
    "a global": lambda: lambda q, kv: q - kv < SIZE,
    "functions": lambda: lambda q, kv: flashgen.maximum(abs(q - kv), math.floor(math.pi)) < 5,
    "names": lambda: lambda q, kv, slope, size, head: (slope[head] > 0) | (q - kv < size),
}


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT.keys())
def test_a_text_is_kept(make: Callable[[], Any], traced: list[str]) -> None:
    assert mask_of(make()) == mask_of(make())
    assert len(traced) == 1


def test_numbers_around_it_make_other_texts(traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 1.0, 2, -0.0, 0.0):
        assert mask_of(window(size)) == f"q - kv < {size}"
        monkeypatch.setitem(globals(), "SIZE", size)
        assert mask_of(lambda q, kv: q - kv < SIZE) == f"q - kv < {size}"
        assert mask_of(lambda q, kv, size_=size: q - kv < size_) == f"q - kv < {size}"
    assert len(traced) == 15
    condition: Callable[[Any], Any] = lambda keep: lambda q, kv: (kv <= q) & keep  # noqa: E731
    assert mask_of(condition(True)) == "kv <= q and true"
    with pytest.raises(SpecError):
        mask_of(condition(1))


def test_names_and_kinds_make_other_texts() -> None:
    def both(q: Any, size: Any = 3) -> Any:
        return q + size

    for names, text in ({"size": 0}, "q + size"), ({}, "q + 3"):
        for _ in range(2):
            assert functions.text_of(both, kind="score", tensors=(), params=tuple(names)) == text


def test_what_may_change_is_run_anew(traced: list[str]) -> None:
    box, sizes, count = SimpleNamespace(e=1), [1], 0

    def radius() -> int:
        return sizes[0]

    def counting(q: Any, kv: Any) -> Any:
        nonlocal count
        count += 1
        return q - kv < count

    class Mask:
        def __call__(self, q: Any, kv: Any) -> Any:
            return q - kv < sizes[0]

    def wrapped(q: Any, kv: Any) -> Any:
        return window(sizes[0])(q, kv)

    for size in (1, 2, 3):
        box.e = sizes[0] = size
        for function in (
            lambda q, kv: q - kv < box.e,
            lambda q, kv: q - kv < sizes[0],
            lambda q, kv: q - kv < radius(),
            lambda q, kv: q - kv < (lambda: sizes[0])(),
            counting,
            Mask(),
            Mask().__call__,
            functools.partial(lambda size_, q, kv: q - kv < size_, size),
            functools.wraps(window(0))(wrapped),
        ):
            assert mask_of(function) == f"q - kv < {size}"
    assert len(traced) == 27


def test_kept_texts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "_TEXTS_MAX", 4)
    for size in range(20):
        assert mask_of(window(size)) == f"q - kv < {size}"
        assert len(functions._texts) <= 4
