"""One record per compile target; `arch("sm_90a")` finds it."""

from __future__ import annotations

from difflib import get_close_matches

from flashgen.arch.model import Arch
from flashgen.arch.records import ARCHS, DEFAULT_TARGET
from flashgen.errors import Location, SpecError


def arch(target: str, *, location: Location | None = None) -> Arch:
    """The record of a compile target.

    Raises SpecError, with a suggestion, where flashgen has no record of `target`.
    """
    try:
        return ARCHS[target]
    except KeyError:
        close = get_close_matches(target, ARCHS, n=1, cutoff=0.5)
        known = ", ".join(ARCHS)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SpecError(
            f"unknown target {target!r}", location=location, hint=f"{hint}known targets: {known}"
        ) from None


__all__ = ["ARCHS", "DEFAULT_TARGET", "Arch", "arch"]
