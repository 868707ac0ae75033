"""How the persistent blocks of the sm90 family take their tiles: launch and cost model agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt


@lru_cache(maxsize=256)  # the solver asks for every tiling
def heads_per_section(heads: int, kv_bytes: int, sharing: int, section_mib: int) -> int:
    """Of `heads` in all; `kv_bytes` are a head's K and V, which `sharing` of the heads have in common.

    Tiles are drawn longest first across the heads of a section. More heads balance the SMs better, fewer keep
    K and V in L2, which saves power: see docs/performance.md. A section has about `section_mib` of K and V,
    at most a third more unless one head has, so that the last one can be like the others: it must balance
    too.
    """
    owners = max(1, heads // sharing)  # of K and V
    room = section_mib << 20
    fit = min(owners, max(1, 4 * room // (3 * max(kv_bytes, 1))))

    def suits(size: int) -> tuple[float, int]:
        last = (owners - 1) % size + 1
        return last / size, -abs(size * kv_bytes - room)

    return max(range((fit + 1) // 2, fit + 1), key=suits) * sharing


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
