"""Every mistake in a spec file, at its line and column, all of them at once; and in Python as in a file."""

from __future__ import annotations

import re

import pytest
from spec_texts import FULL
from stopwatch import within

from flashgen.errors import Location, SpecError
from flashgen.spec import AttentionSpec, parse_spec
from flashgen.spec.text import MAX_PROBLEMS


def problems(text: str) -> list[tuple[int, int, str, str]]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "a.yaml")
    listed = []
    for problem in caught.value.problems:
        assert problem.location is not None and problem.location.file == "a.yaml"
        listed.append((problem.location.line, problem.location.column, problem.message, problem.hint or ""))
    return listed


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "message", "hint"),
    [
        # keys
        (
            "  heads:",
            "  haeds:",
            4,
            3,
            'unknown key "haeds"',
            "did you mean 'heads'? allowed: heads, head_dim",
        ),
        ("passes:", "pases:", 10, 1, 'unknown key "pases"', "did you mean 'passes'?"),
        ("overlap:", "overlp:", 12, 50, 'unknown key "overlp"', "did you mean 'overlap'?"),
        ("seqlen:", "length:", 11, 22, 'unknown key "length"', "allowed: batch, seqlen"),
        ("name: llama3-8b\n", "", 1, 1, "key 'name' is missing", ""),
        ("  head_dim: 128\n", "", 4, 3, "key 'head_dim' is missing in attention", ""),
        ("{q: 32, kv: 8}", "{q: 32}", 4, 10, "key 'kv' is missing in attention.heads", ""),
        ("flashgen: 1 ", "# ", 1, 1, "key 'flashgen' is missing", "flashgen: 1"),
        ("name: llama3-8b", "name:", 2, 1, 'key "name" has no value', ""),
        ("window(4096)", "{window: }", 8, 10, 'key "window" has no value', ""),
        ("align:", "mask: full\n  align:", 9, 3, 'key "mask" is given twice', "first given on line 8"),
        ("align:", "7:", 9, 3, "a key must be text", ""),
        ("align:", "? [a]\n  :", 9, 5, "a key must be text", ""),
        # values
        ("flashgen: 1 ", "flashgen: 2 ", 1, 11, "flashgen must be 1", ""),
        ("flashgen: 1 ", "flashgen: true ", 1, 11, "flashgen must be 1", ""),
        ("flashgen: 1 ", "flashgen: 1.0 ", 1, 11, "flashgen must be 1", ""),
        (
            "bf16",
            "bf15",
            6,
            10,
            'dtype must be one of bf16, fp16, but this is "bf15"',
            "did you mean 'bf16'?",
        ),
        (
            "bottom_right",
            "bottom_rihgt",
            9,
            10,
            "align must be one of bottom_right, top_left",
            "'bottom_right'?",
        ),
        ("head_dim: 128", "head_dim: 100", 5, 13, "head_dim must be a multiple of 8, but this is 100", ""),
        ("head_dim: 128", "head_dim: 264", 5, 13, "head_dim must be at most 256", ""),
        ("head_dim: 128", "head_dim: 0", 5, 13, "head_dim must be at least 8", ""),
        ("head_dim: 128", "head_dim: 64.0", 5, 13, "head_dim must be an integer or {qk: .., v: ..}", ""),
        ("head_dim: 128", "head_dim: {qk: 64, v: '64'}", 5, 25, "head_dim.v must be an integer", ""),
        (
            "{q: 32, kv: 8}",
            "yes",
            4,
            10,
            'heads must be an integer or {q: .., kv: ..}, but this is "yes"',
            "",
        ),
        ("{q: 32, kv: 8}", "true", 4, 10, "heads must be an integer or", ""),
        ("{q: 32, kv: 8}", "0", 4, 10, "heads must be at least 1, but this is 0", ""),
        ("{q: 32, kv: 8}", "{q: 32, kv: 7}", 4, 10, "heads.q must be a multiple of heads.kv", ""),
        ("{q: 32, kv: 8}", "99999999999999999999999", 4, 10, "heads must be an integer or", ""),
        ("batch: 8", "batch: on", 11, 19, 'batch must be an integer, but this is "on"', ""),
        ("batch: 8", "batch: true", 11, 19, "batch must be an integer, but this is true", ""),
        ("seqlen: 4096", "seqlen: {q: 1, kv: 0}", 11, 41, "seqlen.kv must be at least 1", ""),
        ("overlap: false", "overlap: no", 12, 59, 'overlap must be true or false, but this is "no"', ""),
        ("overlap: false", "overlap: 0", 12, 59, "overlap must be true or false, but this is 0", ""),
        ("family: sm90", "family: sm91", 12, 44, "family must be one of sm80, sm90", "did you mean 'sm90'?"),
        ("q: 128, kv", "q: 120, kv", 12, 12, "tiles.q must be a multiple of 16", ""),
        ("passes: [forward]", "passes: forward", 10, 9, "passes must be a list", "[forward]"),
        ("[forward]", "[]", 10, 9, "passes must be a list", ""),
        ("[forward]", "[foward]", 10, 10, 'there is no pass "foward"', "did you mean 'forward'?"),
        ("[forward]", "[forward, backward]", 10, 19, "the backward pass is not generated yet", ""),
        ("[forward]", "[forward, forward]", 10, 19, "names a pass twice", ""),
        ("target: auto", "target: h100", 13, 9, 'target "h100" is neither auto nor', "sm_90a"),
        ("target: auto", "target: 90", 13, 9, "target must be text, but this is 90", "quotes"),
        # scale
        ("1/sqrt(head_dim)", "1/sqrt(head_dm)", 7, 17, 'unknown name "head_dm"', "did you mean 'head_dim'?"),
        ("1/sqrt(head_dim)", "'1/sqrt(head_dm)'", 7, 18, 'unknown name "head_dm"', ""),
        ("1/sqrt(head_dim)", r'"1\u002fsqrt(head_dm)"', 7, 10, 'unknown name "head_dm"', ""),
        ("1/sqrt(head_dim)", ">\n    1/\n    sqrt(head_dm)", 9, 10, 'unknown name "head_dm"', ""),
        ("1/sqrt(head_dim)", "1/(head_dim - 128)", 7, 13, "division by zero", ""),
        ("1/sqrt(head_dim)", "-1", 7, 10, "scale must be a positive number", ""),
        ("1/sqrt(head_dim)", "head_dim < 3", 7, 10, "expected a number, but this is a condition", ""),
        ("1/sqrt(head_dim)", "9**9**9", 7, 13, "too large", ""),
        ("1/sqrt(head_dim)", "[1]", 7, 10, "scale must be text, but this is a list", ""),
        (
            "1/sqrt(head_dim)",
            "__import__('os').getpid()",
            7,
            21,
            "is not part of the expression language",
            "",
        ),
        ("1/sqrt(head_dim)", "'lambda: 3'", 7, 17, "is not part of the expression language", ""),
        # shape
        ("tiles: {q", "tiles: atuo #", 12, 8, "tiles must be auto or a mapping", "did you mean 'auto'?"),
        ("tiles: {q", "tiles: [1] #", 12, 8, "tiles must be a mapping, but this is a list", "keys: q, kv"),
        (
            "workload: {",
            "workload: 3 #",
            11,
            11,
            "workload must be a mapping, but this is 3",
            "keys: batch, seqlen",
        ),
        # YAML
        ("  dtype", "\tdtype", 6, 1, "a tab cannot indent", "use spaces"),
        ("target: auto", "target: [", 14, 1, "not valid YAML", ""),
        ("target: auto", "target: auto\n---\na: 1", 14, 1, "not valid YAML: expected a single document", ""),
        ("target: auto", 'target: "au', 13, 9, "not valid YAML", ""),
        ("name: llama3-8b", "name: &a llama", 2, 7, "anchors and aliases", ""),
        ("name: llama3-8b", "name: *a", 2, 7, "anchors and aliases", ""),
        ("name: llama3-8b", "name: !!str llama", 2, 7, 'tags such as "!!str"', ""),
        ("name: llama3-8b", "name: !!python/object/apply:os.getpid []", 2, 7, "tags such as", ""),
        ("name: llama3-8b", "<<: {name: a}\nname: a", 2, 1, 'unknown key "<<"', ""),
    ],
)
def test_mistakes(old: str, new: str, line: int, column: int, message: str, hint: str) -> None:
    assert FULL.count(old) >= 1
    found = problems(FULL.replace(old, new, 1))
    assert len(found) == 1, "one mistake, one message"
    assert found[0][:2] == (line, column), found
    assert message in found[0][2]
    assert hint in found[0][3]


