"""The parts of the benchmark that need no GPU: what a peer is asked for, and how the result is shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch

from flashgen.cli.arguments import gallery
from flashgen.cli.bench import _table, _to_dict
from flashgen.cli.terminal import console
from flashgen.explore import bench
from flashgen.explore.bench import Comparison, Timing
from flashgen.explore.inputs import random_inputs, sample_inputs
from flashgen.explore.peers import PEERS, Case, Unsupported, flex_functions
from flashgen.runtime import interpret
from flashgen.runtime.elements import Box, Elements
from flashgen.runtime.inputs import Declarations, Sizes, arrange
from flashgen.spec import AttentionSpec, load_spec, parse_spec


def spec_of(mask: str, align: str = "bottom_right", score: str = "score") -> AttentionSpec:
    return parse_spec(
        f"""
flashgen: 1
name: tiny
attention: {{heads: {{q: 4, kv: 2}}, head_dim: 32, mask: {mask}, align: {align}, score: {score}}}
passes: [forward]
workload: {{batch: 1, seqlen: 64}}
tiles: auto
target: sm_80
"""
    )


@pytest.mark.parametrize(
    ("mask", "window"), [("full", (-1, -1)), ("causal", (-1, 0)), ("{window: 10}", (9, 0))]
)
def test_masks_as_the_peers_take_them(mask: str, window: tuple[int, int]) -> None:
    assert Case.of(spec_of(mask), 1, 48, 64).window == window


def test_peers_align_bottom_right() -> None:
    spec = spec_of("causal", "top_left")
    assert Case.of(spec, 1, 64, 64).window == (-1, 0)
    with pytest.raises(Unsupported, match="bottom-right"):
        _ = Case.of(spec, 1, 48, 64).window
    assert Case.of(spec_of("full", "top_left"), 1, 48, 64).window == (-1, -1)


@pytest.mark.parametrize("peer", ["cudnn", "flash", "efficient"])
def test_sdpa_is_not_asked_for_what_it_does_differently(peer: str) -> None:
    for mask, lengths in (("{window: 10}", (64, 64)), ("causal", (48, 64))):
        case = Case.of(spec_of(mask), 1, *lengths)
        with pytest.raises(Unsupported):
            PEERS[peer](case, *random_inputs(case.work, "cpu"))


@pytest.mark.parametrize("mask", ["full", "causal", "{window: 10}"])
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_outputs_are_compared_with_the_right_rows(mask: str, align: str) -> None:
    from flashgen.arch import arch
    from flashgen.plan import solve

    spec = spec_of(mask, align)
    case = Case.of(spec, 1, 48, 64)
    q, k, v = random_inputs(case.work, "cpu")
    rows, expected = case.reference(q, k, v, rows=8)
    output, _ = interpret(solve(spec, arch("sm_80")), q, k, v)
    assert rows.tolist() == [*range(8), *range(40, 48)]
    torch.testing.assert_close(output[0, rows, 0].double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", gallery())
def test_flex_attention_gets_the_specs_mask_and_score(name: str) -> None:
    spec = load_spec(gallery()[name])
    case = Case.of(spec, 2, 40, 56)
    q, k, _ = random_inputs(case.work, "cpu")
    case = replace(case, samples=sample_inputs(spec, q, k))
    sizes, declared = Sizes.of(q, k, spec.attention.align), Declarations.of(spec)
    inputs = arrange(declared, **case.samples.arguments, name=name)
    elements = Elements(
        declared, inputs, sizes, scale=spec.scale, real=torch.float32, device=torch.device("cpu")
    )
    keep, modify = flex_functions(case, q, k)
    b, h, row, kv = torch.meshgrid(
        *(torch.arange(length) for length in (2, sizes.heads_q, 40, 56)), indexing="ij"
    )
    score = torch.randn(b.shape)
    box = Box.whole(sizes)
    kept = torch.as_tensor(keep(b, h, row, kv)).expand(b.shape)
    assert torch.equal(kept, elements.at(spec.attention.condition, box).expand(b.shape))
    expected = elements.at(spec.attention.score_expr, box, {"score": score})
    torch.testing.assert_close(modify(score, b, h, row, kv), expected.expand(b.shape))


@pytest.mark.parametrize(
    ("score", "cap"), [("score", 0.0), ("softcap(30)", 30.0), ("5 * tanh(score / 5)", 5.0)]
)
def test_soft_caps_are_recognised(score: str, cap: float) -> None:
    assert Case.of(spec_of("causal", score=score), 1, 64, 64).softcap == cap


@pytest.mark.parametrize("score", ["alibi", "2 * tanh(score)", "sink", "softcap(30) + 1"])
def test_peers_are_not_asked_for_other_scores(score: str) -> None:
    case = Case.of(spec_of("causal", score=score), 1, 64, 64)
    for peer in ("cudnn", "flash", "efficient", "fa3", "fa4", "flashinfer"):
        with pytest.raises((Unsupported, ImportError)):
            PEERS[peer](case, *random_inputs(case.work, "cpu"))
    with pytest.raises(Unsupported):
        _ = case.softcap


def test_flops_count_what_the_mask_keeps() -> None:
    full, causal = (Case.of(spec_of(mask), 2, 64, 64).work.flops for mask in ("full", "causal"))
    assert full == 4 * 2 * 4 * 64 * 64 * 32
    assert causal / full == 65 / 128


@pytest.mark.parametrize("count", range(1, 9))
def test_each_follows_each_other_equally_often(count: int) -> None:
    orders = bench.balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    times = len(orders) // count
    assert Counter(order[0] for order in orders) == dict.fromkeys(range(count), times)
    assert Counter(pair for order in orders for pair in pairwise(order)) == dict.fromkeys(
        permutations(range(count), 2), times
    )


def test_a_peer_may_refuse_and_flashgen_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("head_dim 32 is not taken\nand more")

    zeros = torch.zeros(1, 64, 4, 32)
    monkeypatch.setattr(bench, "require_gpu", lambda: None)
    monkeypatch.setattr(bench, "random_inputs", lambda work, device: random_inputs(work, "cpu"))
    monkeypatch.setattr(bench, "interleave", lambda calls, *_: (dict.fromkeys(calls, 1.0),) * 2)
    monkeypatch.setattr(bench, "_flashgen", lambda *_: lambda: zeros)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(PEERS, "fa4", refuse)
    found = bench.compare(spec_of("causal"), 1, 64, 64, peers=["fa4"])
    assert [timing.name for timing in found.timings] == ["flashgen"]
    assert found.missing == {"fa4": "refuses: head_dim 32 is not taken"}
    monkeypatch.setattr(bench, "_flashgen", refuse)
    with pytest.raises(AssertionError):
        bench.compare(spec_of("causal"), 1, 64, 64, peers=[])


def test_the_table_says_what_is_missing_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    timings = (Timing("flashgen", 1.0, 300.0, 1e-3, True), Timing("flash", 2.0, 150.0, 1e-3, False))
    comparison = Comparison(Case.of(spec_of("causal"), 2, 64, 64), timings, {"fa4": "No module named 'x'"})
    console().print(_table(comparison))
    text = capsys.readouterr().out
    assert "tiny: causal, batch 2, seqlen 64" in text
    assert "0.50x" in text
    assert "not captured in a graph" in text
    assert "No module named 'x'" in text
    assert _to_dict(comparison)["timings"][1]["tflops"] == 150.0
