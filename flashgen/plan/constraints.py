"""What must fit on the chip: relations between the sizes of a tiling, as sympy expressions.

`FAMILIES[name].constraints` lists them. One definition serves three ends: `violations` is the one legality
predicate, for solved, tuned and user-given tilings alike; `bound` solves a limit for one unknown
(``tile_kv <= ...``), so that the solver enumerates only what is legal; `usage` gives the numbers to print.

Shared memory is laid out in docs/architecture.md, "Shared memory". Registers are per computing thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import sympy

from flashgen.arch import Arch
from flashgen.plan.model import Sm80Schedule, Sm90Schedule
from flashgen.plan.tiling import (
    APART,
    CLOSED_FORM,
    CLUSTER,
    CONSUMER_REGISTERS,
    D16_QK,
    D16_V,
    DISTANCES,
    DYNAMIC,
    EARLY_DISTANCES,
    ELEMENT_REGISTERS,
    ELEMENTWISE,
    EXTRA_V_STAGES,
    FIRST,
    FRAGMENT_OVERHEAD,
    GROUP,
    HEAD_DIM_V,
    HEADS_ALIKE,
    MAX_REGISTERS,
    O_IN_Q,
    O_IN_V,
    OVERLAP,
    P_IN_REGISTERS,
    PACK_GQA,
    PANEL_QK,
    PANEL_V,
    PING_PONG,
    PITCH_QK,
    PITCH_V,
    PRODUCER_NEED,
    PRODUCER_REGISTERS,
    Q_IN_REGISTERS,
    Q_REGISTER_STEPS,
    Q_STAGES,
    REGISTER_OVERHEAD,
    REGISTERS_PER_SM,
    SMEM_PER_BLOCK,
    STAGES,
    STREAM_K,
    SYMBOLS,
    TILE_KV,
    TILE_Q,
    UNMASKED,
    WARPS,
    Expr,
    Head,
    Tiling,
)

BYTES = 2  # per element of q, k, v, o: bf16 and fp16
MMA_DEPTH = 16  # keys that one mma of P V takes in, on either family
BARRIER_BYTES = 1024
ALIGNMENT_BYTES = 1024  # what aligning the base of dynamic shared memory to 1024 B can cost
PANEL_COLUMNS = 64  # of the 128-byte swizzle, and rows of a warpgroup

# setmaxnreg of the producer and of each consumer, by consumer warpgroups; the first whose producer has what
# it needs is taken.
REGISTER_SPLITS: Mapping[int, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        1: ((56, 248),),
        2: ((24, 240), (40, 232), (56, 224)),
        3: ((32, 160), (40, 152), (48, 152)),
        4: ((32, 112), (40, 104), (48, 104)),
    }
)


@dataclass(frozen=True)
class Limit:
    """``used <= allowed``."""

    name: str
    used: Expr
    allowed: Expr
    needs: str  # "B of shared memory": completes "needs 245,760 ..."
    by: Literal["chip", "kernel", "tiling"] = "tiling"  # who sets the limit: the message names it

    @property
    def relation(self) -> Expr:
        return sympy.Le(self.used, self.allowed, evaluate=False)


@dataclass(frozen=True)
class Multiple:
    """``used`` is a positive multiple of ``allowed``."""

    name: str
    used: Expr
    allowed: Expr
    needs: str  # why: "16 rows for each warp"

    @property
    def relation(self) -> Expr:
        return sympy.Eq(sympy.Mod(self.used, self.allowed, evaluate=False), 0, evaluate=False)


@dataclass(frozen=True)
class Requirement:
    """A choice of the schedule that only some masks and scores leave open: ``used <= allowed``, 0 or 1."""

    name: str
    used: Expr
    allowed: Expr
    needs: str  # what the choice needs

    @property
    def relation(self) -> Expr:
        return sympy.Le(self.used, self.allowed, evaluate=False)


Constraint = Limit | Multiple | Requirement


@dataclass(frozen=True)
class Family:
    """A kernel family: what it asks of the chip and of a tiling."""

    name: Literal["sm80", "sm90"]
    features: frozenset[str]
    schedule: type[Sm80Schedule] | type[Sm90Schedule]
    smem: Expr  # bytes of a block
    registers: Expr  # per computing thread
    constraints: tuple[Constraint, ...]


def _sm80() -> Family:
    q = BYTES * TILE_Q * PITCH_QK
    kv = BYTES * STAGES * TILE_KV * (PITCH_QK + PITCH_V)
    o = BYTES * TILE_Q * PITCH_V
    separate = (1 - Q_IN_REGISTERS) * kv  # Q in registers: K and V take over Q's place
    smem = sympy.Max(q + separate, o + separate, kv)

    threads = 32 * WARPS
    fragments = TILE_Q / (16 * WARPS)
    # S and P do not add up: P replaces S pair by pair, 32 bits of it for every 64 of S.
    registers = (
        TILE_Q * TILE_KV / threads  # S, fp32
        + TILE_Q * D16_V / threads  # O, fp32
        + Q_IN_REGISTERS * TILE_Q * D16_QK / (2 * threads)  # Q, 16 bits
        + REGISTER_OVERHEAD
        + fragments * FRAGMENT_OVERHEAD
        + ELEMENT_REGISTERS
    )
    # The register file is handed out in multiples of 8 a thread.
    own_registers = sympy.Min(MAX_REGISTERS, 8 * sympy.floor(REGISTERS_PER_SM / (8 * threads)))
    return Family(
        "sm80",
        frozenset({"cp_async"}),
        Sm80Schedule,
        smem,
        registers,
        (
            Limit("shared memory", smem, SMEM_PER_BLOCK, "B of shared memory", by="chip"),
            Limit("registers", registers, own_registers, "registers per thread", by="chip"),
            Limit("threads", threads, sympy.Integer(1024), "threads", by="chip"),
            Multiple("rows per warp", TILE_Q, 16 * WARPS, "16 rows of mma.sync m16n8k16 for each warp"),
            Multiple("mma depth", TILE_KV, sympy.Integer(MMA_DEPTH), "the depth of mma.sync m16n8k16 in P V"),
            Multiple("stages", STAGES, sympy.Integer(1), "K/V buffers"),
            Multiple("warps", WARPS, sympy.Integer(1), "warps that compute"),
        ),
    )


_ONE_INTERVAL = "a mask with one interval of keys for each row, in closed form"


def _sm90() -> Family:
    q = BYTES * Q_STAGES * TILE_Q * PANEL_QK
    v_stages = STAGES + EXTRA_V_STAGES
    p = BYTES * TILE_Q * PANEL_COLUMNS * sympy.ceiling(TILE_KV / PANEL_COLUMNS)
    smem = (
        q
        + BYTES * TILE_KV * (STAGES * PANEL_QK + v_stages * PANEL_V)
        + (1 - P_IN_REGISTERS) * p
        + (1 - O_IN_Q - O_IN_V) * BYTES * TILE_Q * PANEL_V
        + BARRIER_BYTES
        + ALIGNMENT_BYTES
    )
    # A warpgroup of 128 threads holds 64 rows: tile_kv / 2 fp32 of S, half as many 32-bit registers of P.
    # Without overlap P replaces S; with it, the next S is being made while P is consumed.
    registers = (
        TILE_KV / 2
        + OVERLAP * P_IN_REGISTERS * TILE_KV / 4
        + 4 * sympy.ceiling(HEAD_DIM_V / 8)  # O, fp32
        + REGISTER_OVERHEAD
        # two copies of the loop beside P in shared memory: 24 and 248 B spilled without
        + APART * (1 - P_IN_REGISTERS) * TILE_KV / 2
        # two loops, of which one counts what is to be repeated: 8 B at head_dim 192 with a window
        + 4 * FIRST * (1 - UNMASKED)
        # 29 of 466 proposals spilled without it, 11 with TILE_KV / 8 + 8
        + ELEMENTWISE * TILE_KV / 4
        # held from before S to its use; one such term is in the line above
        + EARLY_DISTANCES * sympy.Max(DISTANCES - 1, 0) * (TILE_KV / 4 + 2)
        + ELEMENT_REGISTERS
        + 4 * Q_REGISTER_STEPS
    )
    threads = 32 * WARPS + 128
    # What ptxas caps the kernel at, and so what the launch allots to every thread before setmaxnreg. Taking
    # more than was allotted waits for ever: consumers of 248 beside another block hung an H200.
    allotted = 8 * sympy.floor(sympy.Min(MAX_REGISTERS, REGISTERS_PER_SM / threads) / 8)
    pool = 128 * PRODUCER_REGISTERS + 32 * WARPS * CONSUMER_REGISTERS
    # q_full and q_empty of a warpgroup with its tile, two of each buffer of K and V, the cluster's next tile
    barriers = (
        36 * Q_STAGES * WARPS / 4
        + 16 * (STAGES + v_stages)
        + 40 * (CLUSTER - 1) * DYNAMIC
        + FIRST * (20 + WARPS * (25 + Q_STAGES) + (CLUSTER - 1) * (8 + WARPS))
    )
    zero, one, widest = sympy.Integer(0), sympy.Integer(1), sympy.Integer(256)
    own_registers = sympy.Min(MAX_REGISTERS, CONSUMER_REGISTERS)
    return Family(
        "sm90",
        frozenset({"tma", "wgmma", "setmaxnreg"}),
        Sm90Schedule,
        smem,
        registers,
        (
            Limit("shared memory", smem, SMEM_PER_BLOCK, "B of shared memory", by="chip"),
            Limit("registers", registers, own_registers, "registers per thread"),
            Limit("register pool", pool, threads * allotted, "registers per block", by="chip"),
            Limit(
                "setmaxnreg of the producer",
                PRODUCER_REGISTERS,
                allotted,
                "registers, of those that the launch gives",
            ),
            Limit("setmaxnreg of consumers", allotted, CONSUMER_REGISTERS, "registers, as the launch gives"),
            Limit("setmaxnreg", CONSUMER_REGISTERS, widest, "registers", by="chip"),
            Limit("producer", PRODUCER_NEED, PRODUCER_REGISTERS, "registers of the producer"),
            Limit("threads", threads, sympy.Integer(1024), "threads", by="chip"),
            Limit("warpgroups", WARPS, sympy.Integer(16), "warps that compute", by="kernel"),
            Limit("WGMMA width of S", TILE_KV, widest, "columns of wgmma m64nNk16", by="chip"),
            Limit("WGMMA width of O", HEAD_DIM_V, widest, "columns of wgmma m64nNk16", by="chip"),
            Limit("WGMMA rows", TILE_Q, 16 * WARPS, "rows of wgmma m64nNk16"),
            Limit("Q in registers", 16 * Q_REGISTER_STEPS, D16_QK, "columns of Q"),
            Limit("O staged in Q", O_IN_Q * PANEL_V, PANEL_QK, "columns of Q's buffer"),
            Limit("O staged in V", O_IN_V * PANEL_COLUMNS, TILE_KV, "rows of V's buffer"),
            Limit("O staged in V, each warpgroup", O_IN_V * WARPS / 4, v_stages, "buffers of V", by="kernel"),
            # the producer hands the others' buffers over only after the next tile's second K
            Limit("O staged in V, beside K", O_IN_V * sympy.Min(WARPS / 4, 2), STAGES, "buffers of K"),
            Limit("ping-pong", 8 * PING_PONG, WARPS, "warps to alternate between two warpgroups"),
            # tile_kv is a multiple of 16, so that each block's share is whole 8-row patterns of the swizzle
            Limit("cluster", CLUSTER, sympy.Integer(2), "blocks in a cluster", by="kernel"),
            Limit("packed heads", 2 * PACK_GQA, GROUP, "query heads per K/V head to pack"),
            Limit("barriers", barriers, sympy.Integer(BARRIER_BYTES), "B of barriers", by="kernel"),
            Multiple("whole warpgroups", WARPS, sympy.Integer(4), "warpgroups of 4 warps"),
            Multiple("rows per warp", TILE_Q, 16 * WARPS, "64 rows of wgmma for each warpgroup"),
            Multiple("WGMMA depth", TILE_KV, sympy.Integer(MMA_DEPTH), "the depth of wgmma in P V"),
            Multiple("setmaxnreg step", CONSUMER_REGISTERS, sympy.Integer(8), "setmaxnreg"),
            Multiple("setmaxnreg step, producer", PRODUCER_REGISTERS, sympy.Integer(8), "setmaxnreg"),
            Multiple(
                "packed rows",
                sympy.Integer(PANEL_COLUMNS),
                1 + PACK_GQA * (GROUP - 1),
                "the query heads of a K/V head, which a warpgroup's 64 rows hold whole positions of",
            ),
            Requirement("tiles of a cluster", (CLUSTER - 1) * (1 - CLOSED_FORM), zero, _ONE_INTERVAL),
            Requirement("edge tiles apart", APART, CLOSED_FORM * (1 - UNMASKED), _ONE_INTERVAL),
            Requirement("first reference", FIRST, CLOSED_FORM, _ONE_INTERVAL),
            Requirement("overlap", FIRST, OVERLAP, "overlap"),
            Requirement(
                "early distances",
                EARLY_DISTANCES,
                sympy.Min(DISTANCES, 1),
                "a score with terms that depend on q - kv alone",
            ),
            Requirement("packed distances", EARLY_DISTANCES * PACK_GQA, zero, "heads that are not packed"),
            Requirement("shares of tiles", STREAM_K, UNMASKED, "a mask that keeps every key"),
            Requirement("shares in a cluster", STREAM_K * (CLUSTER - 1), zero, "no clusters"),
            Requirement("tiles of packed heads", PACK_GQA, CLOSED_FORM, _ONE_INTERVAL),
            Requirement(
                "packed heads alike",
                PACK_GQA,
                HEADS_ALIKE,
                "a mask and a score that are the same for all heads, and no sink",
            ),
            Multiple("stages", STAGES, one, "K/V buffers"),
            Multiple("Q stages", Q_STAGES, one, "Q buffers"),
            Multiple("cluster size", CLUSTER, one, "blocks in a cluster"),
        ),
    )


FAMILIES: Mapping[str, Family] = MappingProxyType({"sm80": _sm80(), "sm90": _sm90()})


# -- numbers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """One constraint at one tiling."""

    constraint: Constraint
    used: int
    allowed: int

    @property
    def holds(self) -> bool:
        if not isinstance(self.constraint, Multiple):
            return self.used <= self.allowed
        return self.used > 0 and self.allowed > 0 and self.used % self.allowed == 0


@lru_cache(maxsize=4096)  # the solver asks about a tiling's limits, footprint and occupancy one by one
def usage(tiling: Tiling, head: Head, arch: Arch) -> tuple[Usage, ...]:
    """Every constraint of the tiling's family, in numbers."""
    values = tiling.values(head, arch)
    numbers = _evaluate(tiling.family, values)
    constraints = FAMILIES[tiling.family].constraints
    sides = zip(constraints, numbers[0::2], numbers[1::2], strict=True)
    return tuple(Usage(constraint, used, allowed) for constraint, used, allowed in sides)


