"""Cycles of one kv tile on the pipes of an SM, and of what surrounds a q tile; per kernel family.

Four pipes: tensor cores, MUFU (one exp2 for each score, and what the score function takes), fp32 (the rest of
the softmax and of the score function, masking, rescaling O) and shared memory. How they overlap is the
family's. The constants of sm80 are fitted to FlashAttention 2's tiles, those of sm90 to measurements in
benchmarks/data, which docs/solver.md compares with the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashgen.arch import Arch
from flashgen.plan.model import Sm80Schedule, Sm90Schedule
from flashgen.plan.operations import Operations, of_condition, of_score
from flashgen.plan.tiling import Tiling, padded
from flashgen.plan.workload import Workload

BYTES = 2  # per element of q, k, v, o
SMEM_BYTES_PER_CLOCK = 128  # per SM: 32 banks of 4 bytes
FP32_PER_CLOCK = 128  # per SM, and shared with the integer work of masking


@dataclass(frozen=True)
class Pipes:
    """Cycles of one block's kv tile on each pipe alone."""

    tensor: float
    exp2: float
    fp32: float
    smem: float


@dataclass(frozen=True)
class BlockTime:
    """Cycles of a kv tile, pipes overlapped, of one block among its neighbours on the SM; of what a q tile
    takes beside its kv tiles; and the pipes by themselves.
    """

    tile: float
    prologue: float
    pipes: Pipes
    alone: float = 0.0  # a kv tile that only one of the block's warpgroups computes; no less than this


def block_time(tiling: Tiling, work: Workload, arch: Arch, masked: float, blocks_per_sm: int) -> BlockTime:
    """`masked` is the share of kv tiles that are masked."""
    each = _of_element(tiling, work, masked)
    if isinstance(tiling.schedule, Sm90Schedule):
        return _sm90(tiling, tiling.schedule, work, arch, each)
    return _sm80(tiling, tiling.schedule, work, arch, each, blocks_per_sm)


def _of_element(tiling: Tiling, work: Workload, masked: float) -> Operations:
    """Instructions for one element of S: softmax, score function, and its share of the masking."""
    softmax: float
    softmax, mask = {
        "sm80": (SM80_FP32_PER_SCORE, SM80_FP32_PER_MASKED_SCORE),
        "sm90": (SM90_FP32_PER_SCORE, SM90_FP32_PER_MASKED_SCORE),
    }[tiling.family]
    if _first(tiling):
        softmax = SM90_FP32_PER_SCORE_FIRST
    masking = of_condition(work.mask.condition).plain if work.mask.listed else mask
    return Operations(plain=softmax + masked * masking, mufu=1) + of_score(work.score.expr)


def _first(tiling: Tiling) -> bool:
    return isinstance(tiling.schedule, Sm90Schedule) and tiling.schedule.reference == "first"


# -- sm80 --------------------------------------------------------------------------------------------------

# fp32 instructions for each element of S: maximum, scale-and-subtract, sum, half a conversion of a pair, and
# moves that the compiler adds.
SM80_FP32_PER_SCORE = 5
SM80_FP32_PER_MASKED_SCORE = 3  # a compare on each side and a select
SM80_FP32_PER_RESCALE = 1  # O *= exp(m_old - m_new), each element, each kv tile
# Warps overlap only with each other. A warp of another block counts as a whole one, a second warp of the same
# block on a scheduler as half, since barriers keep it near the same phase.
SCHEDULERS = 4
SAME_BLOCK_OVERLAP = 0.5
# Of every block and kv tile: issuing addresses, loop and copies; and latency that other warps can hide, of
# barriers and of the first mma after one.
SM80_ITERATION_CYCLES = 100.0
SM80_LATENCY_CYCLES = 400.0
SM80_PROLOGUE_CYCLES = 2500.0  # a block's first loads, and storing O
LOAD_LATENCY_CYCLES = 800.0  # from L2, with a tile's worth of requests in flight


