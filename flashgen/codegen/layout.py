"""Lines of printed code, no longer than the project's."""

from __future__ import annotations

import re

_COLUMNS = 110


def wrapped(text: str) -> str:
    """Printed code, its long lines broken at spaces and continued four columns to the right."""
    return "\n".join(part for line in text.split("\n") for part in _broken(line))


def _broken(line: str) -> list[str]:
    if len(line) <= _COLUMNS:
        return [line]
    margin = " " * (len(line) - len(line.lstrip()))
    comment = line.lstrip().startswith("//")
    words = re.split(r"(?<!\bconst)(?<!\bint)(?<!\bfloat) (?!\{$)", line.lstrip())
    parts = [margin + words[0]]
    for word in words[1:]:
        if len(parts[-1]) + 1 + len(word) <= _COLUMNS:
            parts[-1] += f" {word}"
        else:
            parts.append(f"{margin}// {word}" if comment else f"{margin}    {word}")
    return parts


__all__ = ["wrapped"]
