"""Specs written as YAML, and read back to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spec_texts import FULL, LEAST

from flashgen.spec import AttentionSpec, dump_spec, load_spec, parse_spec

SPECS = sorted((Path(__file__).parent.parent / "specs").glob("*.yaml"))


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
    reference=st.sampled_from(["running", "first"]),
    edge_tiles=st.sampled_from(["inline", "apart"]),
    key_order=st.sampled_from(["descending", "ascending"]),
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
