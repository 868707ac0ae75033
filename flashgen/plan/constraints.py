"""What must fit on the chip: relations between the sizes of a tiling, as sympy expressions.

`FAMILIES[name].constraints` lists them. One definition serves three ends: `violations` is the one legality
predicate, for solved and for user-given tilings alike; `bound` solves a limit for one unknown
(``tile_kv <= ...``), so that the solver enumerates only what is legal; `usage` gives the numbers to print.

Shared memory is laid out in docs/architecture.md, "Shared memory". Registers are per computing thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import sympy

from flashgen.arch import Arch
from flashgen.plan.model import Sm80Schedule, Sm90Schedule

Expr = Any  # sympy ships no types


def _symbols(names: str) -> Any:
    return sympy.symbols(names, integer=True, nonnegative=True)


# The unknowns.
TILE_Q, TILE_KV, STAGES, WARPS = UNKNOWNS = _symbols("tile_q tile_kv stages warps")
# Schedule choices; 0 or 1 where they are yes or no.
Q_IN_REGISTERS, P_IN_REGISTERS, OVERLAP, PING_PONG, O_ALIASES_Q = _symbols(
    "q_in_registers p_in_registers overlap ping_pong o_aliases_q"
)
Q_STAGES, CLUSTER, PRODUCER_REGISTERS, CONSUMER_REGISTERS = _symbols(
    "q_stages cluster producer_registers consumer_registers"
)
# The head: PITCH is the sm80 row of shared memory, PANEL the sm90 one, D16 the padded width; in elements.
HEAD_DIM_QK, HEAD_DIM_V, PITCH_QK, PITCH_V, PANEL_QK, PANEL_V, D16_QK, D16_V = _symbols(
    "head_dim_qk head_dim_v pitch_qk pitch_v panel_qk panel_v d16_qk d16_v"
)
# The chip.
SMEM_PER_BLOCK, REGISTERS_PER_SM, MAX_REGISTERS = _symbols("smem_per_block registers_per_sm max_registers")
# The compiler: registers beyond accumulators.
REGISTER_OVERHEAD, FRAGMENT_OVERHEAD = _symbols("register_overhead fragment_overhead")

_SYMBOLS = (
    *UNKNOWNS,
    Q_IN_REGISTERS,
    P_IN_REGISTERS,
    OVERLAP,
    PING_PONG,
    O_ALIASES_Q,
    Q_STAGES,
    CLUSTER,
    PRODUCER_REGISTERS,
    CONSUMER_REGISTERS,
    HEAD_DIM_QK,
    HEAD_DIM_V,
    PITCH_QK,
    PITCH_V,
    PANEL_QK,
    PANEL_V,
    D16_QK,
    D16_V,
    SMEM_PER_BLOCK,
    REGISTERS_PER_SM,
    MAX_REGISTERS,
    REGISTER_OVERHEAD,
    FRAGMENT_OVERHEAD,
)

BYTES = 2  # per element of q, k, v, o: bf16 and fp16
MMA_DEPTH = 16  # keys that one mma of P V takes in, on either family
BARRIER_BYTES = 1024
ALIGNMENT_BYTES = 1024  # what aligning the base of dynamic shared memory to 1024 B can cost

# Registers beyond accumulators (addresses, loop state), by consumer warpgroups: 216 of 240 and 128 of 160 are
# what accumulators can have without spills, measured on an H200. This and `sm80_overhead` are all that comes
# from the compiler and not from the layout.
SM90_OVERHEAD: Mapping[int, int] = MappingProxyType({1: 32, 2: 24, 3: 32})

# setmaxnreg of the producer and of each consumer, by consumer warpgroups; the first is the default.
REGISTER_SPLITS: Mapping[int, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        1: ((56, 256),),
        2: ((24, 240), (40, 232)),
        3: ((32, 160),),
    }
)


def pitch(head_dim: int) -> int:
    """Elements from one row of an sm80 tile to the next: free of bank conflicts under ldmatrix."""
    d16 = padded(head_dim, 16)
    return d16 if d16 % 64 == 0 else d16 + 8


def padded(size: int, to: int) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


def sm80_overhead(arch: Arch, head_dim_qk: int, schedule: Sm80Schedule) -> tuple[int, int]:
    """Registers of an sm80 thread beyond its accumulators: a base, and more for each m16 fragment of rows.

    Fitted to the least register limit without spills, bisected with NVRTC 13.0 over some 90 tilings, head_dim
    64 to 256. It is there to be right about how many blocks an SM holds without spills, not to the register.
    """
    major, _ = arch.capability
    if major >= 10:  # the compiler keeps more loads in flight here, whatever the head
        base, per_fragment = (64, 16) if major == 10 else (56, 8)
        return base + 16 * (major == 10 and schedule.q_in_registers), per_fragment
    width = padded(head_dim_qk, 16)
    k_steps = max(width // 8, (width - 48) // 5)  # addresses and operands of Q and K along the head
    unswizzled = 8 * (width % 64 != 0)  # rows whose pitch is no power of two: more addresses
    return 30 + unswizzled, k_steps // 2 if schedule.q_in_registers else k_steps


@dataclass(frozen=True)
class Tiling:
    """A point of the lattice: everything about a kernel that the solver chooses."""

    family: Literal["sm80", "sm90"]
    tile_q: int
    tile_kv: int
    stages: int
    warps: int
    schedule: Sm80Schedule | Sm90Schedule

    def values(self, head_dim_qk: int, head_dim_v: int, arch: Arch) -> dict[Expr, int]:
        """Numbers for every symbol; choices that the family does not have are 0."""
        if isinstance(self.schedule, Sm80Schedule):
            base, per_fragment = sm80_overhead(arch, head_dim_qk, self.schedule)
        else:
            base, per_fragment = SM90_OVERHEAD.get(self.warps // 4, max(SM90_OVERHEAD.values())), 0
        choices = {f.name: getattr(self.schedule, f.name) for f in fields(self.schedule)}
        values = {symbol: int(choices.get(symbol.name, 0)) for symbol in _SCHEDULE_SYMBOLS}
        return values | {
            TILE_Q: self.tile_q,
            TILE_KV: self.tile_kv,
            STAGES: self.stages,
            WARPS: self.warps,
            HEAD_DIM_QK: head_dim_qk,
            HEAD_DIM_V: head_dim_v,
            PITCH_QK: pitch(head_dim_qk),
            PITCH_V: pitch(head_dim_v),
            PANEL_QK: padded(head_dim_qk, 64),
            PANEL_V: padded(head_dim_v, 64),
            D16_QK: padded(head_dim_qk, 16),
            D16_V: padded(head_dim_v, 16),
            SMEM_PER_BLOCK: arch.smem_per_block,
            REGISTERS_PER_SM: arch.registers_per_sm,
            MAX_REGISTERS: arch.max_registers_per_thread,
            REGISTER_OVERHEAD: base,
            FRAGMENT_OVERHEAD: per_fragment,
        }


_SCHEDULE_SYMBOLS = (
    Q_IN_REGISTERS,
    P_IN_REGISTERS,
    OVERLAP,
    PING_PONG,
    O_ALIASES_Q,
    Q_STAGES,
    CLUSTER,
    PRODUCER_REGISTERS,
    CONSUMER_REGISTERS,
)


@dataclass(frozen=True)
class Limit:
    """``used <= allowed``."""

    name: str
    used: Expr
    allowed: Expr
    needs: str  # "B of shared memory": completes "needs 245,760 ..."
    of_chip: bool = False  # the limit is the chip's, so the message names the target

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


Constraint = Limit | Multiple


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
            Limit("shared memory", smem, SMEM_PER_BLOCK, "B of shared memory", of_chip=True),
            Limit("registers", registers, own_registers, "registers per thread", of_chip=True),
            Limit("threads", threads, sympy.Integer(1024), "threads", of_chip=True),
            Multiple("rows per warp", TILE_Q, 16 * WARPS, "16 rows of mma.sync m16n8k16 for each warp"),
            Multiple("mma depth", TILE_KV, sympy.Integer(MMA_DEPTH), "the depth of mma.sync m16n8k16 in P V"),
            Multiple("stages", STAGES, sympy.Integer(1), "K/V buffers"),
            Multiple("warps", WARPS, sympy.Integer(1), "warps that compute"),
        ),
    )


def _sm90() -> Family:
    q = BYTES * Q_STAGES * TILE_Q * PANEL_QK
    o = BYTES * TILE_Q * PANEL_V
    smem = (
        q
        + BYTES * STAGES * TILE_KV * (PANEL_QK + PANEL_V)
        + (1 - P_IN_REGISTERS) * BYTES * TILE_Q * TILE_KV
        + (1 - O_ALIASES_Q) * o
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
    )
    own_registers = sympy.Min(MAX_REGISTERS, CONSUMER_REGISTERS)
    block_registers = 128 * PRODUCER_REGISTERS + 32 * WARPS * CONSUMER_REGISTERS
    one, widest = sympy.Integer(1), sympy.Integer(256)
    return Family(
        "sm90",
        frozenset({"tma", "wgmma", "setmaxnreg"}),
        Sm90Schedule,
        smem,
        registers,
        (
            Limit("shared memory", smem, SMEM_PER_BLOCK, "B of shared memory", of_chip=True),
            Limit("registers", registers, own_registers, "registers per thread"),
            Limit("register file", block_registers, REGISTERS_PER_SM, "registers per block", of_chip=True),
            Limit("threads", 32 * WARPS + 128, sympy.Integer(1024), "threads", of_chip=True),
            Limit("WGMMA width of S", TILE_KV, widest, "columns of wgmma m64nNk16", of_chip=True),
            Limit("WGMMA width of O", HEAD_DIM_V, widest, "columns of wgmma m64nNk16", of_chip=True),
            Limit("WGMMA rows", TILE_Q, 16 * WARPS, "rows of wgmma m64nNk16"),
            Limit("O staged in Q", O_ALIASES_Q * o, q, "B of Q's buffer"),
            Limit("ping-pong", 8 * PING_PONG, WARPS, "warps to alternate between two warpgroups"),
            Limit("setmaxnreg of consumers", CONSUMER_REGISTERS, widest, "registers", of_chip=True),
            Limit("setmaxnreg of the producer", sympy.Integer(24), PRODUCER_REGISTERS, "registers"),
            Limit("cluster", CLUSTER, sympy.Integer(8), "blocks in a cluster", of_chip=True),
            Multiple("warpgroups", WARPS, sympy.Integer(4), "warpgroups of 4 warps"),
            Multiple("rows per warp", TILE_Q, 16 * WARPS, "64 rows of wgmma for each warpgroup"),
            Multiple("WGMMA depth", TILE_KV, sympy.Integer(MMA_DEPTH), "the depth of wgmma in P V"),
            Multiple("setmaxnreg step", CONSUMER_REGISTERS, sympy.Integer(8), "setmaxnreg"),
            Multiple("setmaxnreg step, producer", PRODUCER_REGISTERS, sympy.Integer(8), "setmaxnreg"),
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
        if isinstance(self.constraint, Limit):
            return self.used <= self.allowed
        return self.used > 0 and self.allowed > 0 and self.used % self.allowed == 0


def usage(tiling: Tiling, head_dim_qk: int, head_dim_v: int, arch: Arch) -> tuple[Usage, ...]:
    """Every constraint of the tiling's family, in numbers."""
    values = tiling.values(head_dim_qk, head_dim_v, arch)
    numbers = _evaluate(tiling.family, values)
    constraints = FAMILIES[tiling.family].constraints
    sides = zip(constraints, numbers[0::2], numbers[1::2], strict=True)
    return tuple(Usage(constraint, used, allowed) for constraint, used, allowed in sides)


