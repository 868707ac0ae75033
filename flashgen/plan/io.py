"""The I/O model: bytes between device memory and the chip, in closed form.

Four figures for one workload:

* `compulsory`: every tensor crosses once. No kernel moves less.
* `rereads_miss`: K and V cross again for each q tile, as if there were no L2: FlashAttention's two-level
  model with the block's shared memory as its SRAM (Dao et al., arXiv 2205.14135, section 3.2). Real traffic
  lies between these two: L2 serves all of the second figure, HBM what L2 does not hold.
* `standard`: S and P are written and read back, Theta(N d + N^2) (2205.14135, Algorithm 0).
* `lower_bound`: Theta(min(N^2 d / sqrt(M), N^2 d^2 / M)) elements for M elements of SRAM (Saha and Ye,
  arXiv 2402.07443). From M >= d^2 on, the second is the smaller: there FlashAttention is optimal (2205.14135,
  Theorem 2 and Proposition 3 state it for M up to N d); for M < d^2 blocked matrix products do better.

The lower bound is asymptotic: its constant is left at 1, so compare growth, not percents. Masked pairs cost
nothing in any exact algorithm, so `pairs`, the kept ones, stands where the papers have N^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import sympy

from flashgen.plan.model import KernelPlan, Sm90Schedule
from flashgen.plan.workload import Workload

Expr = Any

BATCH, HEADS_Q, HEADS_KV, SEQLEN_Q, SEQLEN_KV, HEAD_DIM_QK, HEAD_DIM_V = sympy.symbols(
    "batch heads_q heads_kv seqlen_q seqlen_kv head_dim_qk head_dim_v", positive=True
)
TILE_Q, KV_ROWS, PAIRS, SRAM = sympy.symbols("tile_q kv_rows pairs M", positive=True)
# Heads that load K and V: all of the queries', or those of K and V where a tile packs a whole group.
HEADS_LOADING = sympy.Symbol("heads_loading", positive=True)
BYTES = 2  # per element of q, k, v, o
LSE_BYTES = 4

_Q_AND_O = BYTES * BATCH * HEADS_Q * SEQLEN_Q * (HEAD_DIM_QK + HEAD_DIM_V)
_K_AND_V = BYTES * BATCH * HEADS_KV * SEQLEN_KV * (HEAD_DIM_QK + HEAD_DIM_V)
_LSE = LSE_BYTES * BATCH * HEADS_Q * SEQLEN_Q
# d^2 of the papers is head_dim_qk * head_dim_v here, d their geometric mean.
_D2 = HEAD_DIM_QK * HEAD_DIM_V

EXPRESSIONS: Mapping[str, Expr] = MappingProxyType(
    {
        "compulsory": _Q_AND_O + _K_AND_V + _LSE,
        "rereads_miss": _Q_AND_O
        + BYTES * BATCH * HEADS_LOADING * KV_ROWS * (HEAD_DIM_QK + HEAD_DIM_V)
        + _LSE,
        "standard": _Q_AND_O + _K_AND_V + 4 * BYTES * BATCH * HEADS_Q * SEQLEN_Q * SEQLEN_KV,
        "lower_bound": BYTES
        * BATCH
        * HEADS_Q
        * sympy.Min(PAIRS * _D2 / SRAM, PAIRS * sympy.sqrt(_D2 / SRAM)),
    }
)

# Rows of K that one head loads where nothing is masked: all of them for each q tile. In general `kv_rows` is
# counted exactly from the mask's bounds (tiles.count).
KV_ROWS_UNMASKED: Expr = SEQLEN_KV * sympy.ceiling(SEQLEN_Q / TILE_Q)

_VARIABLES = (
    BATCH,
    HEADS_Q,
    HEADS_KV,
    HEADS_LOADING,
    SEQLEN_Q,
    SEQLEN_KV,
    HEAD_DIM_QK,
    HEAD_DIM_V,
    TILE_Q,
    KV_ROWS,
    PAIRS,
    SRAM,
)
_COMPILED = sympy.lambdify(_VARIABLES, list(EXPRESSIONS.values()), "math")


@dataclass(frozen=True)
class IoModel:
    """Bytes moved for one workload under one tiling. `lower_bound` is up to a constant; see the module."""

    compulsory: int
    rereads_miss: int
    standard: int
    lower_bound: float
    sram_elements: int  # M: elements that the block's shared memory holds
    crossover_elements: int  # d^2: from this M on, FlashAttention's I/O is optimal

    @classmethod
    def of_plan(cls, workload: Workload, plan: KernelPlan) -> IoModel:
        """Numbers for a workload under a plan."""
        packed, shared = 1, 1
        if isinstance(plan.schedule, Sm90Schedule):
            packed = plan.group if plan.schedule.pack_gqa else 1
            shared = plan.schedule.cluster
        positions = plan.tile_q // packed * shared
        return cls.of(workload, positions, plan.tile_kv, plan.smem_bytes, packed_heads=packed)

    @classmethod
    def of(
        cls, workload: Workload, tile_q: int, tile_kv: int, smem_bytes: int, *, packed_heads: int = 1
    ) -> IoModel:
        """Numbers for a workload. `smem_bytes` is the shared memory of a block, the model's SRAM.

        `tile_q` counts the query positions that load K and V together, of `packed_heads` query heads at once.
        """
        counts = workload.tiles(tile_q, tile_kv)
        w = workload
        compulsory, rereads_miss, standard, lower_bound = _COMPILED(
            w.batch,
            w.heads_q,
            w.heads_kv,
            w.heads_q // packed_heads,
            w.seqlen_q,
            w.seqlen_kv,
            w.head_dim_qk,
            w.head_dim_v,
            tile_q,
            counts.kv_rows,
            counts.kept,
            smem_bytes // BYTES,
        )
        return cls(
            compulsory,
            rereads_miss,
            standard,
            float(lower_bound),
            smem_bytes // BYTES,
            w.head_dim_qk * w.head_dim_v,
        )

    def to_dict(self) -> dict[str, object]:
        """Expression and bytes by name, for `flashgen plan --json` and manifests."""
        return {
            name: {"bytes": getattr(self, name), "expression": str(expression)}
            for name, expression in EXPRESSIONS.items()
        } | {"sram_elements": self.sram_elements, "crossover_elements": self.crossover_elements}

    def missed(self, working_set_bytes: float, l2_bytes: int) -> float:
        """HBM bytes where the K and V in use at one time fill `working_set_bytes`.

        All re-reads hit while they fit L2; past that, the share that does not fit misses.
        """
        miss = 0.0 if working_set_bytes <= l2_bytes else 1 - l2_bytes / working_set_bytes
        return self.compulsory + miss * max(self.rereads_miss - self.compulsory, 0)
