"""The parts of the benchmark that need no GPU: what a peer is asked for, and how the result is shown."""

from __future__ import annotations

import pytest
import sympy
import torch

from flashgen.cli.arguments import gallery
from flashgen.cli.bench import _table, _to_dict
from flashgen.cli.terminal import console
from flashgen.explore.bench import Comparison, Timing
from flashgen.explore.inputs import random_inputs
from flashgen.explore.peers import PEERS, Case, Unsupported
from flashgen.runtime import interpret
from flashgen.runtime.reference import elementwise_mask
from flashgen.spec import AttentionSpec, load_spec, parse_spec
from flashgen.spec.symbols import KV, Q


def spec_of(mask: str, align: str = "bottom_right") -> AttentionSpec:
    return parse_spec(
        f"""
flashgen: 1
name: tiny
attention: {{heads: {{q: 4, kv: 2}}, head_dim: 32, mask: {mask}, align: {align}}}
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
def test_flex_attention_gets_the_specs_mask(name: str) -> None:
    spec = load_spec(gallery()[name])
    case = Case.of(spec, 1, 40, 56)
    keep = sympy.lambdify([Q, KV], spec.attention.condition, modules="torch")
    kept = torch.as_tensor(keep(torch.arange(40)[:, None] + case.shift, torch.arange(56)[None, :]))
    assert torch.equal(kept.expand(40, 56), elementwise_mask(spec, 40, 56, torch.device("cpu")))


def test_flops_count_what_the_mask_keeps() -> None:
    full, causal = (Case.of(spec_of(mask), 2, 64, 64).work.flops for mask in ("full", "causal"))
    assert full == 4 * 2 * 4 * 64 * 64 * 32
    assert causal / full == 65 / 128


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
