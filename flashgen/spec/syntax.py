"""Text of the expression language -> Python's syntax tree of it, within limits.

Python's `ast` only splits the text; what its nodes mean is for `flashgen.spec.expression` to say. Specs may
come from strangers: length, depth and the number of terms are held to limits before anything is computed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import NoReturn

from flashgen.errors import Location, SpecError
from flashgen.spec.suggest import quoted

MAX_CHARACTERS = 4096
MAX_DEPTH = 32
MAX_NODES = 300
MAX_COMPARISONS = 16

Locate = Callable[[int], Location]
"""Offset in the expression's text -> where that character stands in the file."""

_UNREADABLE = re.compile(r"[^A-Za-z0-9_ .,+\-*/%<>=!()\[\]&|^~]")
_NUMBER_INTO_NAME = re.compile(
    r"(?<![A-Za-z0-9_.])(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![eE][+-]?\d)(?=[A-Za-z_])"
)
_C_OPERATOR = re.compile(r"&&|\|\||!(?!=)|(?<![<>=!])=(?!=)")
_C_INSTEAD = {"&&": "write 'and'", "||": "write 'or'", "!": "write 'not'", "=": "write '==' to compare"}


def nowhere(offset: int) -> Location:
    """The place of a character in an expression that came from no file."""
    return Location("<expression>", 1, offset + 1)


def split(text: str, locate: Locate) -> tuple[ast.expr, int]:
    """The tree, and the offset in `text` that its columns count from.

    Raises:
        SpecError: the text is too long, is nested too deeply, or is no expression.
    """

    def fail(message: str, offset: int, hint: str | None = None) -> NoReturn:
        raise SpecError(message, location=locate(offset), hint=hint)

    if len(text) > MAX_CHARACTERS:
        fail(f"the expression has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read", 0)
    text = text.translate({ord(c): " " for c in "\t\r\n"})
    if not text.strip():
        fail("the expression is empty", 0)
    _check_characters(text, fail)
    start = len(text) - len(text.lstrip())
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        if wrong := _C_OPERATOR.search(text):
            fail(f"'{wrong[0]}' is not an operator here", wrong.start(), _C_INSTEAD[wrong[0]])
        end = len(text.strip())
        offset = min(error.offset - 1, end) if error.offset else end  # 0: something is missing there
        fail(f"the expression cannot be read from here on ({error.msg})", start + offset)
    except (RecursionError, MemoryError):
        fail(f"the expression is nested deeper than {MAX_DEPTH} levels", start)
    return tree, start


def _check_characters(text: str, fail: Callable[[str, int], NoReturn]) -> None:
    if wrong := _UNREADABLE.search(text):
        fail(f"{quoted(wrong[0])} is not part of the expression language", wrong.start())
    if wrong := _NUMBER_INTO_NAME.search(text):
        fail(f"the number {quoted(wrong[0])} runs into a name", wrong.start())
    opened: list[int] = []
    for offset, character in enumerate(text):
        if character in "([":
            opened.append(offset)
            if len(opened) > MAX_DEPTH:
                fail(f"the expression is nested deeper than {MAX_DEPTH} levels", offset)
        elif character in ")]" and (not opened or text[opened.pop()] + character not in ("()", "[]")):
            fail(f"'{character}' closes nothing", offset)
    if opened:
        fail(f"'{text[opened[-1]]}' is never closed", opened[-1])


__all__ = ["MAX_CHARACTERS", "MAX_COMPARISONS", "MAX_DEPTH", "MAX_NODES", "Locate", "nowhere", "split"]