def _sm80(
    tiling: Tiling, schedule: Sm80Schedule, w: Workload, arch: Arch, each: Operations, blocks_per_sm: int
) -> BlockTime:
    scores = tiling.tile_q * tiling.tile_kv
    d_qk, d_v = padded(w.head_dim_qk, 16), padded(w.head_dim_v, 16)
    flops_per_clock = arch.tensor_flops[w.dtype] * arch.mma_sync_fraction / (arch.sms * arch.clock_hz)
    kv_bytes = BYTES * tiling.tile_kv * (d_qk + d_v)
    q_bytes = 0 if schedule.q_in_registers else BYTES * tiling.tile_q * d_qk
    pipes = Pipes(
        tensor=2 * scores * (d_qk + d_v) / flops_per_clock,
        exp2=scores * each.mufu / arch.exp2_per_clock_per_sm,
        fp32=(scores * each.plain + tiling.tile_q * w.head_dim_v * SM80_FP32_PER_RESCALE) / FP32_PER_CLOCK,
        # every warp reads all of K and V; both also arrive once
        smem=(tiling.warps * kv_bytes + q_bytes + kv_bytes) / SMEM_BYTES_PER_CLOCK,
    )
    warps_each = max(1.0, tiling.warps * blocks_per_sm / SCHEDULERS)
    blocks_each = min(warps_each, float(blocks_per_sm))
    serial = 1.0 / (blocks_each + SAME_BLOCK_OVERLAP * (warps_each - blocks_each))
    busiest = max(pipes.tensor, pipes.exp2, pipes.fp32, pipes.smem)
    taking_turns = pipes.tensor + pipes.exp2 + pipes.fp32 + pipes.smem
    busy = busiest + serial * (taking_turns - busiest) + SM80_ITERATION_CYCLES
    busy *= blocks_per_sm
    ahead = tiling.stages - 0.5  # K comes a whole tile ahead with two stages, V half a tile behind it
    stall = max(0.0, LOAD_LATENCY_CYCLES - ahead * busy)
    # K cannot be loaded while Q still stands in its place
    prologue = SM80_PROLOGUE_CYCLES * (1.25 if schedule.q_in_registers else 1.0)
    return BlockTime(busy + serial * (SM80_LATENCY_CYCLES + stall), prologue, pipes)


# -- sm90 --------------------------------------------------------------------------------------------------

WGMMA_FLOPS_PER_CLOCK = 4096  # per SM, dense, 16-bit operands: 989 TFLOP/s at 1.83 GHz (H100 whitepaper)
SM90_FP32_PER_SCORE = 4
SM90_FP32_PER_MASKED_SCORE = 1
# Relative to the first key tile's maximum, which is taken once.
SM90_FP32_PER_SCORE_FIRST = 2.5
SM90_FP32_PER_RESCALE = 4.5
SM90_FP32_PER_RESCALE_FIRST = 3.0  # there is none: fitted, since the power limit takes back what it saves
# A warpgroup's softmax on its own: four warps do not fill the pipes, and barriers and WGMMA have latencies.
SOFTMAX_ALONE = 1.4
TILE_LATENCY_CYCLES = 200.0
PRODUCTS_START_CYCLES = 100.0  # of the tensor cores, for each key tile of a warpgroup: narrow tiles lose most
OVERLAP_NORM = 4.0  # of the times that bound a kv tile: the largest counts, those near it add a little
# Of the lesser of products and softmax: when a warpgroup does not overlap its own, and when the warpgroups do
# not take turns. Those that await O within the softmax do as well without (measured at d64, d128 and d256).
NO_OVERLAP_SHARE = 0.16
NO_TURNS_SHARE = 0.06
SM90_PROLOGUE_CYCLES = 1950.0  # a q tile's first K and S, and its O on the way out
ONE_Q_BUFFER_CYCLES = 1100.0  # waiting for Q, which two buffers load during the tile before
O_IN_Q_CYCLES = 2300.0  # on top: Q is loaded only when O has left its buffer
DRAW_CYCLES = 480.0  # of an atomic, where tiles are drawn
THIRD_STAGE_CYCLES = 400.0  # less: the next tile's first K is there when this one ends
O_IN_V_CYCLES = 200.0  # V's buffers are passed from warpgroup to warpgroup
# Less: the next tile's first V need not wait until O, staged in V, has been read. Of 26 pairs measured 21
# gain and three lose; by how much is open: 100 to 600 fit alike.
EXTRA_V_CYCLES = 200.0
# Unmeasured: with two buffers O leaves one while the other is read.
O_IN_SECOND_Q_CYCLES = 500.0


