"""What to say about a word that is not known: the word, quoted safely, and the known one it resembles."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

_LONGEST = 40


def shortened(word: str) -> str:
    """The word, cut where it is long."""
    return word if len(word) <= _LONGEST else word[:_LONGEST] + "…"


def quoted(word: str) -> str:
    """The word on one line, without control characters, cut where it is long."""
    shown = shortened(word)
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that resembles this one, if any does."""
    if len(word) > _LONGEST:
        return None
    return next(iter(difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Iterable[str], allowed: Iterable[str] = ()) -> str:
    """``did you mean 'head_dim'? allowed: heads, head_dim``, less the half for which there is nothing."""
    close = closest(word, known)
    parts = [f"did you mean '{close}'?"] if close else []
    listed = ", ".join(allowed)
    if listed:
        parts.append(f"allowed: {listed}")
    return " ".join(parts)
