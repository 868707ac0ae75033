"""In which order the persistent blocks of the sm90 family take their tiles: launch and cost model agree."""

from __future__ import annotations

# Tiles are drawn longest first across the heads of a section. More heads balance the SMs better, fewer keep K
# and V in L2. H200, TFLOP/s: d256 causal 16k 568, 636, 659, 688 for sections of 1, 2, 4, 8 heads, and 2k 533
# and 550 for 16 and 32; but d128 causal 512 351 for 32 MiB and 308 for 64.
SECTION_BYTES = 32 << 20  # of K and V
SECTION_HEADS_MIN = 32


def heads_per_section(heads: int, kv_bytes: int, sharing: int) -> int:
    """Of `heads` in all; `kv_bytes` are a head's K and V, which `sharing` of the heads have in common."""
    return min(heads, max(SECTION_HEADS_MIN, SECTION_BYTES // kv_bytes * sharing))


__all__ = ["heads_per_section"]
