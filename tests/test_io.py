"""The I/O model's closed forms against loops that move every tile."""

from __future__ import annotations

import dataclasses
import json
from math import ceil, isclose, sqrt
from typing import Any, Literal

import pytest
import sympy

from flashgen.plan import IoModel, KernelPlan, MaskPlan, Sm90Schedule, Workload, io
from flashgen.spec.bounds import RowBounds
from flashgen.spec.symbols import Q

FULL = Workload(
    batch=2,
    heads_q=6,
    heads_kv=2,
    seqlen_q=300,
    seqlen_kv=500,
    head_dim_qk=64,
    head_dim_v=48,
    dtype="bf16",
    align="bottom_right",
    mask=MaskPlan.of_bounds("full", RowBounds(None, None)),
)
CAUSAL = dataclasses.replace(FULL, mask=MaskPlan.of_bounds("causal", RowBounds(None, Q)))
WINDOW = dataclasses.replace(FULL, mask=MaskPlan.of_bounds("window64", RowBounds(Q - 63, Q)))


def moved(w: Workload, tile_q: int, tile_kv: int) -> int:
    """Bytes by walking every tile of every head, each tile's existing rows moved once."""
    total = 0
    shift = w.seqlen_kv - w.seqlen_q
    for start in range(0, w.seqlen_q, tile_q):
        stop = min(start + tile_q, w.seqlen_q)
        total += 2 * (stop - start) * (w.head_dim_qk + w.head_dim_v) + 4 * (stop - start)
        first = w.mask.bounds.evaluate(start + shift, w.seqlen_q, w.seqlen_kv)[0]
        last = w.mask.bounds.evaluate(stop - 1 + shift, w.seqlen_q, w.seqlen_kv)[1]
        for kv in range(0, w.seqlen_kv, tile_kv):
            end = min(kv + tile_kv, w.seqlen_kv)
            if end > first and kv <= last:
                total += 2 * (end - kv) * (w.head_dim_qk + w.head_dim_v)
    return w.batch * w.heads_q * total


@pytest.mark.parametrize("workload", [FULL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
@pytest.mark.parametrize("tile_q, tile_kv", [(64, 32), (128, 48), (512, 512)])
def test_rereads_against_a_walk(workload: Workload, tile_q: int, tile_kv: int) -> None:
    assert IoModel.of(workload, tile_q, tile_kv, 65536).rereads_miss == moved(workload, tile_q, tile_kv)


def test_packed_heads_and_clusters_load_once() -> None:
    spec_free: dict[str, Any] = {
        "spec": "x", "family": "sm90", "target": "sm_90a", "dtype": "bf16", "head_dim_qk": 64,
        "head_dim_v": 48, "group": 2, "align": "bottom_right", "mask": CAUSAL.mask,
        "scale": 1.0, "tile_q": 128, "tile_kv": 64, "stages": 2, "warps": 8, "smem_bytes": 65536,
        "registers": 200, "blocks_per_sm": 1,
    }  # fmt: skip
    w = dataclasses.replace(CAUSAL, heads_q=4)
    plain = IoModel.of_plan(w, KernelPlan(schedule=Sm90Schedule(), **spec_free))
    assert plain == IoModel.of(w, 128, 64, 65536)
    clustered = IoModel.of_plan(w, KernelPlan(schedule=Sm90Schedule(cluster=2), **spec_free))
    assert clustered.rereads_miss == moved(w, 256, 64)
    packed = IoModel.of_plan(w, KernelPlan(schedule=Sm90Schedule(pack_gqa=True), **spec_free))
    # as two heads whose tiles are half as long, but for Q, O and lse, of which there are still four
    rows = moved(dataclasses.replace(w, heads_q=2), 64, 64)
    assert packed.rereads_miss == rows + 2 * 2 * 300 * (2 * (64 + 48) + 4)
    assert packed.compulsory == plain.compulsory < packed.rereads_miss


def test_compulsory_moves_each_tensor_once() -> None:
    tensors = 2 * 2 * (300 * 6 * 64 + 300 * 6 * 48 + 500 * 2 * 64 + 500 * 2 * 48) + 4 * 2 * 6 * 300
    model = IoModel.of(FULL, 128, 64, 65536)
    assert model.compulsory == tensors
    assert model.compulsory < model.rereads_miss < model.standard


def test_standard_attention_writes_and_reads_back_the_matrix_twice() -> None:
    model = IoModel.of(FULL, 128, 64, 65536)
    matrix, lse = 2 * 2 * 6 * 300 * 500, 4 * 2 * 6 * 300
    assert model.standard == model.compulsory - lse + 4 * matrix


def test_unmasked_closed_form_of_loaded_rows() -> None:
    rows = io.KV_ROWS_UNMASKED.subs({io.SEQLEN_Q: 300, io.SEQLEN_KV: 500, io.TILE_Q: 128})
    assert rows == FULL.tiles(128, 64).kv_rows == 500 * ceil(300 / 128)


@pytest.mark.parametrize("smem_bytes, attained", [(4096, False), (2 * 64 * 48, True), (232_448, True)])
def test_lower_bound_and_its_crossover(smem_bytes: int, attained: bool) -> None:
    model = IoModel.of(FULL, 128, 64, smem_bytes)
    m, d2, pairs = smem_bytes / 2, 64 * 48, 300 * 500
    per_head = pairs * d2 / m if attained else pairs * sqrt(d2 / m)
    assert isclose(model.lower_bound, 2 * 12 * per_head)
    assert (model.sram_elements >= model.crossover_elements) is attained


def test_the_bound_counts_kept_pairs_only() -> None:
    assert IoModel.of(CAUSAL, 128, 64, 65536).lower_bound < IoModel.of(FULL, 128, 64, 65536).lower_bound


def test_expressions_grow_as_the_papers_say() -> None:
    n = sympy.Symbol("n", positive=True)
    square = {io.SEQLEN_Q: n, io.SEQLEN_KV: n, io.PAIRS: n**2, io.KV_ROWS: n**2 / io.TILE_Q}
    degree = {
        name: sympy.degree(sympy.expand(e.subs(square)), n)
        for name, e in io.EXPRESSIONS.items()
        if name != "lower_bound"
    }
    assert degree == {"compulsory": 1, "rereads_miss": 2, "standard": 2}
    # twice the tile, half the re-reads
    rereads = io.EXPRESSIONS["rereads_miss"].subs(square)
    leading = sympy.expand(rereads).coeff(n, 2)
    assert sympy.simplify(leading / leading.subs(io.TILE_Q, 2 * io.TILE_Q)) == 2


@pytest.mark.parametrize("working_set, share", [(10.0, 0.0), (100.0, 0.0), (200.0, 0.5)])
def test_l2_serves_what_it_holds(working_set: float, share: float) -> None:
    model = IoModel.of(FULL, 64, 64, 65536)
    again = model.rereads_miss - model.compulsory
    assert model.missed(working_set, 100) == model.compulsory + share * again


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_empty_workloads_move_nothing_twice(align: Literal["bottom_right", "top_left"]) -> None:
    empty = dataclasses.replace(FULL, seqlen_kv=0, align=align)
    model = IoModel.of(empty, 64, 64, 65536)
    assert model.rereads_miss == model.compulsory == 2 * 12 * 300 * 112 + 4 * 12 * 300


def test_to_dict_is_json() -> None:
    data = IoModel.of(FULL, 64, 64, 65536).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert set(data) == {*io.EXPRESSIONS, "sram_elements", "crossover_elements"}
