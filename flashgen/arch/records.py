"""The records. Sources are public documents or, where marked, measurements.

Abbreviations used in `sources`:

* *CC tables*: NVIDIA, CUDA Programming Guide, appendix "Compute Capabilities", technical specifications.
* *throughput table*: same guide, "Throughput of Native Arithmetic Instructions".
* *estimate*: no public measurement was at hand; only the ranking of tiles leans on it, never legality.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flashgen.arch.model import Arch

_KIB = 1024
_MIB = 1024 * 1024

_FROM_TABLES = dict.fromkeys(
    (
        "capability",
        "smem_per_block",
        "smem_per_sm",
        "smem_reserved_per_block",
        "registers_per_sm",
        "max_registers_per_thread",
        "max_threads_per_sm",
        "max_blocks_per_sm",
        "features",
    ),
    "CC tables",
)
_MUFU = "throughput table: 16 results of ex2 per clock per SM"

SM_80 = Arch(
    target="sm_80",
    title="Ampere: A100",
    capability=(8, 0),
    sms=108,
    smem_per_block=163 * _KIB,
    smem_per_sm=164 * _KIB,
    smem_reserved_per_block=1 * _KIB,
    registers_per_sm=65536,
    max_registers_per_thread=255,
    max_threads_per_sm=2048,
    max_blocks_per_sm=32,
    l2_bytes=40 * _MIB,
    hbm_bytes_per_s=2.039e12,
    l2_bytes_per_s=4.83e12,
    clock_hz=1.41e9,
    tensor_flops={"bf16": 312e12, "fp16": 312e12},
    mma_sync_fraction=1.0,
    exp2_per_clock_per_sm=16,
    features=frozenset({"cp_async"}),
    sources=_FROM_TABLES
    | {
        "sms": "NVIDIA A100 whitepaper",
        "l2_bytes": "NVIDIA A100 whitepaper",
        "hbm_bytes_per_s": "A100 80GB SXM data sheet",
        "l2_bytes_per_s": "measured, NVIDIA developer forum thread 198560 (whitepaper: 5120 B/clock)",
        "clock_hz": "NVIDIA A100 whitepaper, boost",
        "tensor_flops": "NVIDIA A100 whitepaper, dense",
        "mma_sync_fraction": "mma.sync is the chip's only tensor instruction",
        "exp2_per_clock_per_sm": _MUFU,
    },
)

SM_86 = Arch(
    target="sm_86",
    title="Ampere: RTX 3090, A10, A40",
    capability=(8, 6),
    sms=82,
    smem_per_block=99 * _KIB,
    smem_per_sm=100 * _KIB,
    smem_reserved_per_block=1 * _KIB,
    registers_per_sm=65536,
    max_registers_per_thread=255,
    max_threads_per_sm=1536,
    max_blocks_per_sm=16,
    l2_bytes=6 * _MIB,
    hbm_bytes_per_s=936e9,
    l2_bytes_per_s=2.5e12,
    clock_hz=1.695e9,
    tensor_flops={"bf16": 71e12, "fp16": 71e12},
    mma_sync_fraction=1.0,
    exp2_per_clock_per_sm=16,
    features=frozenset({"cp_async"}),
    sources=_FROM_TABLES
    | {
        "sms": "NVIDIA GA102 whitepaper, RTX 3090",
        "l2_bytes": "NVIDIA GA102 whitepaper, RTX 3090",
        "hbm_bytes_per_s": "NVIDIA GA102 whitepaper, RTX 3090 (GDDR6X)",
        "l2_bytes_per_s": "estimate: two thirds of A100's bytes per clock per SM",
        "clock_hz": "NVIDIA GA102 whitepaper, RTX 3090, boost",
        "tensor_flops": "NVIDIA GA102 whitepaper, RTX 3090, dense, fp32 accumulation (A10: 125e12)",
        "mma_sync_fraction": "mma.sync is the chip's only tensor instruction",
        "exp2_per_clock_per_sm": _MUFU,
    },
)

SM_89 = Arch(
    target="sm_89",
    title="Ada: L40S, RTX 4090",
    capability=(8, 9),
    sms=142,
    smem_per_block=99 * _KIB,
    smem_per_sm=100 * _KIB,
    smem_reserved_per_block=1 * _KIB,
    registers_per_sm=65536,
    max_registers_per_thread=255,
    max_threads_per_sm=1536,
    max_blocks_per_sm=24,
    l2_bytes=96 * _MIB,
    hbm_bytes_per_s=864e9,
    l2_bytes_per_s=4.9e12,
    clock_hz=2.52e9,
    tensor_flops={"bf16": 362e12, "fp16": 362e12},
    mma_sync_fraction=1.0,
    exp2_per_clock_per_sm=16,
    features=frozenset({"cp_async"}),
    sources=_FROM_TABLES
    | {
        "sms": "L40S data sheet (AD102, 18,176 CUDA cores)",
        "l2_bytes": "NVIDIA Ada whitepaper, full AD102 (RTX 4090: 72 MiB)",
        "hbm_bytes_per_s": "L40S data sheet (GDDR6)",
        "l2_bytes_per_s": "estimate: as RTX 4090, 4.9e12 by cp.async in smallscientist1/cuda_microbenchmark",
        "clock_hz": "L40S, boost",
        "tensor_flops": "L40S data sheet, dense (half of the figure with sparsity)",
        "mma_sync_fraction": "mma.sync is the chip's only tensor instruction",
        "exp2_per_clock_per_sm": _MUFU,
    },
)

SM_90A = Arch(
    target="sm_90a",
    title="Hopper: H200, H100 (throughputs measured on an H200)",
    capability=(9, 0),
    sms=132,
    smem_per_block=227 * _KIB,
    smem_per_sm=228 * _KIB,
    smem_reserved_per_block=1 * _KIB,
    registers_per_sm=65536,
    max_registers_per_thread=255,
    max_threads_per_sm=2048,
    max_blocks_per_sm=32,
    l2_bytes=50 * _MIB,
    hbm_bytes_per_s=4.26e12,
    l2_bytes_per_s=6.5e12,
    clock_hz=1.83e9,
    tensor_flops={"bf16": 790e12, "fp16": 790e12},
    mma_sync_fraction=0.62,
    exp2_per_clock_per_sm=16,
    features=frozenset({"cp_async", "tma", "wgmma", "setmaxnreg", "cluster"}),
    sources=_FROM_TABLES
    | {
        "sms": "NVIDIA H100 whitepaper, SXM5; the same on H200",
        "l2_bytes": "NVIDIA H100 whitepaper (H200 reports up to 60 MiB)",
        "hbm_bytes_per_s": "measured on an H200: copy, read + write (data sheet: 4.8e12)",
        "l2_bytes_per_s": "estimate after Chips and Cheese, 'Nvidia's H100: Funny L2, and Tons of Bandwidth'",
        "clock_hz": "measured on an H200: 3.9e12 exp2/s over 132 SMs x 16",
        "tensor_flops": "measured on an H200: torch matmul, bf16, 690-790e12 (whitepaper: 989e12)",
        "mma_sync_fraction": "Luo et al., arXiv 2402.13499: mma.sync averages 62% of Hopper's peak",
        "exp2_per_clock_per_sm": _MUFU,
    },
)

SM_100A = Arch(
    target="sm_100a",
    title="Blackwell: B200",
    capability=(10, 0),
    sms=148,
    smem_per_block=227 * _KIB,
    smem_per_sm=228 * _KIB,
    smem_reserved_per_block=1 * _KIB,
    registers_per_sm=65536,
    max_registers_per_thread=255,
    max_threads_per_sm=2048,
    max_blocks_per_sm=32,
    l2_bytes=126 * _MIB,
    hbm_bytes_per_s=8.0e12,
    l2_bytes_per_s=1.0e13,
    clock_hz=1.85e9,
    tensor_flops={"bf16": 2250e12, "fp16": 2250e12},
    mma_sync_fraction=0.25,
    exp2_per_clock_per_sm=16,
    features=frozenset({"cp_async", "tma", "setmaxnreg", "cluster"}),
    sources=_FROM_TABLES
    | {
        "sms": "Chips and Cheese, 'Nvidia's B200': 74 SMs on each of two dies",
        "l2_bytes": "same article",
        "hbm_bytes_per_s": "DGX B200 data sheet, per GPU",
        "l2_bytes_per_s": "estimate: H100's bytes per clock per SM, 148 SMs, rounded up",
        "clock_hz": "DGX B200, boost",
        "tensor_flops": "DGX B200 data sheet, per GPU, dense (tcgen05)",
        "mma_sync_fraction": "estimate: mma.sync keeps Ampere's rate per SM, 2,048 FLOP/clock",
        "exp2_per_clock_per_sm": _MUFU,
    },
)

SM_120A = Arch(
    target="sm_120a",
    title="Blackwell: RTX 5090",
    capability=(12, 0),
    sms=170,
    smem_per_block=99 * _KIB,
    smem_per_sm=100 * _KIB,
    smem_reserved_per_block=1 * _KIB,
    registers_per_sm=65536,
    max_registers_per_thread=255,
    max_threads_per_sm=1536,
    max_blocks_per_sm=24,
    l2_bytes=96 * _MIB,
    hbm_bytes_per_s=1.792e12,
    l2_bytes_per_s=6.0e12,
    clock_hz=2.407e9,
    tensor_flops={"bf16": 209.5e12, "fp16": 209.5e12},
    mma_sync_fraction=1.0,
    exp2_per_clock_per_sm=16,
    features=frozenset({"cp_async", "tma", "setmaxnreg", "cluster"}),
    sources=_FROM_TABLES
    | {
        "sms": "NVIDIA RTX Blackwell whitepaper, RTX 5090",
        "l2_bytes": "NVIDIA RTX Blackwell whitepaper, RTX 5090",
        "hbm_bytes_per_s": "NVIDIA RTX Blackwell whitepaper, RTX 5090 (GDDR7)",
        "l2_bytes_per_s": "estimate: RTX 4090's measured bytes per clock per SM, at this clock and SM count",
        "clock_hz": "NVIDIA RTX Blackwell whitepaper, RTX 5090, boost",
        "tensor_flops": "NVIDIA RTX Blackwell whitepaper, RTX 5090, dense, fp32 accumulation",
        "mma_sync_fraction": "the chip has neither wgmma nor tcgen05",
        "exp2_per_clock_per_sm": _MUFU,
    },
)

ARCHS: Mapping[str, Arch] = MappingProxyType(
    {record.target: record for record in (SM_80, SM_86, SM_89, SM_90A, SM_100A, SM_120A)}
)

# What is built for when nothing says otherwise and no GPU is present.
DEFAULT_TARGET = "sm_90a"