def violations(tiling: Tiling, head: Head, arch: Arch) -> tuple[Usage, ...]:
    """The constraints that the tiling breaks; empty for a legal one. The one legality predicate."""
    return tuple(use for use in usage(tiling, head, arch) if not use.holds)


def smem_and_registers(tiling: Tiling, head: Head, arch: Arch) -> tuple[int, int]:
    """Bytes of a block, and predicted registers of a computing thread."""
    by_name = {use.constraint.name: use.used for use in usage(tiling, head, arch)}
    return by_name["shared memory"], by_name["registers"]


def bound(limit: Limit, unknown: Expr) -> tuple[Expr, ...]:
    """The limit solved for one of tile_q, tile_kv, stages: upper bounds that must all hold.

    One for each branch of a maximum: ``max(a, b) <= c`` is ``a <= c`` and ``b <= c``. A branch without the
    unknown, or where it only shrinks what is used, bounds nothing. What is used in whole panels counts as if
    panels could be cut, so a point within the bound can still break the limit; `violations` decides.
    """
    solved = []
    for slope, rest in _linear(limit, unknown):
        if slope != 0:
            solved.append((limit.allowed - rest) / slope)
    return tuple(solved)


def largest(family: Family, unknown: Expr, values: Mapping[Expr, int]) -> tuple[float, Limit | None]:
    """The tightest upper bound on `unknown` over all limits, and the limit that sets it.

    inf and None where nothing bounds it; -inf where a limit is broken whatever the unknown is.
    """
    best: tuple[float, Limit | None] = (float("inf"), None)
    arguments = [values[s] for s in SYMBOLS]
    for limit, solved in _bounds(family.name, unknown):
        for slope, room in solved:
            per_unit, left = slope(*arguments), room(*arguments)
            if per_unit > 0:
                best = min(best, (left / per_unit, limit), key=lambda pair: pair[0])
            elif left < 0:  # broken whatever the unknown is
                return float("-inf"), limit
    return best