def violations(tiling: Tiling, head_dim_qk: int, head_dim_v: int, arch: Arch) -> tuple[Usage, ...]:
    """The constraints that the tiling breaks; empty for a legal one. The one legality predicate."""
    return tuple(use for use in usage(tiling, head_dim_qk, head_dim_v, arch) if not use.holds)


def smem_and_registers(tiling: Tiling, head_dim_qk: int, head_dim_v: int, arch: Arch) -> tuple[int, int]:
    """Bytes of a block, and predicted registers of a computing thread."""
    by_name = {use.constraint.name: use.used for use in usage(tiling, head_dim_qk, head_dim_v, arch)}
    return by_name["shared memory"], by_name["registers"]


def bound(limit: Limit, unknown: Expr) -> tuple[Expr, ...]:
    """The limit solved for one of tile_q, tile_kv, stages: upper bounds that must all hold.

    One for each branch of a maximum: ``max(a, b) <= c`` is ``a <= c`` and ``b <= c``. A branch without the
    unknown, or where it only shrinks what is used, bounds nothing.
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
    arguments = [values[s] for s in _SYMBOLS]
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
    pairs = []
    for branch in sympy.Max.make_args(limit.used):
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
    return sympy.lambdify(_SYMBOLS, expr, "math")  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def _compiled(family: str) -> _Numeric:
    expressions = [side for c in FAMILIES[family].constraints for side in (c.used, c.allowed)]
    return sympy.lambdify(_SYMBOLS, expressions, "math", cse=True)  # type: ignore[no-any-return]


def _evaluate(family: str, values: Mapping[Expr, int]) -> list[int]:
    # Fractions appear only where a Multiple is broken as well; what is needed rounds up.
    return [-int(-number // 1) for number in _compiled(family)(*(values[s] for s in _SYMBOLS))]
