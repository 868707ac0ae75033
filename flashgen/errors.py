"""The error tree.

    FlashgenError
      SpecError     the YAML, or what it asks for, is wrong           (exit code 2)
      PlanError     no tiling fits the chip, or the user's own doesn't (exit code 2)
      BuildError    the compiler refused, or its report breaks the plan (exit code 1)
      LaunchError   tensors, devices or drivers don't fit the kernel   (exit code 1)

An error holds one or more `Problem`s, so that several mistakes are reported together.
``str(error)`` is what a user reads: ``FILE:LINE:COL: message`` and, indented, how to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """A place in a spec file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong, where, and how to mend it."""

    message: str
    location: Location | None = None
    hint: str | None = None

    def __str__(self) -> str:
        text = f"{self.location}: {self.message}" if self.location else self.message
        return f"{text}\n    {self.hint}" if self.hint else text


class FlashgenError(Exception):
    """Base of every error that flashgen raises on purpose."""

    exit_code = 1

    def __init__(
        self,
        message: str | Sequence[Problem],
        *,
        location: Location | None = None,
        hint: str | None = None,
    ) -> None:
        if isinstance(message, str):
            self.problems: tuple[Problem, ...] = (Problem(message, location, hint),)
        else:
            self.problems = tuple(message)
        super().__init__("\n".join(map(str, self.problems)))


class SpecError(FlashgenError):
    """The spec is malformed or asks for something that does not exist."""

    exit_code = 2


class PlanError(FlashgenError):
    """No plan satisfies the chip's constraints, or the user's own tiles break one."""

    exit_code = 2


class BuildError(FlashgenError):
    """NVRTC refused the source, or the compiled kernel does not match its plan."""


class LaunchError(FlashgenError):
    """The tensors, the device or the driver do not fit the kernel."""
