"""How well a causal mask's tiles fill 132 SMs, by when a block draws its next tile and by heads a section.

    python benchmarks/tile_draws.py [--head-dim 256] [--tile 128x80]

A list simulation of `tile_order: dynamic`, without a GPU: tiles take as long as they have key tiles, and two
more. Printed is the share of the SMs' time that they work, for a draw when the last V is loaded (`late`, two
key tiles before the end) and for one at the tile's start (`early`), over 16k tokens of a hidden size of 2048.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import click

SMS = 132
TOKENS = 16384
HIDDEN = 2048
FIXED = 2  # key tiles that a prologue and an epilogue take as long as
LATE = 2  # key tiles before the end


def lengths(seqlen: int, heads: int, section: int, tile_q: int, tile_kv: int) -> list[int]:
    """Key tiles of every tile, in the order in which they are drawn: longest first in each section."""
    own = [-(-(row + tile_q) // tile_kv) for row in range(0, seqlen, tile_q)][::-1]
    parts = [min(section, heads - first) for first in range(0, heads, section)]
    return [length for part in parts for length in own for _ in range(part)]


def span(tiles: Sequence[int], lead: float) -> float:
    """Until the last is done, where blocks draw `lead` key tiles before the end of the one they work on."""
    drawn = min(SMS, len(tiles))
    events: list[tuple[float, bool, int]] = []  # when, whether it is the end of a tile, of which block
    successor: list[int | None] = [None] * SMS

    def begin(block: int, tile: int, now: float) -> None:
        took = tiles[tile] + FIXED
        heapq.heappush(events, (now + max(0, took - lead), False, block))
        heapq.heappush(events, (now + took, True, block))

    for block in range(drawn):
        begin(block, block, 0)
    now = 0.0
    while events:
        now, ends, block = heapq.heappop(events)
        if not ends:
            successor[block] = drawn if drawn < len(tiles) else None
            drawn += 1
        elif (tile := successor[block]) is not None:
            successor[block] = None
            begin(block, tile, now)
    return now


@click.command()
@click.option("--head-dim", default=256, show_default=True)
@click.option("--tile", default="128x80", show_default=True)
def main(head_dim: int, tile: str) -> None:
    tile_q, tile_kv = map(int, tile.split("x"))
    for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
        heads = TOKENS // seqlen * HIDDEN // head_dim
        for section in sorted({min(heads, size) for size in (1, 2, 4, 8, 16, 32, 64)}):
            tiles = lengths(seqlen, heads, section, tile_q, tile_kv)
            ideal = sum(length + FIXED for length in tiles) / SMS
            late, early = (ideal / span(tiles, lead) for lead in (LATE, float("inf")))
            click.echo(f"seqlen {seqlen:5}  heads a section {section:2}  late {late:.3f}  early {early:.3f}")


if __name__ == "__main__":
    main()
