"""What a tiling costs: seconds for a workload, from throughputs and tile counts.

A ranking, not a simulation. An SM's time for one kv tile of its resident blocks is that of the busiest pipe
(tensor cores; MUFU and fp32, for the softmax; shared memory) plus the share of the others that fails to
overlap. Blocks are then laid over the SMs in waves, and the whole can be no faster than L2 or HBM deliver.

The constants below are facts of the kernels, each with its origin; all else comes from the arch record.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil

import numpy as np

from flashgen.arch import Arch
from flashgen.plan.constraints import smem_and_registers
from flashgen.plan.io import BYTES, IoModel
from flashgen.plan.model import Sm80Schedule, Sm90Schedule
from flashgen.plan.tiling import Head, Tiling, padded
from flashgen.plan.workload import Workload

SMEM_BYTES_PER_CLOCK = 128  # per SM: 32 banks of 4 bytes
FP32_PER_CLOCK = 128  # per SM, and shared with the integer work of masking

# fp32 instructions for each element of S: maximum, scale-and-subtract, sum, half a conversion of a pair, and
# moves that the compiler adds; fitted together with SERIAL_SM90.
FP32_PER_SCORE = 5
FP32_PER_MASKED_SCORE = 3  # a compare on each side and a select
FP32_PER_RESCALE = 1  # O *= exp(m_old - m_new), each element, each kv tile

# Share of the lesser pipes' time that is not hidden behind the busiest. On sm90 from an ablation on an H200
# (bf16, full, 16k tokens): d128 {128,128} both 661, no ping-pong 489, no overlap 520 TFLOP/s; d64 {192,128}
# with three warpgroups 538 and 495; d256 {128,80} 715. tests/test_plan_cost.py holds the fit.
SERIAL_SM90 = 0.30
SERIAL_SM90_NO_PING_PONG = {1: 0.90, 2: 0.85, 3: 0.45}  # by consumer warpgroups
SERIAL_SM90_NO_OVERLAP = 0.75
# On sm80 warps overlap only with each other. A warp of another block counts as a whole one, a second warp of
# the same block on a scheduler as half, since barriers keep it near the same phase.
SCHEDULERS = 4
SAME_BLOCK_OVERLAP = 0.5

# Of every block and kv tile: issuing addresses, loop and copies; and latency that other warps can hide, of
# barriers and of the first mma after one.
ITERATION_CYCLES = {"sm80": 100.0, "sm90": 0.0}
LATENCY_CYCLES = {"sm80": 400.0, "sm90": 200.0}
PROLOGUE_CYCLES = {"sm80": 2500.0, "sm90": 1500.0}  # a block's (sm90: q tile's) first loads, and storing O
SECOND_Q_BUFFER = 0.6  # of the prologue remains; on an H200, d64, seqlen 512: 358 -> 384 TFLOP/s
OWN_O_BUFFER = 0.9
LOAD_LATENCY_CYCLES = 800.0  # from L2, with a tile's worth of requests in flight
LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Cost:
    """Predicted seconds and what they are made of. Pipe times are what that pipe alone would take."""

    seconds: float
    tensor_s: float
    exp2_s: float  # MUFU
    softmax_s: float  # MUFU and fp32 pipes one after the other
    smem_s: float
    l2_s: float
    hbm_s: float
    l2_bytes: float
    hbm_bytes: float
    waves: float  # blocks over the slots for them; 2.1 means a third wave mostly empty
    blocks_per_sm: int
    tiles_visited: int  # kv tiles over all q tiles of one head
    tiles_masked: int
    tflops: float  # useful TFLOP/s at that time

    def terms(self) -> tuple[tuple[str, float], ...]:
        """(name, value) pairs, as `Explanation.cost` keeps them."""
        return tuple((f.name, float(getattr(self, f.name))) for f in fields(self))


def resident_blocks(arch: Arch, *, threads: int, registers: int, smem_bytes: int) -> int:
    """Blocks that fit one SM at a time (CUDA programming guide, "Hardware Multithreading")."""
    # Registers go to warps in units of 256, that is 8 a thread.
    return min(
        arch.smem_per_sm // (smem_bytes + arch.smem_reserved_per_block),
        arch.registers_per_sm // (padded(registers, 8) * threads),
        arch.max_threads_per_sm // threads,
        arch.max_blocks_per_sm,
    )


def occupancy(tiling: Tiling, head: Head, arch: Arch) -> int:
    """Resident blocks per SM; an sm90 block owns its SM."""
    if tiling.family == "sm90":
        return 1
    smem, registers = smem_and_registers(tiling, head, arch)
    return resident_blocks(arch, threads=32 * tiling.warps, registers=registers, smem_bytes=smem)


def cost(tiling: Tiling, workload: Workload, arch: Arch) -> Cost:
    """Predict a legal tiling's time for a workload."""
    w = workload
    counts = w.tiles(tiling.tile_q, tiling.tile_kv)
    smem, _ = smem_and_registers(tiling, w.head, arch)
    heads = w.batch * w.heads_q
    blocks = counts.q_tiles * heads
    per_sm = max(1, min(occupancy(tiling, w.head, arch), ceil(blocks / arch.sms)))

    masked = counts.masked / max(counts.visited, 1)
    tensor, exp2, fp32, shared = _pipes(tiling, w, arch, masked)
    serial = _serial_share(tiling, per_sm)
    busiest = max(tensor, exp2, fp32, shared)
    # WGMMA reads shared memory by itself; ldmatrix takes its turn among a warp's other instructions.
    taking_turns = tensor + exp2 + fp32 + (shared if tiling.family == "sm80" else 0.0)
    busy = busiest + serial * max(0.0, taking_turns - busiest) + ITERATION_CYCLES[tiling.family]
    busy *= per_sm
    ahead = tiling.stages - 0.5  # K comes a whole tile ahead with two stages, V half a tile behind it
    stall = max(0.0, LOAD_LATENCY_CYCLES - ahead * busy)
    cycles = busy + serial * (LATENCY_CYCLES[tiling.family] + stall)

    prologue = PROLOGUE_CYCLES[tiling.family] * _exposed_prologue(tiling)
    slots = arch.sms * per_sm
    longest_first = np.sort(np.asarray(counts.per_q_tile, dtype=np.float64))[::-1] * cycles + prologue
    span = _makespan(longest_first, heads, slots) / arch.clock_hz

    io = IoModel.of(w, tiling.tile_q, tiling.tile_kv, smem)
    blocks_per_kv_head = max(counts.q_tiles * (w.heads_q // w.heads_kv), 1)
    heads_in_flight = min(w.batch * w.heads_kv, ceil(slots / blocks_per_kv_head))
    working_set = heads_in_flight * w.seqlen_kv * (w.head_dim_qk + w.head_dim_v) * BYTES
    hbm_bytes = io.missed(working_set, arch.l2_bytes)
    l2_s, hbm_s = io.rereads_miss / arch.l2_bytes_per_s, hbm_bytes / arch.hbm_bytes_per_s

    seconds = max(span, l2_s, hbm_s) + LAUNCH_SECONDS
    pipe_s = counts.visited * heads / (arch.sms * arch.clock_hz)
    return Cost(
        seconds=seconds,
        tensor_s=tensor * pipe_s,
        exp2_s=exp2 * pipe_s,
        softmax_s=(exp2 + fp32) * pipe_s,
        smem_s=shared * pipe_s,
        l2_s=l2_s,
        hbm_s=hbm_s,
        l2_bytes=io.rereads_miss,
        hbm_bytes=hbm_bytes,
        waves=blocks / slots,
        blocks_per_sm=per_sm,
        tiles_visited=counts.visited,
        tiles_masked=counts.masked,
        tflops=w.flops / seconds / 1e12,
    )


def _pipes(tiling: Tiling, w: Workload, arch: Arch, masked: float) -> tuple[float, float, float, float]:
    """Cycles of one block's kv tile on the tensor cores, the MUFU, the fp32 pipes, and in shared memory."""
    scores = tiling.tile_q * tiling.tile_kv
    d_qk, d_v = padded(w.head_dim_qk, 16), padded(w.head_dim_v, 16)
    fraction = arch.mma_sync_fraction if tiling.family == "sm80" else 1.0
    flops_per_clock = arch.tensor_flops[w.dtype] * fraction / (arch.sms * arch.clock_hz)
    tensor = 2 * scores * (d_qk + d_v) / flops_per_clock

    exp2 = scores / arch.exp2_per_clock_per_sm
    fp32 = (
        scores * (FP32_PER_SCORE + masked * FP32_PER_MASKED_SCORE)
        + tiling.tile_q * w.head_dim_v * FP32_PER_RESCALE
    ) / FP32_PER_CLOCK

    kv_bytes = BYTES * tiling.tile_kv * (d_qk + d_v)
    q_bytes = BYTES * tiling.tile_q * d_qk
    if isinstance(tiling.schedule, Sm80Schedule):
        # every warp reads all of K and V; both also arrive once
        read = tiling.warps * kv_bytes + (0 if tiling.schedule.q_in_registers else q_bytes)
    else:
        # every warpgroup's wgmma reads all of K and V, Q as its A operand, and P if it has to come back
        p_bytes = 0 if tiling.schedule.p_in_registers else 2 * BYTES * scores
        read = tiling.warps // 4 * kv_bytes + q_bytes + p_bytes
    return tensor, exp2, fp32, (read + kv_bytes) / SMEM_BYTES_PER_CLOCK


def _serial_share(tiling: Tiling, blocks_per_sm: int) -> float:
    schedule = tiling.schedule
    if isinstance(schedule, Sm80Schedule):
        warps_each = max(1.0, tiling.warps * blocks_per_sm / SCHEDULERS)
        blocks_each = min(warps_each, float(blocks_per_sm))
        return 1.0 / (blocks_each + SAME_BLOCK_OVERLAP * (warps_each - blocks_each))
    if not schedule.overlap:
        return SERIAL_SM90_NO_OVERLAP if schedule.ping_pong else 1.0
    if schedule.ping_pong:
        return SERIAL_SM90
    return SERIAL_SM90_NO_PING_PONG.get(tiling.warps // 4, min(SERIAL_SM90_NO_PING_PONG.values()))


def _exposed_prologue(tiling: Tiling) -> float:
    schedule = tiling.schedule
    if isinstance(schedule, Sm90Schedule):
        second_q = SECOND_Q_BUFFER if schedule.q_stages > 1 else 1.0
        return second_q if schedule.o_aliases_q else second_q * OWN_O_BUFFER
    # K cannot be loaded while Q still stands in its place
    return 1.25 if schedule.q_in_registers else 1.0


def _makespan(lengths: np.ndarray, heads: int, slots: int) -> float:
    """Cycles until the last of the blocks is done; `lengths` has one head's, longest first.

    Handed out longest first, the slots end together but for the last wave, whose blocks are the shortest:
    that wave is lost in proportion to how empty it is. Exact where all blocks are equal.
    """
    if lengths.size == 0:
        return 0.0
    blocks = lengths.size * heads
    waves = blocks / slots
    shortest = lengths[-max(1, ceil(min(slots, blocks) / heads)) :].mean()
    return float(max(lengths[0], lengths.sum() * heads / slots + (ceil(waves) - waves) * shortest))
