"""In which order the persistent blocks of the sm90 family take their tiles: launch and cost model agree."""

from __future__ import annotations

# Tiles are drawn longest first across the heads of a section. More heads balance the SMs better, fewer keep K
# and V in L2: d256 causal 16k on an H200 gave 568, 636, 659, 688 TFLOP/s for sections of 1, 2, 4, 8 heads.
SECTION_BYTES = 64 << 20  # of K and V
SECTION_HEADS_MIN = 16


def heads_per_section(heads: int, kv_bytes: int, sharing: int) -> int:
    """Of `heads` in all; `kv_bytes` are a head's K and V, which `sharing` of the heads have in common."""
    return min(heads, max(SECTION_HEADS_MIN, SECTION_BYTES // kv_bytes * sharing))


__all__ = ["heads_per_section"]
