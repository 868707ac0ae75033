"""What to say about a word that is not known: the word, quoted safely, and the known one it resembles."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

_LONGEST = 40


def quoted(word: str) -> str:
    """The word on one line, without control characters, cut where it is long."""
    shown = word if len(word) <= _LONGEST else word[:_LONGEST] + "…"
    return json.dumps(shown, ensure_ascii=not shown.isprintable())


def did_you_mean(word: str, known: Iterable[str], allowed: Iterable[str] = ()) -> str:
    """``did you mean 'head_dim'? allowed: heads, head_dim``, less the half for which there is nothing."""
    searched = list(known) if len(word) <= _LONGEST else []
    close = difflib.get_close_matches(word.lower(), searched, n=1, cutoff=0.6)
    parts = [f"did you mean '{close[0]}'?"] if close else []
    listed = ", ".join(allowed)
    if listed:
        parts.append(f"allowed: {listed}")
    return " ".join(parts)
