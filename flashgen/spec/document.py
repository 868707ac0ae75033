"""YAML text -> plain data, with the line and column of every key and value.

A subset of YAML 1.2: mappings, lists, text, integers, true/false. No anchors, aliases, tags or merge keys,
which only a hostile spec would need, and none of YAML 1.1's surprises (yes as a boolean, 012 as ten, dates).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from flashgen.errors import Location, Problem, SpecError
from flashgen.spec.suggest import quoted

Path = tuple[str | int, ...]
"""Keys and list indices from the root of the document to a value."""

MAX_BYTES = 64 * 1024
MAX_DEPTH = 8
_ONE_LINE = 5  # keys of a mapping that are still written on one line

_TAG = "tag:yaml.org,2002:"


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """What an unquoted scalar means, by its first character; everything else is text."""
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in (
        ("bool", r"true|false", [*"tf"]),
        ("int", r"[-+]?(?:0|[1-9][0-9]{0,17})", [*"-+0123456789"]),
        ("null", r"~|null|", ["~", "n", ""]),
    ):
        for character in first:
            table.setdefault(character, []).append((_TAG + tag, re.compile(rf"(?:{pattern})\Z")))
    return table


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that the language does without."""


class _Composer(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self._refuse("anchors and aliases (&name, *name) are not part of the language", event)
        if event.tag is not None:
            tag = quoted(event.tag.replace(_TAG, "!!"))
            self._refuse(f"tags such as {tag} are not part of the language", event)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, message: str, event: Any) -> NoReturn:
        raise _Refused(problem=message, problem_mark=event.start_mark)


@dataclass
class Document:
    """One spec file: its data, and where each part of it stands."""

    filename: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[Path, Location] = field(default_factory=dict)
    values: dict[Path, Location] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    valueless: set[Path] = field(default_factory=set)
    scalars: dict[Path, yaml.Node] = field(default_factory=dict)

    def place(self, mark: yaml.Mark) -> Location:
        """A mark of the YAML parser as a `Location`."""
        return Location(self.filename, mark.line + 1, mark.column + 1)

    def locate(self, path: Path, offset: int | None = None, key: bool = False) -> Location | None:
        """Where a value stands, or a character of it, or its key."""
        if offset is not None and path in self.scalars:
            return self.locate_character(path, offset)
        return (self.keys if key else self.values).get(path, Location(self.filename, 1, 1))

    def locate_character(self, path: Path, offset: int) -> Location:
        """Where the character at `offset` of a text value stands, whatever quotes and folds it is in.

        Of a space, or beyond the end: behind the last character before. The value's place, where a character
        up to there is written as an escape.
        """
        node = self.scalars[path]
        at = node.start_mark.index
        if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
            at = self.text.index("\n", at)
        for character in node.value[: offset + 1]:
            if not character.isspace():
                at = self.text.find(character, at, node.end_mark.index) + 1
                if at == 0:
                    return self.values[path]
        if node.value[offset : offset + 1].strip():
            at -= 1
        start = self.text.rfind("\n", 0, at) + 1
        return Location(self.filename, self.text.count("\n", 0, at) + 1, at - start + 1)


def too_large() -> str:
    """What to say of a file beyond `MAX_BYTES`."""
    return f"the spec is larger than {MAX_BYTES // 1024} KiB"


def read_document(text: str, filename: str) -> Document:
    """Parse YAML.

    Duplicate keys, keys that are not text and keys without a value are listed in `problems`, for the caller
    to report together with its own.

    Raises:
        SpecError: the text is not YAML, is too large, or is not one mapping.
    """
    start = Location(filename, 1, 1)
    if len(text) > MAX_BYTES:
        raise SpecError(too_large(), location=start)
    document = Document(filename, text)
    try:
        node = _Composer(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        # what is never closed is best shown where it opens, not at the end of the file
        unclosed = re.search("end of stream|stream end", error.problem or "")
        mark = (error.context_mark if unclosed else None) or error.problem_mark
        raise _malformed(error, document.place(mark) if mark else start) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Location(filename, before.count("\n") + 1, len(before) - before.rfind("\n"))
        message = f"not valid YAML: the character {error.character:#x} is not allowed"
        raise SpecError(message, location=place) from None
    if node is None:
        raise SpecError("the spec is empty", location=start, hint="begin with 'flashgen: 1'")
    if not isinstance(node, yaml.MappingNode):
        raise SpecError("a spec is a mapping of keys to values", location=document.place(node.start_mark))
    document.data = _mapping(document, node, ())
    return document


def _malformed(error: yaml.MarkedYAMLError, location: Location) -> SpecError:
    if isinstance(error, _Refused):
        return SpecError(error.problem or "", location=location)
    if "'\\t'" in (error.problem or ""):
        return SpecError("not valid YAML: a tab cannot indent", location=location, hint="use spaces")
    what = ", ".join(part for part in (error.context, error.problem) if part)
    return SpecError(f"not valid YAML: {what}", location=location)


def _mapping(document: Document, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = document.place(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            document.problems.append(Problem("a key must be text", place))
            continue
        key = key_node.value
        here = (*path, key)
        if here in document.keys:
            first = document.keys[here]
            document.problems.append(
                Problem(f"key {quoted(key)} is given twice", place, f"first given on line {first.line}")
            )
            continue
        document.keys[here] = place
        if value_node.tag == _TAG + "null":
            document.problems.append(Problem(f"key {quoted(key)} has no value", place))
            document.valueless.add(here)
            continue
        data[key] = _value(document, value_node, here)
    return data


def _value(document: Document, node: yaml.Node, path: Path) -> Any:
    document.values[path] = document.place(node.start_mark)
    if isinstance(node, yaml.MappingNode):
        return _mapping(document, node, path)
    if isinstance(node, yaml.SequenceNode):
        return [_value(document, item, (*path, i)) for i, item in enumerate(node.value)]
    document.scalars[path] = node
    if node.tag == _TAG + "bool":
        return node.value == "true"
    if node.tag == _TAG + "int":
        return int(node.value)
    return None if node.tag == _TAG + "null" else node.value


# -- writing -----------------------------------------------------------------------------------------------


class _Writer(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()  # what the reader would misread, and only that, is quoted


def write_document(data: Mapping[str, Any]) -> str:
    """YAML that `read_document` reads back to the same data, with the deeper mappings on one line each."""
    stream = io.StringIO()
    writer = _Writer(stream, sort_keys=False, width=10**6, allow_unicode=True)
    node = writer.represent_data(data)
    for _, value in node.value:
        if isinstance(value, yaml.CollectionNode):
            nested = isinstance(value, yaml.MappingNode) and len(value.value) > _ONE_LINE
            value.flow_style = not nested
            for _, inner in value.value if nested else ():
                if isinstance(inner, yaml.CollectionNode):
                    inner.flow_style = True
    writer.open()
    writer.serialize(node)
    writer.close()
    return stream.getvalue()
