"""What flashgen knows of a GPU: one frozen, self-checking record per compile target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """One compile target. Every number's origin stands in `sources`, under the field's name."""

    target: str                       # "sm_90a"; what NVRTC's -arch takes
    title: str                        # "Hopper: H100, H200"
    capability: tuple[int, int]       # (9, 0)
    sms: int                          # of the part that the throughputs below belong to
    smem_per_block: int               # bytes, the opt-in maximum of one thread block
    smem_per_sm: int                  # bytes
    smem_reserved_per_block: int      # bytes the driver takes for itself in each block
    registers_per_sm: int             # 32-bit registers
    max_registers_per_thread: int
    max_threads_per_sm: int
    max_blocks_per_sm: int
    l2_bytes: int
    hbm_bytes_per_s: float
    l2_bytes_per_s: float
    clock_hz: float
    tensor_flops: Mapping[str, float]  # dtype -> dense FLOP/s
    exp2_per_clock_per_sm: int         # MUFU throughput
    features: frozenset[str]           # of: cp_async, tma, wgmma, setmaxnreg, cluster
    sources: Mapping[str, str]         # field -> where the number comes from

    @property
    def tag(self) -> str:
        """The target as it stands in kernel names: ``sm90a``."""
        return self.target.replace("_", "")
