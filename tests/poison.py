"""Memory that a launch allocates, filled before a kernel writes to it: what stays unwritten shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashgen.runtime import launch, preparation

UNWRITTEN = -(2**20)
"""A key, or a word of a list, that no mask has: far off, but not so far that a loop from there hangs."""


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN, ranges and lists as `UNWRITTEN`."""
    outputs, words, kept = launch.empty_strided, preparation.empty, preparation.empty_words

    def full_of_nan(*layout: Any) -> torch.Tensor:
        return outputs(*layout).fill_(torch.nan)

    def full_of_unwritten(*shape: Any, **options: Any) -> torch.Tensor:
        return words(*shape, **options).fill_(UNWRITTEN)

    monkeypatch.setattr(launch, "empty_strided", full_of_nan)
    monkeypatch.setattr(preparation, "empty", full_of_unwritten)
    monkeypatch.setattr(preparation, "empty_words", lambda *layout: kept(*layout).fill_(UNWRITTEN))


__all__ = ["UNWRITTEN", "poison"]
