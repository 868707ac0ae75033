"""The YAML language: round trips, and every mistake at its line and column."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flashgen.errors import Location, SpecError
from flashgen.plan.model import Sm80Schedule, Sm90Schedule
from flashgen.spec import AttentionSpec, RowBounds, dump_spec, load_spec, parse_spec
from flashgen.spec.attention import Attention, Heads
from flashgen.spec.model import Schedule, Tiles
from flashgen.spec.symbols import KV, SCORE, Q
from flashgen.spec.text import MAX_PROBLEMS

SPECS = sorted((Path(__file__).parent.parent / "specs").glob("*.yaml"))

FULL = """\
flashgen: 1                     # version of the language
name: llama3-8b
attention:
  heads: {q: 32, kv: 8}
  head_dim: 128
  dtype: bf16
  scale: 1/sqrt(head_dim)
  mask: window(4096)
  align: bottom_right
passes: [forward]
workload: {batch: 8, seqlen: 4096}
tiles: {q: 128, kv: 64, schedule: {family: sm90, overlap: false}}
target: auto
"""
LEAST = "flashgen: 1\nname: a\nattention: {heads: 2, head_dim: 64}\n"


def problems(text: str) -> list[tuple[int, int, str, str]]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "a.yaml")
    listed = []
    for problem in caught.value.problems:
        assert problem.location is not None and problem.location.file == "a.yaml"
        listed.append((problem.location.line, problem.location.column, problem.message, problem.hint or ""))
    return listed


# -- what a spec says ----------------------------------------------------------------------------------------


def test_every_key() -> None:
    spec = parse_spec(FULL)
    attention = spec.attention
    assert (spec.name, spec.target, spec.passes) == ("llama3-8b", "auto", ("forward",))
    assert (attention.heads.q, attention.heads.kv, attention.heads.group) == (32, 8, 4)
    assert (attention.head_dim.qk, attention.head_dim.v) == (128, 128)
    assert (attention.dtype, attention.align) == ("bf16", "bottom_right")
    assert attention.scale == "1/sqrt(head_dim)"
    assert spec.scale == pytest.approx(128**-0.5)
    assert attention.mask.text == "window(4096)" and attention.mask_label == "window4096"
    assert attention.condition == sympy.And(KV <= Q, Q - KV < 4096)
    assert attention.derivation.segments == (RowBounds(Q - 4095, Q),)
    assert (attention.score_expr, attention.score_label) == (SCORE, "")
    assert (attention.inputs, attention.runtime, attention.sink) == ((), (), False)
    assert (spec.workload.batch, spec.workload.seqlen_q, spec.workload.seqlen_kv) == (8, 4096, 4096)
    assert (spec.tiles.q, spec.tiles.kv, spec.tiles.stages, spec.tiles.warps) == (128, 64, None, None)
    assert dict(spec.tiles.schedule) == {"family": "sm90", "overlap": False}
    assert "ping_pong" not in spec.tiles.schedule and spec.tiles.schedule.get("cluster") is None


def test_defaults() -> None:
    spec = parse_spec(LEAST)
    assert spec == AttentionSpec(name="a", attention={"heads": 2, "head_dim": 64})
    assert (spec.attention.dtype, spec.attention.mask_label, spec.scale) == ("bf16", "full", 0.125)
    assert spec.attention.condition == sympy.true and spec.attention.score_expr == SCORE
    assert spec.tiles == Tiles() and not spec.tiles.schedule


@pytest.mark.parametrize(
    ("scale", "value"),
    [("0.25", 0.25), ("1", 1), ("1e-3", 1e-3), ("1/sqrt(head_dim_qk + head_dim_v)", 320**-0.5), ("'2'", 2)],
)
def test_scales(scale: str, value: float) -> None:
    text = LEAST.replace("head_dim: 64", f"head_dim: {{qk: 192, v: 128}}, scale: {scale}")
    assert parse_spec(text).scale == pytest.approx(value)


def test_long_forms_equal_short_ones() -> None:
    long = LEAST.replace("heads: 2", "heads: {q: 2, kv: 2}").replace("64", "{qk: 64, v: 64}")
    assert parse_spec(long + "tiles: {}\nworkload: {batch: 8, seqlen: {q: 4096, kv: 4096}}") == parse_spec(
        LEAST + "tiles: auto"
    )


def test_locate() -> None:
    spec = parse_spec(FULL, "a.yaml")
    assert spec.locate("tiles", "kv") == Location("a.yaml", 12, 21)
    assert spec.locate("tiles", "schedule", "overlap") == Location("a.yaml", 12, 59)
    assert spec.locate("attention", "mask") == Location("a.yaml", 8, 9)
    assert spec.locate("passes", 0) == Location("a.yaml", 10, 10)
    assert spec.locate("tiles", "stages") is None
    assert AttentionSpec(name="a", attention={"heads": 2, "head_dim": 64}).locate("name") is None


def test_where_it_stands_is_no_part_of_what_it_says() -> None:
    moved = parse_spec("\n\n" + FULL, "elsewhere.yaml")
    assert moved == parse_spec(FULL) and hash(moved) == hash(parse_spec(FULL))
    assert moved != parse_spec(FULL.replace("4096)", "4097)", 1))


def test_survives_pickle_and_copy() -> None:
    spec = parse_spec(FULL, "a.yaml")
    for other in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert other == spec and other.locate("name") == spec.locate("name")
    declared = load_spec(SPECS[0].with_name("written-out.yaml"))
    for other in (pickle.loads(pickle.dumps(declared)), copy.deepcopy(declared)):
        assert other == declared and hash(other) == hash(declared)


def test_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        parse_spec(FULL).name = "other"  # type: ignore[misc]


# -- round trips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_gallery(path: Path) -> None:
    spec = load_spec(path)
    assert spec.name == path.stem
    assert parse_spec(dump_spec(spec)) == spec


def test_dump() -> None:
    assert dump_spec(parse_spec(FULL)) == FULL.replace("                     # version of the language", "")
    assert dump_spec(parse_spec(LEAST)).splitlines()[-4:] == [
        "passes: [forward]",
        "workload: {batch: 8, seqlen: 4096}",
        "tiles: auto",
        "target: auto",
    ]


def test_the_documentation_is_a_spec() -> None:
    text = (Path(__file__).parent.parent / "docs" / "spec.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert parse_spec(examples[0]).attention.score_label == "softcap50"
    assert len(examples) > 1
    for part in examples[1:]:
        parse_spec(f"flashgen: 1\nname: a\n{part}")


def sizes(least: int, most: int, step: int = 1) -> st.SearchStrategy[int]:
    return st.integers(least // step, most // step).map(lambda n: n * step)


def maybe(**values: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional=values)


def pair(a: str, b: str, values: st.SearchStrategy[int]) -> st.SearchStrategy[object]:
    return st.one_of(values, st.fixed_dictionaries({a: values, b: values}))


flag = st.booleans()
schedules = maybe(
    family=st.sampled_from(["sm80", "sm90"]),
    q_in_registers=flag,
    overlap=flag,
    cluster=st.integers(1, 4),
    tile_order=st.sampled_from(["static", "dynamic", "stream_k"]),
    key_order=st.sampled_from(["descending", "ascending"]),
    edge_tiles=st.sampled_from(["inline", "apart"]),
    output_wait=st.sampled_from(["early", "middle", "late"]),
    rescale=st.sampled_from(["early", "late"]),
    consumer_registers=sizes(24, 240, 8),
)
specs = st.fixed_dictionaries(
    {
        # names that another YAML reader would take for numbers, dates or booleans, too
        "name": st.one_of(
            st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True),
            st.sampled_from(["no", "true", "null", "1e3", "0x1f", "012", "2024-01-01", "1_000", "7", "a.b"]),
        ),
        "attention": st.fixed_dictionaries(
            {
                "heads": st.one_of(
                    st.integers(1, 128),
                    st.builds(
                        lambda kv, group: {"q": kv * group, "kv": kv}, st.integers(1, 9), st.integers(1, 9)
                    ),
                ),
                "head_dim": pair("qk", "v", sizes(8, 256, 8)),
            },
            optional={
                "dtype": st.sampled_from(["bf16", "fp16"]),
                "scale": st.one_of(
                    st.floats(1e-6, 1e6),
                    st.integers(1, 9),
                    st.just("2 * head_dim_v ** -0.5"),
                    st.just("exp(-1)"),
                ),
                "mask": st.one_of(
                    st.sampled_from(["full", "causal", "causal and document", "kv <= q or valid[kv]", True]),
                    st.builds(lambda n: {"window": n}, st.integers(1, 9999)),
                    st.builds(lambda n: f"q - kv < {n} and kv <= q and q < last", st.integers(1, 9999)),
                ),
                "score": st.sampled_from(["score", "alibi", {"softcap": 0.5}, "score * heat[head] + 1/last"]),
                "params": st.just({"last": "runtime"}),
                "tensors": st.just(
                    {
                        "valid": {"index": ["kv"], "dtype": "bool"},
                        "heat": {"index": ["head"], "dtype": "fp32", "grad": True},
                    }
                ),
                "sink": st.booleans(),
                "align": st.sampled_from(["bottom_right", "top_left"]),
            },
        ),
    },
    optional={
        "passes": st.just(["forward"]),
        "workload": maybe(batch=st.integers(1, 99), seqlen=pair("q", "kv", st.integers(1, 10**6))),
        "tiles": st.one_of(
            st.just("auto"),
            maybe(q=sizes(16, 256, 16), kv=sizes(8, 256, 8), stages=st.integers(1, 4), schedule=schedules),
        ),
        "target": st.sampled_from(["auto", "sm_80", "sm_90a", "sm_120a"]),
    },
)


@settings(max_examples=150, deadline=None)
@given(specs)
def test_round_trip(data: dict[str, Any]) -> None:
    declared = data["attention"].keys()
    texts = f"{data['attention'].get('mask')} {data['attention'].get('score')}"
    assume("params" in declared or "last" not in texts)
    assume("tensors" in declared or not ("valid" in texts or "heat" in texts))
    spec = AttentionSpec(**data)
    again = parse_spec(dump_spec(spec))
    assert again == spec and hash(again) == hash(spec)
    assert dump_spec(again) == dump_spec(spec)


def test_schedule_keys_are_those_of_the_plan() -> None:
    """The spec may not import the plan, so the names stand twice; they must be the same names."""
    planned = {f.name for record in (Sm80Schedule, Sm90Schedule) for f in fields(record)}
    assert set(Schedule.model_fields) == planned | {"family"}


# -- mistakes --------------------------------------------------------------------------------------------


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
    started = time.perf_counter()
    found = problems(text)
    assert time.perf_counter() - started < 1
    assert found[0][:2] == (line, column) and message in found[0][2]


def test_largest_file_is_refused_or_read_at_once() -> None:
    for line in ("a: b\n", "- a\n", "? a\n", "a: {b: [c]}\n"):
        started = time.perf_counter()
        with pytest.raises(SpecError):
            parse_spec(line * (60_000 // len(line)))
        assert time.perf_counter() - started < 5


# -- files and Python ------------------------------------------------------------------------------------


def test_load(tmp_path: Path) -> None:
    good = tmp_path / "good.yaml"
    good.write_bytes(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode())
    assert load_spec(good) == load_spec(str(good)) == parse_spec(FULL)
    assert load_spec(good).locate("name") == Location(str(good), 2, 7)

    with pytest.raises(SpecError, match="no such file") as caught:
        load_spec(tmp_path / "god.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec("a\0b")

    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"flashgen: 1\nname: \xff\n")
    with pytest.raises(SpecError) as caught:
        load_spec(bad)
    assert str(caught.value) == f"{bad}:2:7: the file is not UTF-8 text"
    bad.write_bytes("é".encode() * 100_000)
    with pytest.raises(SpecError, match="larger than 64 KiB"):
        load_spec(bad)


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


def test_parts_can_be_built_alone() -> None:
    attention = Attention(heads=Heads(q=8, kv=2), head_dim=64, mask="causal")
    assert AttentionSpec(name="a", attention=attention).attention is not None
    with pytest.raises(SpecError, match=r"heads\.q must be a multiple"):
        Heads(q=8, kv=3)
    assert AttentionSpec(name="a", attention=attention) == AttentionSpec(
        name="a", attention={"heads": {"q": 8, "kv": 2}, "head_dim": 64, "mask": "causal"}
    )


def test_importing_the_language_is_light() -> None:
    heavy = "torch cupy jinja2 matplotlib click rich"
    code = (
        f"import sys, flashgen.spec; sys.exit(str([m for m in '{heavy}'.split() if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