def _linear(limit: Limit, unknown: Expr) -> tuple[tuple[Expr, Expr], ...]:
    """``(slope, rest)`` of each branch of `used` as a polynomial of degree at most one in the unknown."""
    whole = {ceiling: ceiling.args[0] for ceiling in limit.used.atoms(sympy.ceiling) if ceiling.has(unknown)}
    pairs = []
    for branch in sympy.Max.make_args(limit.used.xreplace(whole)):
        rest, slope = (sympy.Poly(branch, unknown).nth(power) for power in (0, 1))
        pairs.append((slope, rest))
    return tuple(pairs)


_Numeric = Callable[..., Any]


@lru_cache(maxsize=16)
def _bounds(family: str, unknown: Expr) -> tuple[tuple[Limit, tuple[tuple[_Numeric, _Numeric], ...]], ...]:
    found = []
    for limit in FAMILIES[family].constraints:
        if isinstance(limit, Limit) and limit.used.has(unknown) and not limit.allowed.has(unknown):
            # branches of a maximum without the unknown stay: they can be broken whatever it is
            branches = _linear(limit, unknown)
            pairs = tuple((_numeric(slope), _numeric(limit.allowed - rest)) for slope, rest in branches)
            found.append((limit, pairs))
    return tuple(found)


def _numeric(expr: Expr) -> _Numeric:
    return sympy.lambdify(SYMBOLS, expr, "math")  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def _compiled(family: str) -> _Numeric:
    expressions = [side for c in FAMILIES[family].constraints for side in (c.used, c.allowed)]
    return sympy.lambdify(SYMBOLS, expressions, "math", cse=True)  # type: ignore[no-any-return]


def _evaluate(family: str, values: Mapping[Expr, int]) -> list[int]:
    # Fractions appear only where a Multiple is broken as well; what is needed rounds up.
    return [-int(-number // 1) for number in _compiled(family)(*(values[s] for s in SYMBOLS))]
