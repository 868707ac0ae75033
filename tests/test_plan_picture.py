"""What `flashgen plan` says and draws of a mask: the route, the shares of tiles, the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from flashgen.arch import ARCHS
from flashgen.cli import main
from flashgen.errors import PlanError
from flashgen.explore.picture import COLOURS, draw_tiles
from flashgen.plan import Workload, solve
from flashgen.plan.explain_mask import MaskExplanation, explain_mask
from flashgen.plan.tiles import TileClass
from flashgen.spec import AttentionSpec

H200 = ARCHS["sm_90a"]


def make_spec(mask: str, seqlen: Any = 1024, **declared: Any) -> AttentionSpec:
    return AttentionSpec(
        name="drawn",
        attention={"heads": {"q": 4, "kv": 2}, "head_dim": 128, "mask": mask, **declared},
        workload={"batch": 2, "seqlen": seqlen},
        tiles={"q": 128, "kv": 128, "stages": 2, "warps": 8},
    )


def explained(mask: str, seqlen: Any = 1024, **declared: Any) -> MaskExplanation:
    spec = make_spec(mask, seqlen, **declared)
    return explain_mask(solve(spec, H200), Workload.of(spec))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "drawn.yaml"
    path.write_text(
        "flashgen: 1\nname: drawn\nattention:\n  heads: 4\n  head_dim: 64\n"
        "  mask: causal and (q - kv) % 2 == 0\n"
        "  score: softcap(30)\n  sink: true\nworkload: {batch: 2, seqlen: 1024}\n"
    )
    return path


# -- in words --------------------------------------------------------------------------------------------


def test_shares_of_tiles_by_hand() -> None:
    causal = explained("causal")
    assert (causal.route, causal.basis, causal.tiles, causal.caveat) == ("bounds", "exact", 64, "")
    assert (causal.skipped, causal.full, causal.partial) == (28 / 64, 28 / 64, 8 / 64)
    assert causal.keys == (("0", "q"),) and causal.residual == "true"
    every = explained("full")
    assert (every.skipped, every.full, every.partial) == (0, 1, 0)
    assert every.reason == "every row keeps every key"


def test_shares_of_tiles_are_means_over_what_the_mask_tells_apart() -> None:
    padding = explained("padding", 512)  # to 410 keys and to 308: 4 tiles, 3 of them full, and 3, of them 2
    assert (padding.skipped, padding.full, padding.partial) == (1 / 8, 5 / 8, 2 / 8)


@pytest.mark.parametrize(
    ("mask", "route", "reason"),
    [
        ("window(9)", "bounds", "one interval of keys"),
        ("sink_window(4, 9)", "bounds", "up to 2 intervals of keys"),
        ("document and causal", "ranges", "a kernel searches doc"),
        ("kv % 2 == 0", "map", "tests every element"),
    ],
)
def test_the_route_is_said(mask: str, route: str, reason: str) -> None:
    said = explained(mask)
    assert said.route == route and reason in said.reason
    assert json.loads(json.dumps(said.to_dict()))["route"] == route


def test_searches_are_spelled_out() -> None:
    ((first, last),) = explained("document").keys
    assert first == "(first kv with doc[batch, kv] >= doc[batch, q])"
    assert last == "(first kv with doc[batch, kv] > doc[batch, q]) - 1"


def test_many_searches_are_told_apart() -> None:
    names = [f"doc{letter}" for letter in "abcdef"]
    said = explained(
        " and ".join(f"{name}[q] == {name}[kv]" for name in names),
        tensors={n: {"index": ["batch", "kv"], "dtype": "int32", "sorted": True} for n in names},
    )
    assert said.route == "ranges"
    ((first, last),) = said.keys
    assert "key_found" not in first + last
    for text, relation in ((first, ">="), (last, ">")):
        for name in names:
            assert text.count(f"(first kv with {name}[batch, kv] {relation} {name}[batch, q])") == 1


def test_what_shares_rest_on_is_said() -> None:
    assert "samples" in explained("document").caveat
    unknown = explained("causal and q - kv < size", params={"size": "runtime"})
    assert unknown.basis == "hull" and "at most" in unknown.caveat
    assert unknown.full == 0 and unknown.partial == 36 / 64


def test_plan_prints_mask_score_and_sink(spec_file: Path) -> None:
    printed = call("plan", spec_file).stdout
    for text in (
        "route: map",
        "kv <= q",
        "(q - kv) % 2",
        "% skipped",
        "30*tanh(score/30)",
        "joins the softmax",
    ):
        assert text in printed
    answer = json.loads(call("plan", spec_file, "--json").stdout)
    assert answer["mask"]["route"] == "map" and answer["mask"]["full"] == 0


# -- drawn -----------------------------------------------------------------------------------------------


def shares_drawn(path: Path) -> dict[TileClass, float]:
    """Of the picture's pixels, those in exactly the colours of full and partial tiles."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    return {
        what: float((np.abs(pixels - np.array(to_rgb(colour))) < 2 / 255).all(axis=-1).mean())
        for what, colour in COLOURS.items()
    }


@pytest.mark.parametrize("mask", ["causal", "band(200)", "document", "kv % 1024 < 300"])
def test_colours_are_the_shares(mask: str, tmp_path: Path) -> None:
    spec = make_spec(mask, 4096)
    plan, work = solve(spec, H200), Workload.of(spec)
    draw_tiles(plan, work, tmp_path / "tiles.png")
    drawn, said = shares_drawn(tmp_path / "tiles.png"), explain_mask(plan, work)
    # the legend's patches and the lines between tiles take a little
    in_all = sum(drawn.values())
    assert drawn[TileClass.FULL] / in_all == pytest.approx(said.full, abs=0.02)
    assert drawn[TileClass.PARTIAL] / in_all == pytest.approx(said.partial, abs=0.02)


def test_long_sequences_keep_their_thin_diagonal(tmp_path: Path) -> None:
    spec = make_spec("causal", 2**17)
    draw_tiles(solve(spec, H200), Workload.of(spec), tmp_path / "tiles.png")
    drawn = shares_drawn(tmp_path / "tiles.png")
    assert 0.3 > drawn[TileClass.FULL] > 20 * drawn[TileClass.PARTIAL] > 0.005


@pytest.mark.parametrize("seqlen", [1024, 2**17])
def test_nothing_is_written_past_the_edge(seqlen: int, tmp_path: Path) -> None:
    from matplotlib.image import imread

    spec = make_spec("kv <= q or kv < size or q < size", seqlen, params={"size": "runtime"})
    draw_tiles(solve(spec, H200), Workload.of(spec), tmp_path / "tiles.png")
    pixels = imread(tmp_path / "tiles.png")[..., :3]
    for edge in (pixels[:, :4], pixels[:, -4:], pixels[:4], pixels[-4:]):
        assert (edge == 1).all()


def test_a_picture_from_the_command(spec_file: Path, tmp_path: Path) -> None:
    for name, start in (("tiles.png", b"\x89PNG"), ("tiles.svg", b"<?xml")):
        assert call("plan", spec_file, "--picture", tmp_path / name).exit_code == 0
        assert (tmp_path / name).read_bytes().startswith(start)


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    spec = make_spec("causal")
    with pytest.raises(PlanError, match=r"end its name with \.png or \.svg"):
        draw_tiles(solve(spec, H200), Workload.of(spec), tmp_path / "tiles.gif")
    assert list(tmp_path.iterdir()) == []
