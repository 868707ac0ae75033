"""What a tiling costs: seconds for a workload, from throughputs and tile counts.

A ranking, not a simulation. `pipes.py` gives an SM's time for one kv tile of its resident blocks, from the
pipes that it keeps busy. Blocks are then laid over the SMs in waves, and the whole can be no faster than L2
or HBM deliver.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil, gcd

import numpy as np
import numpy.typing as npt

from flashgen.arch import Arch
from flashgen.plan.constraints import smem_and_registers
from flashgen.plan.io import BYTES, IoModel
from flashgen.plan.model import Sm90Schedule
from flashgen.plan.order import divide, heads_per_section
from flashgen.plan.pipes import block_time
from flashgen.plan.tiling import Head, Tiling, padded
from flashgen.plan.workload import Workload

# H200, sections of 32 MiB against all heads at once: of the K and V of a section, this share is in use at one
# time (its longest tiles go first). So sections that L2 holds are predicted alike; what they save is power.
SECTION_IN_USE = 0.35
MEMORY_NORM = 2.8  # of computing and moving: the longer counts, the shorter adds a little
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
    # Registers go to warps in units of 256, that is 8 a thread; a warp finds them in one of the SM's four
    # partitions.
    warps = 4 * (arch.registers_per_sm // 4 // (padded(registers, 8) * 32))
    return min(
        arch.smem_per_sm // (smem_bytes + arch.smem_reserved_per_block),
        warps * 32 // threads,
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
    packed, shared = _packed_heads(tiling, w), 1
    if isinstance(tiling.schedule, Sm90Schedule):
        shared = tiling.schedule.cluster
    positions = tiling.tile_q // packed
    counts = w.tiles(positions, tiling.tile_kv)
    smem, _ = smem_and_registers(tiling, w.head, arch)
    heads = w.batch * w.heads_q // packed
    blocks = counts.q_tiles * heads
    per_sm = max(1, min(occupancy(tiling, w.head, arch), ceil(blocks / arch.sms)))

    # With a mask, a warpgroup of sm90 computes only the kv tiles that its own 64 rows need; where tiles come
    # from a list, all of the block's.
    alone = not (w.mask.keeps_all or w.mask.listed)
    parts = tiling.warps // 4 if tiling.family == "sm90" and alone else 1
    rows = w.tiles(positions // parts, tiling.tile_kv)
    masked = rows.masked / max(rows.visited, 1)
    time = block_time(tiling, w, arch, masked, per_sm)
    slots = arch.sms * per_sm
    per_part = _by_block(rows.per_q_tile, parts)
    busy = np.maximum(per_part.mean(axis=1) * time.tile, per_part.max(axis=1, initial=0) * time.alone)
    order = tiling.schedule.tile_order if isinstance(tiling.schedule, Sm90Schedule) else "dynamic"
    if order == "stream_k":
        span = _shared_span(blocks, max(rows.per_q_tile, default=0), slots, time.tile, time.prologue)
    elif order == "static":
        span = _span_in_index_order(busy + time.prologue, heads, slots)
    else:
        span = _makespan(np.sort(busy)[::-1] + time.prologue, heads, slots)
    span /= arch.clock_hz

    io = IoModel.of(w, positions * shared, tiling.tile_kv, smem, packed_heads=packed)
    hbm_bytes = io.missed(_working_set(tiling, w, counts.q_tiles, slots), arch.l2_bytes)
    l2_s, hbm_s = io.rereads_miss / arch.l2_bytes_per_s, hbm_bytes / arch.hbm_bytes_per_s

    seconds = max((span**MEMORY_NORM + hbm_s**MEMORY_NORM) ** (1 / MEMORY_NORM), l2_s) + LAUNCH_SECONDS
    pipes = time.pipes
    pipe_s = counts.visited * heads / (arch.sms * arch.clock_hz)
    return Cost(
        seconds=seconds,
        tensor_s=pipes.tensor * pipe_s,
        exp2_s=pipes.exp2 * pipe_s,
        softmax_s=(pipes.exp2 + pipes.fp32) * pipe_s,
        smem_s=pipes.smem * pipe_s,
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


def _packed_heads(tiling: Tiling, w: Workload) -> int:
    """Query heads that one tile holds."""
    schedule = tiling.schedule
    return w.head.group if isinstance(schedule, Sm90Schedule) and schedule.pack_gqa else 1


def _by_block(per_part: tuple[int, ...], parts: int) -> npt.NDArray[np.float64]:
    """[blocks, parts] kv tiles; parts that the last block lacks have none."""
    blocks = -(-len(per_part) // parts)
    whole = np.zeros((blocks, parts))
    whole.reshape(-1)[: len(per_part)] = per_part
    return whole


def _working_set(tiling: Tiling, w: Workload, q_tiles: int, slots: int) -> float:
    """Bytes of K and V that are in use at one time."""
    head_bytes = w.seqlen_kv * (w.head_dim_qk + w.head_dim_v) * BYTES
    packed = _packed_heads(tiling, w)
    group = w.head.group // packed
    if isinstance(tiling.schedule, Sm90Schedule) and tiling.schedule.tile_order == "dynamic":
        section = heads_per_section(
            w.batch * w.heads_q // packed, head_bytes, group, tiling.schedule.section_mib
        )
        return SECTION_IN_USE * section / group * head_bytes
    heads_in_flight = min(w.batch * w.heads_kv, ceil(slots / max(q_tiles * group, 1)))
    return heads_in_flight * head_bytes


def _shared_span(tiles: int, key_tiles: int, slots: int, key_tile: float, prologue: float) -> float:
    """Cycles where the tiles that do not fill a wave are cut into shares; all tiles are equal."""
    division = divide(tiles, key_tiles, slots)
    last = division.longest_share * key_tile + prologue if division.shares else 0.0
    return ceil(division.whole / slots) * (key_tiles * key_tile + prologue) + last


def _span_in_index_order(lengths: npt.NDArray[np.float64], heads: int, slots: int) -> float:
    """Cycles until the last of the blocks is done, each of which takes every `slots`-th tile.

    The heads repeat one head's `lengths`: as many as bring the slots back to its first tile stand for all.
    """
    if lengths.size == 0:
        return 0.0
    period = slots // gcd(slots, lengths.size)
    whole, rest = divmod(heads, period)

    def loads(count: int) -> npt.NDArray[np.float64]:
        tiles = np.zeros((-(-count * lengths.size // slots), slots))
        tiles.reshape(-1)[: count * lengths.size] = np.tile(lengths, count)
        return np.asarray(tiles.sum(axis=0))

    return float((whole * loads(period) + loads(rest)).max())


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
