"""A picture of what a mask does: the tiles that are skipped, visited whole, and visited with masking."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np

from flashgen.errors import PlanError
from flashgen.plan import KernelPlan, Workload
from flashgen.plan.explain_mask import MaskExplanation, explain_mask, positions
from flashgen.plan.tile_map import Bits
from flashgen.plan.tiles import TileClass

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
# Told apart by brightness alone too.
COLOURS = {TileClass.SKIPPED: "#f4f1ea", TileClass.FULL: "#2a6f97", TileClass.PARTIAL: "#f4a259"}
PANEL_INCHES = 5.0
PANEL_LETTERS = 60  # of the title, that a panel's width holds
GRID_TILES = 64  # up to so many, lines are drawn between tiles
DOTS = 192  # of a panel's side; of more tiles, several share a dot


def draw_tiles(plan: KernelPlan, work: Workload, path: Path) -> None:
    """Write a PNG or SVG of a plan's tiles over a workload: rows of queries down, keys across.

    One panel for each of a few batches and heads that the mask tells apart.

    Raises:
        PlanError: the file is of another kind, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise PlanError(f"cannot draw to {path}", hint=f"end its name with {' or '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise PlanError("drawing needs matplotlib", hint="pip install 'flashgen[plot]'") from None

    shown = explain_mask(plan, work)
    which = work.coverage.representatives()[:4]
    columns = min(len(which), 2)
    rows = -(-len(which) // columns)
    figure = Figure(
        figsize=(columns * PANEL_INCHES, rows * PANEL_INCHES + 1.2), layout="constrained", dpi=150
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(which) :]:
        panel.set_axis_off()
    for panel, (batch, head) in zip(panels, which, strict=False):
        _draw(panel, plan, work, batch, head)
        if len(which) > 1:
            panel.set_title(_name(plan, batch, head), fontsize=9)
    lines = [part for line in _title(plan, work, shown) for part in wrap(line, columns * PANEL_LETTERS)]
    figure.suptitle("\n".join(lines), fontsize=10)
    shares = {
        TileClass.SKIPPED: ("skipped", shown.skipped),
        TileClass.FULL: ("full: unmasked", shown.full),
        TileClass.PARTIAL: ("partial: masked", shown.partial),
    }
    patches = [
        Patch(facecolor=COLOURS[what], edgecolor="#888888", label=f"{name} {share:.1%}")
        for what, (name, share) in shares.items()
    ]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=9,
        handlelength=1.5, columnspacing=1.5,
    )  # fmt: skip
    figure.savefig(path)


def _draw(panel: Axes, plan: KernelPlan, work: Workload, batch: int, head: int) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    tile_q, tile_kv = positions(plan), plan.tile_kv
    classes = work.coverage.classes(batch, head, tile_q, tile_kv)
    colours = ListedColormap([COLOURS[what] for what in TileClass])
    norm = BoundaryNorm([-0.5, 0.5, 1.5, 2.5], colours.N)
    q_tiles, kv_tiles = classes.shape
    group = _tiles_of_a_dot(work, plan)
    dots = _dots(classes, group)
    extent = (0, dots.shape[1] * group * tile_kv, dots.shape[0] * group * tile_q, 0)
    panel.imshow(dots, cmap=colours, norm=norm, extent=extent, aspect="auto", interpolation="nearest")
    if max(q_tiles, kv_tiles) <= GRID_TILES:
        panel.hlines(np.arange(1, q_tiles) * tile_q, *extent[:2], color="white", linewidth=0.4)
        panel.vlines(np.arange(1, kv_tiles) * tile_kv, 0, q_tiles * tile_q, color="white", linewidth=0.4)
    panel.set_box_aspect(min(max(work.seqlen_q / work.seqlen_kv, 0.25), 2.0))
    panel.set_xlim(0, work.seqlen_kv)
    panel.set_ylim(work.seqlen_q, 0)
    panel.set_xlabel("key", fontsize=9)
    panel.set_ylabel("query", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[:].set_linewidth(0.3)  # no wider than the dots at the edge
    for axis, length in ((panel.xaxis, work.seqlen_kv), (panel.yaxis, work.seqlen_q)):
        axis.set_ticks(_ticks(length))


def _tiles_of_a_dot(work: Workload, plan: KernelPlan) -> int:
    """On each side."""
    tiles = max(-(-work.seqlen_q // positions(plan)), -(-work.seqlen_kv // plan.tile_kv))
    return -(-tiles // DOTS)


def _dots(classes: Bits, group: int) -> Bits:
    """The costliest class of each group of tiles: a thin diagonal stays to be seen."""
    rows, columns = (np.arange(0, length, group) for length in classes.shape)
    return np.asarray(np.maximum.reduceat(np.maximum.reduceat(classes, rows, axis=0), columns, axis=1))


def _ticks(length: int) -> list[int]:
    """Multiples of a power of two, four to eight of them."""
    step = max(1, 1 << max(0, (length // 4).bit_length() - 1))
    return list(range(0, length + 1, step))


def _name(plan: KernelPlan, batch: int, head: int) -> str:
    over = plan.mask.derivation.over
    return ", ".join(f"{name} {n}" for name, n in (("batch", batch), ("head", head)) if name in over)


def _title(plan: KernelPlan, work: Workload, shown: MaskExplanation) -> list[str]:
    condition = shown.condition if len(shown.condition) <= 70 else plan.mask.label
    lines = [
        f"{plan.spec}: {condition}",
        f"{work.seqlen_q:,} queries x {work.seqlen_kv:,} keys in tiles of "
        f"{positions(plan)} x {plan.tile_kv}; route: {shown.route}",
    ]
    group = _tiles_of_a_dot(work, plan)
    notes = [shown.caveat, f"each dot {group} x {group} tiles, the costliest of them" if group > 1 else ""]
    return [*lines, *(f"({note})" for note in notes if note)]


__all__ = ["draw_tiles"]
