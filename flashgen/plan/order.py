"""How the persistent blocks of the sm90 family take their tiles: launch and cost model agree."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt


def heads_per_section(heads: int, kv_bytes: int, sharing: int, section_mib: int) -> int:
    """Of `heads` in all; `kv_bytes` are a head's K and V, which `sharing` of the heads have in common.

    Tiles are drawn longest first across the heads of a section. More heads balance the SMs better, fewer keep
    K and V in L2, which saves power: see docs/performance.md. Sections are about `section_mib` of K and V,
    and alike, since the last one must balance too.
    """
    owners = heads // sharing  # of K and V
    sections = min(max(1, round(owners * kv_bytes / (section_mib << 20))), owners)
    return -(-owners // sections) * sharing


# Key tiles that take as long as leaving a part of a tile to another block and fetching it. A guess.
EXCHANGE_KEY_TILES = 2


@dataclass(frozen=True)
class Division:
    """How persistent blocks divide equal tiles in the order stream_k."""

    whole: int  # tiles that one block each works on; the others are cut
    shares: int  # into so many, for as many blocks; 0 where cutting does not pay
    longest_share: float  # of a block, in key tiles, with what exchanging parts costs


def divide(tiles: int, key_tiles: int, blocks: int) -> Division:
    """`blocks` share what is left when each has had as many whole tiles of `key_tiles`.

    Of n key tiles in p parts, the block that collects them has n / p + EXCHANGE_KEY_TILES * p to do: least
    at p = sqrt(n / EXCHANGE_KEY_TILES).
    """
    rest = tiles % blocks
    shares = min(blocks, int(rest * sqrt(key_tiles / EXCHANGE_KEY_TILES)))
    if shares <= rest or rest * key_tiles >= 2**31:
        return Division(tiles, 0, 0)
    parts = -(-shares // rest)  # of a tile
    longest = -(-rest * key_tiles // shares) + EXCHANGE_KEY_TILES * parts
    return Division(tiles - rest, shares, longest) if longest < key_tiles else Division(tiles, 0, 0)


__all__ = ["Division", "divide", "heads_per_section"]