NOT_SLUGS = """
    ../x /etc/x a/b a..b -rf .hidden A ä con*/ $(id) 'a;b' 'a b' '' "*/x" "a\\n#include" "a\\n" "a\\0"
"""


@pytest.mark.parametrize("name", [*re.findall(r"'.*?'|\".*?\"|\S+", NOT_SLUGS), "a" * 65])
def test_names_are_slugs(name: str) -> None:
    found = problems(FULL.replace("llama3-8b", name))
    assert len(found) == 1 and found[0][:2] == (2, 7)
    assert "cannot name a folder and a kernel" in found[0][2]
    assert found[0][2].isprintable()


def test_mistakes_are_reported_together_and_in_order() -> None:
    text = FULL.replace("head_dim:", "hed_dim:").replace("bf16", "int8").replace("{q: 128", "{q: 7")
    text = text.replace("target: auto", "target: auto\nname: b")
    assert [(line, column) for line, column, _, _ in problems(text)] == [(5, 3), (6, 10), (12, 12), (14, 1)]


def test_a_flood_of_mistakes_is_cut() -> None:
    text = FULL + "".join(f"key{i}: 1\n" for i in range(100))
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert caught.value.problems[-1].message == f"and {100 - MAX_PROBLEMS} more"


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("", 1, 1, "the spec is empty"),
        ("# nothing\n", 1, 1, "the spec is empty"),
        ("[]", 1, 1, "a spec is a mapping"),
        ("\ncausal", 2, 1, "a spec is a mapping"),
        ("a: b: c", 1, 5, "not valid YAML"),
        ("a: 1\nb\x00: 1", 2, 2, "not valid YAML: the character 0x0"),
        ("{" * 5000, 1, 9, "nested deeper than 8 levels"),
        ("- " * 5000, 1, 17, "nested deeper than 8 levels"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", 1, 4, "anchors and aliases"),
        ("x" * 10_000_000, 1, 1, "larger than 64 KiB"),
    ],
)
def test_documents_that_are_no_spec(text: str, line: int, column: int, message: str) -> None:
    with within(1):
        found = problems(text)
    assert found[0][:2] == (line, column) and message in found[0][2]


