"""The YAML language: what the user asks for, validated, with nothing said of chips."""

from flashgen.spec.bounds import RowBounds

__all__ = ["RowBounds"]