def _sm90(tiling: Tiling, schedule: Sm90Schedule, w: Workload, arch: Arch, each: Operations) -> BlockTime:
    warpgroups = tiling.warps // 4
    rows, keys = tiling.tile_q / warpgroups, tiling.tile_kv
    d_qk, d_v = padded(w.head_dim_qk, 16), padded(w.head_dim_v, 16)
    # Of one warpgroup. WGMMA reads its operands from shared memory, Q for every kv tile, and waits for them
    # where the tile is narrow.
    p_bytes = 0 if schedule.p_in_registers else BYTES * rows * keys
    qk_smem = BYTES * (rows + keys) * d_qk / SMEM_BYTES_PER_CLOCK
    pv_smem = (BYTES * keys * d_v + p_bytes) / SMEM_BYTES_PER_CLOCK
    qk = max(2 * rows * keys * d_qk / WGMMA_FLOPS_PER_CLOCK, qk_smem)
    pv = max(2 * rows * keys * d_v / WGMMA_FLOPS_PER_CLOCK, pv_smem)
    exp2 = rows * keys * each.mufu / arch.exp2_per_clock_per_sm
    rescale = SM90_FP32_PER_RESCALE_FIRST if _first(tiling) else SM90_FP32_PER_RESCALE
    fp32 = (rows * keys * each.plain + rows * w.head_dim_v * rescale) / FP32_PER_CLOCK
    arriving = (BYTES * keys * (d_qk + d_v) + warpgroups * p_bytes) / SMEM_BYTES_PER_CLOCK

    chain = qk + pv + SOFTMAX_ALONE * (exp2 + fp32) + TILE_LATENCY_CYCLES

    def together(active: int) -> float:
        """A kv tile that `active` warpgroups compute."""
        smem = active * (qk_smem + pv_smem) + arriving
        bounds = (active * (qk + pv + PRODUCTS_START_CYCLES), active * (exp2 + fp32), smem, chain)
        return float(sum(bound**OVERLAP_NORM for bound in bounds) ** (1 / OVERLAP_NORM))

    products, softmax = warpgroups * (qk + pv), warpgroups * (exp2 + fp32)
    smem = warpgroups * (qk_smem + pv_smem) + arriving
    tile = together(warpgroups)
    if not schedule.overlap:
        tile += NO_OVERLAP_SHARE * min(products, softmax)
    if not schedule.ping_pong and schedule.output_wait != "middle" and warpgroups > 1:
        tile += NO_TURNS_SHARE * min(products, softmax)

    prologue = SM90_PROLOGUE_CYCLES + (DRAW_CYCLES if schedule.tile_order == "dynamic" else 0.0)
    prologue -= THIRD_STAGE_CYCLES if tiling.stages > 2 else 0.0
    if schedule.q_stages == 1:
        prologue += ONE_Q_BUFFER_CYCLES + (O_IN_Q_CYCLES if schedule.o_buffer == "q" else 0.0)
    elif schedule.o_buffer == "q":
        prologue += O_IN_SECOND_Q_CYCLES
    if schedule.o_buffer == "v":
        prologue += O_IN_V_CYCLES - (EXTRA_V_CYCLES if schedule.extra_v_stages else 0.0)
    return BlockTime(tile, prologue, Pipes(products, warpgroups * exp2, warpgroups * fp32, smem), together(1))
