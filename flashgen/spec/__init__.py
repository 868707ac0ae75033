"""The YAML language: what the user asks for, validated, with nothing said of chips."""

from flashgen.spec.bounds import RowBounds
from flashgen.spec.model import AttentionSpec
from flashgen.spec.text import dump_spec, load_spec, parse_spec

__all__ = ["AttentionSpec", "RowBounds", "dump_spec", "load_spec", "parse_spec"]