def test_largest_file_is_refused_or_read_at_once() -> None:
    for line in ("a: b\n", "- a\n", "? a\n", "a: {b: [c]}\n"):
        with within(5), pytest.raises(SpecError):
            parse_spec(line * (60_000 // len(line)))


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        ({}, ["key 'name' is missing", "key 'attention' is missing"]),
        (
            {"name": "a", "attention": {"heads": 2, "head_dim": 7}},
            ["attention.head_dim must be a multiple of 8"],
        ),
        ({"name": "a", "attention": {"heads": 2.0, "head_dim": 8}}, ["heads must be an integer or"]),
        (
            {"name": "a", "attention": {"heads": 2, "head_dim": 8, "scale": "hd"}},
            ['scale: unknown name "hd"'],
        ),
        ({"name": "a", "attention": {"heads": 2, "head_dim": 8}, "tile": {}}, ['unknown key "tile"']),
        ({"name": object(), "attention": None}, ["name must be text", "attention must be a mapping"]),
        (
            {"name": "a", "attention": {"heads": 2, "head_dim": 8, "scale": float("nan")}},
            ["scale: unknown name"],
        ),
    ],
)
def test_python_specs_are_held_to_the_same(data: dict[str, object], messages: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        AttentionSpec(**data)
    found = caught.value.problems
    assert len(found) == len(messages)
    for problem, message in zip(found, messages, strict=True):
        assert message in problem.message
        assert problem.location in (None, Location("attention.scale", 1, 1)), "in the text that was given"
