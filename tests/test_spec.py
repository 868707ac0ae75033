"""What a spec says: its keys, short forms and defaults, where they stand; from files and from Python."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import sympy
from spec_texts import FULL, LEAST

from flashgen.errors import Location, SpecError
from flashgen.plan.model import Sm80Schedule, Sm90Schedule
from flashgen.spec import AttentionSpec, RowBounds, load_spec, parse_spec
from flashgen.spec.attention import Attention, Heads
from flashgen.spec.model import Schedule, Tiles
from flashgen.spec.symbols import KV, SCORE, Q

ROOT = Path(__file__).resolve().parent.parent

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
    declared = load_spec(ROOT / "specs" / "written-out.yaml")
    for other in (pickle.loads(pickle.dumps(declared)), copy.deepcopy(declared)):
        assert other == declared and hash(other) == hash(declared)


def test_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        parse_spec(FULL).name = "other"  # type: ignore[misc]


def test_schedule_keys_are_those_of_the_plan() -> None:
    """The spec may not import the plan, so the names stand twice; they must be the same names."""
    planned = {f.name for record in (Sm80Schedule, Sm90Schedule) for f in fields(record)}
    assert set(Schedule.model_fields) == planned | {"family"}


def test_the_documentation_is_a_spec() -> None:
    text = (ROOT / "docs" / "spec.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert parse_spec(examples[0]).attention.score_label == "softcap50"
    assert len(examples) > 1
    for part in examples[1:]:
        parse_spec(f"flashgen: 1\nname: a\n{part}")


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
