"""What flashgen knows of a GPU: one frozen, self-checking record per compile target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

FEATURES = frozenset({"cp_async", "tma", "wgmma", "setmaxnreg", "cluster"})
DTYPES = ("bf16", "fp16")

# Identity, not measurement: these need no source.
_UNSOURCED = frozenset({"target", "title", "sources"})


@dataclass(frozen=True)
class Arch:
    """One compile target. Every number's origin stands in `sources`, under the field's name.

    Raises ValueError at construction when the record contradicts itself or a number has no source.
    """

    target: str  # "sm_90a"; what NVRTC's -arch takes
    title: str  # "Hopper: H100, H200"
    capability: tuple[int, int]  # (9, 0)
    sms: int  # of the part that the throughputs below belong to
    smem_per_block: int  # bytes, the opt-in maximum of one thread block
    smem_per_sm: int  # bytes
    smem_reserved_per_block: int  # bytes the driver takes for itself in each block
    registers_per_sm: int  # 32-bit registers
    max_registers_per_thread: int
    max_threads_per_sm: int
    max_blocks_per_sm: int
    l2_bytes: int
    hbm_bytes_per_s: float
    l2_bytes_per_s: float
    clock_hz: float
    tensor_flops: Mapping[str, float]  # dtype -> dense FLOP/s, fp32 accumulation, best instruction
    mma_sync_fraction: float  # share of tensor_flops that mma.sync reaches
    exp2_per_clock_per_sm: int  # MUFU throughput
    features: frozenset[str]  # of FEATURES
    sources: Mapping[str, str]  # field -> where the number comes from

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor_flops", MappingProxyType(dict(self.tensor_flops)))
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))
        major, minor = self.capability
        named = {f.name for f in fields(self)}
        numbers = {
            name: value
            for name in named
            if isinstance(value := getattr(self, name), (int, float)) and name != "smem_reserved_per_block"
        }
        checks = {
            f"target must be sm_{major}{minor} with at most a suffix": self.target
            in (f"sm_{major}{minor}", f"sm_{major}{minor}a", f"sm_{major}{minor}f"),
            f"no source for {sorted(named - _UNSOURCED - self.sources.keys())}": named - _UNSOURCED
            <= self.sources.keys(),
            f"sources for unknown fields {sorted(self.sources.keys() - named)}": self.sources.keys() <= named,
            "every number must be positive": all(value > 0 for value in numbers.values()),
            "a block and its reserve must fit an SM": self.smem_per_block + self.smem_reserved_per_block
            <= self.smem_per_sm,
            "an instruction names a register in 8 bits": self.max_registers_per_thread <= 255,
            "threads come in warps of 32": self.max_threads_per_sm % 32 == 0,
            f"features must be of {sorted(FEATURES)}": self.features <= FEATURES,
            "wgmma reads its operands through descriptors that TMA fills": not (
                "wgmma" in self.features and "tma" not in self.features
            ),
            f"tensor_flops must cover {DTYPES}": set(self.tensor_flops) == set(DTYPES),
            "mma_sync_fraction must be at most 1": self.mma_sync_fraction <= 1,
            "L2 must be faster than HBM": self.l2_bytes_per_s > self.hbm_bytes_per_s,
            "tensor cores must outrun memory": min(self.tensor_flops.values()) > self.hbm_bytes_per_s,
        }
        broken = [message for message, holds in checks.items() if not holds]
        if broken:
            raise ValueError(f"arch record {self.target}: " + "; ".join(broken))

    def __hash__(self) -> int:
        return hash(self.target)

    @property
    def tag(self) -> str:
        """The target as it stands in kernel names: ``sm90a``."""
        return self.target.replace("_", "")
