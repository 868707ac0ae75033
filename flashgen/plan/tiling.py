"""A point of the solver's lattice, and the symbols that the constraints speak of it in.

`Tiling.values` gives every symbol its number: sizes of the tiling, of the head, of the chip, and the
registers that the compiler adds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import sympy

from flashgen.arch import Arch
from flashgen.plan.model import Sm80Schedule, Sm90Schedule

Expr = Any  # sympy ships no types


def _symbols(names: str) -> Any:
    return sympy.symbols(names, integer=True, nonnegative=True)


# The unknowns.
TILE_Q, TILE_KV, STAGES, WARPS = UNKNOWNS = _symbols("tile_q tile_kv stages warps")
# Schedule choices; 0 or 1 where they are yes or no. Choices of more than two
# are one symbol for each value that a constraint speaks of.
_SCHEDULE_SYMBOLS = _symbols(
    "q_in_registers p_in_registers overlap ping_pong o_in_q o_in_v pack_gqa dynamic stream_k apart first "
    "early_distances q_register_steps q_stages extra_v_stages cluster producer_registers consumer_registers"
)
(
    Q_IN_REGISTERS,
    P_IN_REGISTERS,
    OVERLAP,
    PING_PONG,
    O_IN_Q,
    O_IN_V,
    PACK_GQA,
    DYNAMIC,
    STREAM_K,
    APART,
    FIRST,
    EARLY_DISTANCES,
    Q_REGISTER_STEPS,
    Q_STAGES,
    EXTRA_V_STAGES,
    CLUSTER,
    PRODUCER_REGISTERS,
    CONSUMER_REGISTERS,
) = _SCHEDULE_SYMBOLS
# The head: PITCH is the sm80 row of shared memory, PANEL the sm90 one, D16 the padded width; in elements.
_HEAD_SYMBOLS = _symbols("head_dim_qk head_dim_v group pitch_qk pitch_v panel_qk panel_v d16_qk d16_v")
HEAD_DIM_QK, HEAD_DIM_V, GROUP, PITCH_QK, PITCH_V, PANEL_QK, PANEL_V, D16_QK, D16_V = _HEAD_SYMBOLS
# Mask and score, see `Head`; 0 or 1 but for the registers.
_MASK_SYMBOLS = _symbols("unmasked closed_form heads_alike elementwise distances element_registers")
UNMASKED, CLOSED_FORM, HEADS_ALIKE, ELEMENTWISE, DISTANCES, ELEMENT_REGISTERS = _MASK_SYMBOLS
# The chip.
_CHIP_SYMBOLS = _symbols("smem_per_block registers_per_sm max_registers")
SMEM_PER_BLOCK, REGISTERS_PER_SM, MAX_REGISTERS = _CHIP_SYMBOLS
# The compiler: registers beyond accumulators, and of the sm90 producer.
_OVERHEAD_SYMBOLS = _symbols("register_overhead fragment_overhead producer_need")
REGISTER_OVERHEAD, FRAGMENT_OVERHEAD, PRODUCER_NEED = _OVERHEAD_SYMBOLS

SYMBOLS: tuple[Expr, ...] = (
    *UNKNOWNS,
    *_SCHEDULE_SYMBOLS,
    *_HEAD_SYMBOLS,
    *_MASK_SYMBOLS,
    *_CHIP_SYMBOLS,
    *_OVERHEAD_SYMBOLS,
)

# Registers of an sm90 consumer beyond its accumulators (addresses, loop state). Of 530 plans at the edge,
# head_dim 40 to 256, one to four warpgroups, every mask and buffering, all compile with 28 to spare and none
# does with 24 (NVRTC 13.0). With `sm80_overhead`, `producer_need` and what scores and lists take
# (`operations.py`) this is what comes from the compiler.
SM90_OVERHEAD = 28
# And where a listed mask's elements are tested one by one, beside `element_registers`: from head_dim 192 on
# 18 of 72 such kernels spilled without, one with 20, and none at 64 and 128. Or for each tensor that they are
# tested by: they spilled 32 to 140 bytes with 28 to 44 to spare, and none with 60.
SM90_TESTED = 20
SM90_TESTED_READ = 24
# And where a score reads tensors, or has terms of the distance, beside what `operations.py` counts: biases
# spilled 16 to 140 bytes at head_dim 192 and 256 with 3 to spare, remainders 96 to 156; with 19 none did.
SM90_SCORE_WIDE = 8
# And with two loops for such scores (`reference: first`): two functions of distances spilled 72 to 152 bytes
# at head_dim 256 with none to spare.
SM90_SCORE_FIRST = 8
# And where steps of Q are held in registers under a mask with a first key: of 874 plans at the edge three of
# those spilled 8 to 16 bytes with none or four to spare, and no other did. With a score three more did.
SM90_HELD_FIRST_KEY = 8
SM90_HELD_SCORE = 16
# And with two loops for a softcap, each with two ways to take a tanh. At head_dim 128, 128x128 did not spill
# with 4 to spare, 192x48 did with 12 and 192x16 with 44. At 256, 128x64 did not with 4 under a causal mask,
# did in a window, as did 64x80, and spilled 48 bytes with 12 to spare where tiles are shared.
SM90_CAPPED_FIRST = 4
SM90_CAPPED_SMALL = 48  # with the registers of three warpgroups, beside O of more than 64 columns
SM90_CAPPED_MORE = 4  # from head_dim 192 on, in a window or with one warpgroup
SM90_CAPPED_SHARED = 16  # from head_dim 192 on
# And for a softcap with the running maximum. Under a mask it spilled 8 to 80 bytes at head_dim 224 and 256
# with up to 8 to spare, not at 192, and of 149 proposals none with 16. With O awaited late it spilled 8 to
# 128 bytes from head_dim 192 on with up to 24 to spare.
SM90_CAPPED_MASKED = 12
SM90_CAPPED_LATE_WAIT = 28
# And for other scores with two loops and the registers of four warpgroups: T5 spilled with 11 to spare.
SM90_SCORE_SMALL = 12


def pitch(head_dim: int) -> int:
    """Elements from one row of an sm80 tile to the next: free of bank conflicts under ldmatrix."""
    d16 = padded(head_dim, 16)
    return d16 if d16 % 64 == 0 else d16 + 8


def padded(size: int, to: int) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


@dataclass(frozen=True)
class Head:
    """What the constraints must know of an attention."""

    dim_qk: int
    dim_v: int
    group: int = 1  # query heads per K/V head
    unmasked: bool = False  # whether every row keeps every key
    has_first: bool = False  # whether the mask bounds a row's keys from below
    closed_form: bool = True  # whether each row keeps one interval, with ends that need no preparation
    listed: bool = False  # whether tiles come from a list
    plain_ends: bool = True  # whether the ends are arithmetic of q and the lengths, without choices and reads
    heads_alike: bool = True  # whether mask and score are the same for all query heads of a group
    elementwise: bool = False  # whether scores are computed on, or tested, one by one
    distances: int = 0  # terms of the score that depend on q - kv alone, and cost something
    distances_are_reads: bool = True  # whether each of them is an element of a tensor, without arithmetic
    capped: bool = False  # whether all that is computed on scores is one tanh, which the softmax takes
    element_registers: int = 0  # that score and listed mask take of a thread
    tested: bool = False  # whether a listed mask's elements are tested one by one
    score_reads: int = 0  # tensors that the score reads at every element
    tested_reads: int = 0  # tensors that a listed mask reads at every element
    row_registers: int = 0  # and what they know of a row and a head, where sm80 holds it through the loop
    query_values: int = 0  # and numbers that each of a thread's rows keeps through the loop


def sm80_overhead(arch: Arch, head_dim_qk: int, schedule: Sm80Schedule) -> tuple[int, int]:
    """Registers of an sm80 thread beyond its accumulators: a base, and more for each m16 fragment of rows.

    Fitted to the least register limit without spills, bisected with NVRTC 13.0 over some 90 tilings, head_dim
    64 to 256, and corrected where one of 350 proposals for ten head dims spilled. It is there to be right
    about how many blocks an SM holds without spills, not to the register.
    """
    major, _ = arch.capability
    if major >= 10:  # the compiler keeps more loads in flight here, whatever the head
        base, per_fragment = (64, 16) if major == 10 else (56, 8)
        return base + per_fragment * schedule.q_in_registers, per_fragment
    width = padded(head_dim_qk, 16)
    k_steps = max(width // 8, (width - 48) // 5)  # addresses and operands of Q and K along the head
    # Rows whose pitch is no power of two: more addresses, at their worst (head_dim 80) beside Q's fragments.
    unswizzled = (32 if schedule.q_in_registers else 8) * (width % 64 != 0)
    narrow = width == 64  # most of a thread is S, of which the compiler keeps more in flight
    if schedule.q_in_registers:
        return 30 + unswizzled, k_steps // 2 + 13 * narrow
    return 30 + unswizzled + 11 * narrow, k_steps


def sm90_overhead(head: Head, schedule: Sm90Schedule) -> int:
    """Registers of an sm90 consumer beyond its accumulators and `Head.element_registers`."""
    wide = max(head.dim_qk, head.dim_v) >= 192
    overhead = SM90_OVERHEAD + 2 * head.query_values
    overhead += max(SM90_TESTED if head.tested and wide else 0, SM90_TESTED_READ * head.tested_reads)
    if wide and head.score_reads + head.distances > 0:
        overhead += SM90_SCORE_WIDE
    if schedule.reference == "first" and head.capped:
        overhead += SM90_CAPPED_FIRST
        overhead += SM90_CAPPED_SMALL if head.dim_v > 64 and schedule.consumer_registers <= 160 else 0
        overhead += SM90_CAPPED_MORE if wide and (head.has_first or schedule.consumer_registers > 240) else 0
        overhead += SM90_CAPPED_SHARED if wide and schedule.tile_order == "stream_k" else 0
    elif head.capped and wide and schedule.output_wait == "late":
        overhead += SM90_CAPPED_LATE_WAIT
    elif head.capped:
        overhead += SM90_CAPPED_MASKED if head.dim_v > 192 and not head.unmasked else 0
    elif schedule.reference == "first" and head.elementwise:
        overhead += SM90_SCORE_FIRST if wide else 0
        overhead += SM90_SCORE_SMALL if schedule.consumer_registers <= 112 else 0
    if schedule.q_register_steps and head.has_first:
        overhead += SM90_HELD_FIRST_KEY + SM90_HELD_SCORE * head.elementwise
    return overhead


def producer_need(head: Head, schedule: Sm90Schedule) -> int:
    """Registers without which the sm90 producer spills: what it holds grows with what it has to decide.

    From 352 schedules at 24, 32 and 40 registers, masks without, with one and with two bounds. With tiles
    from a list or with prepared ends, 16 to 220 bytes spilled at 24, and with a list at head_dim 256 some at
    40 too; with ends that choose or read, 16 bytes at 24, as with tiles to repeat in dynamic order, and with
    a first key in that order 16 to 24; in a cluster with two Q buffers and a first key 8 bytes at 40 (NVRTC
    13.0).
    """
    if head.listed and max(head.dim_qk, head.dim_v) > 128:
        return 56
    if schedule.cluster > 1 and schedule.q_stages > 1 and head.has_first:
        return 48
    if schedule.cluster > 1 or not head.closed_form:
        return 40
    if schedule.reference == "first" and schedule.tile_order == "dynamic":
        return 40 if schedule.q_stages > 1 and head.has_first else 32
    one_buffer = schedule.q_stages == 1 and schedule.o_buffer == "q"
    if schedule.tile_order != "dynamic" or (one_buffer and not head.has_first):
        return 24 if head.plain_ends else 32
    return 40 if schedule.q_stages > 1 and head.has_first else 32


@dataclass(frozen=True)
class Tiling:
    """A point of the lattice: everything about a kernel that the solver chooses."""

    family: Literal["sm80", "sm90"]
    tile_q: int
    tile_kv: int
    stages: int
    warps: int
    schedule: Sm80Schedule | Sm90Schedule

    def values(self, head: Head, arch: Arch) -> dict[Expr, int]:
        """Numbers for every symbol; choices that the family does not have are 0."""
        if isinstance(self.schedule, Sm80Schedule):
            base, per_fragment = sm80_overhead(arch, head.dim_qk, self.schedule)
            base += head.row_registers + 2 * head.query_values * (self.tile_q // (16 * self.warps))
            producer = 0
        else:
            base, per_fragment = sm90_overhead(head, self.schedule), 0
            producer = producer_need(head, self.schedule)
        choices = {f.name: getattr(self.schedule, f.name) for f in fields(self.schedule)}
        choices |= {order: choices.get("tile_order") == order for order in ("dynamic", "stream_k")}
        choices |= {f"o_in_{buffer}": choices.get("o_buffer") == buffer for buffer in "qv"}
        choices["apart"] = choices.get("edge_tiles") == "apart"
        choices["first"] = choices.get("reference") == "first"
        choices["early_distances"] = choices.get("distance_terms") == "early"
        values = {symbol: int(choices.get(symbol.name, 0)) for symbol in _SCHEDULE_SYMBOLS}
        return values | {
            TILE_Q: self.tile_q,
            TILE_KV: self.tile_kv,
            STAGES: self.stages,
            WARPS: self.warps,
            HEAD_DIM_QK: head.dim_qk,
            HEAD_DIM_V: head.dim_v,
            GROUP: head.group,
            UNMASKED: int(head.unmasked),
            CLOSED_FORM: int(head.closed_form),
            HEADS_ALIKE: int(head.heads_alike),
            ELEMENTWISE: int(head.elementwise),
            DISTANCES: head.distances,
            ELEMENT_REGISTERS: head.element_registers,
            PITCH_QK: pitch(head.dim_qk),
            PITCH_V: pitch(head.dim_v),
            PANEL_QK: padded(head.dim_qk, 64),
            PANEL_V: padded(head.dim_v, 64),
            D16_QK: padded(head.dim_qk, 16),
            D16_V: padded(head.dim_v, 16),
            SMEM_PER_BLOCK: arch.smem_per_block,
            REGISTERS_PER_SM: arch.registers_per_sm,
            MAX_REGISTERS: arch.max_registers_per_thread,
            REGISTER_OVERHEAD: base,
            FRAGMENT_OVERHEAD: per_fragment,
            PRODUCER_NEED: producer,
        }
