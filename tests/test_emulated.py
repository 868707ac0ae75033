"""Whole printed sm90 kernels against float64, on an emulated SM: `emulator/` says what of one is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_exact
from emulate import EmulatedKernel, EmulationError, Machine
from host_kernel import COMPILER
from test_schedules import CHOICES
from torch import Tensor

from flashgen.arch import arch
from flashgen.plan import solve
from flashgen.plan.model import Sm90Schedule
from flashgen.runtime import reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no host compiler")

_KEPT = -2  # kKept of the kernels


def _tiles(q: int = 128, kv: int = 32, **schedule: Any) -> dict[str, Any]:
    return {"q": q, "kv": kv, "schedule": {"family": "sm90", **schedule}}


# Tails of rows and keys; grouped heads; fewer keys than rows, the first of which keep none.
_CAUSAL = Case(heads_kv=2, group=2, mask="causal", seqlen_q=150, seqlen_kv=230, target="sm_90a")
_WINDOW = replace(_CAUSAL, mask={"window": 120}, batch=2, heads_kv=1, seqlen_q=200, seqlen_kv=170)
_MANY = replace(_CAUSAL, heads_kv=6, group=1, batch=2, seqlen_q=300, seqlen_kv=300)  # tiles for each block
_FULL = replace(_CAUSAL, mask="full", dtype="fp16", seqlen_q=100, seqlen_kv=500)


def _of_choice(index: int, choice: dict[str, Any]) -> Case:
    shared, first = choice.get("tile_order") == "stream_k", choice.get("reference") == "first"
    varied = index % 2 == 1 and not first
    # not packed, so that tiles have rows of one head, whose keys leave the range or do not
    full = replace(_FULL, heads_kv=4, group=1) if first else _FULL
    case = full if shared else _WINDOW if varied else _CAUSAL
    kv = 64 if choice.get("o_buffer") == "v" else 16 if shared else 32
    return replace(case, tiles=_tiles(kv=kv, **choice))


CASES = {
    "default": replace(_CAUSAL, head_dim_qk=128, head_dim_v=128, heads_kv=1),
    **{
        "-".join(f"{k}={v}" for k, v in choice.items()): _of_choice(index, choice)
        for index, choice in enumerate(CHOICES)
    },
    "full": replace(_FULL, tiles=_tiles(64)),
    "more tiles than blocks": replace(
        _FULL, heads_kv=4, group=1, seqlen_q=130, tiles=_tiles(64, 16, tile_order="stream_k"), sink=True
    ),
    "top left": replace(_WINDOW, align="top_left", seqlen_q=260, tiles=_tiles(192, edge_tiles="apart")),
    "packed causal": replace(_CAUSAL, group=4, heads_kv=1, tiles=_tiles(pack_gqa=True)),
    "uneven head_dim": replace(_CAUSAL, head_dim_qk=96, head_dim_v=40, sink=True, tiles=_tiles(kv=48)),
    "first of a window": replace(
        _WINDOW, mask={"window": 200}, seqlen_q=300, seqlen_kv=300, group=4, tiles=_tiles(reference="first")
    ),
    "softcap": replace(_WINDOW, score="softcap(20)", tiles=_tiles()),
    "first of capped scores": replace(_CAUSAL, score="softcap(20)", tiles=_tiles(reference="first")),
    "O in V of a window": replace(_WINDOW, seqlen_q=500, tiles=_tiles(kv=64, o_buffer="v")),
    "O in V of a list": replace(_CAUSAL, mask="window(40) or kv < 4", tiles=_tiles(kv=64, o_buffer="v")),
    # A producer that is late must not miss a phase: many tiles for each block.
    "O in V of many": replace(
        _MANY,
        tiles=_tiles(kv=64, o_buffer="v", q_stages=1),
    ),
    "O in V of many, three buffers": replace(
        _MANY,
        tiles=_tiles(
            kv=64, o_buffer="v", q_stages=1, extra_v_stages=1, reference="first", key_order="ascending"
        ),
    ),
    "clusters with tiles to repeat": replace(
        _MANY,
        tiles=_tiles(
            kv=64,
            o_buffer="v",
            q_stages=1,
            extra_v_stages=1,
            reference="first",
            key_order="ascending",
            cluster=2,
        ),
    ),
    "steps of Q held": replace(
        _MANY, head_dim_qk=128, head_dim_v=64, tiles=_tiles(kv=64, q_register_steps=3, reference="first")
    ),
    "all of Q held, some of it padding": replace(_CAUSAL, head_dim_qk=40, tiles=_tiles(q_register_steps=3)),
    "O in V of three": replace(_CAUSAL, tiles={**_tiles(192, 64, o_buffer="v"), "stages": 3}),
    "first of a bias": replace(
        _WINDOW,
        score="relative_bias",
        seqlen_q=300,
        seqlen_kv=300,
        tiles=_tiles(reference="first", distance_terms="early"),
    ),
    "first of alibi, all keys": replace(
        _CAUSAL, mask="full", score="alibi", tiles=_tiles(reference="first", key_order="ascending")
    ),
    "first of a bias, shared": replace(
        _FULL,
        dtype="bf16",
        score="relative_bias",
        tiles=_tiles(kv=16, reference="first", distance_terms="early", tile_order="stream_k"),
    ),
    "alibi": replace(_CAUSAL, score="alibi", tiles=_tiles()),
    "documents": replace(_CAUSAL, mask="causal and document", seqlen_kv=150, batch=2, tiles=_tiles()),
    "list": replace(_CAUSAL, mask="window(40) or kv < 4", tiles=_tiles()),
    "early distances": replace(_WINDOW, score="relative_bias", tiles=_tiles(distance_terms="early")),
    "two early distances of a list": replace(
        _CAUSAL,
        mask="window(40) or kv < 4",
        score="20 * tanh((score + table[head, q - kv]) / 20) + exp(-abs(q - kv) / 32) * gain[kv]",
        inputs={
            "table": {"index": ["head", "q - kv"], "dtype": "fp32"},
            "gain": {"index": ["kv"], "dtype": "fp32"},
        },
        tiles=_tiles(distance_terms="early"),
    ),
    "early distances without overlap": replace(
        _FULL,
        score="t5_encoder_bias",
        tiles=_tiles(distance_terms="early", overlap=False, tile_order="dynamic"),
    ),
    "map": replace(_CAUSAL, mask="causal and (q - kv) % 96 < 3", tiles=_tiles()),
    "kept for each query": replace(
        _CAUSAL,
        mask="causal and (q // 3 - kv // 3) % 5 < 2",
        score="score * sqrt(gain[q] ** 2 + 1) + tanh(gain[q]) * kv / 64 - log(1 + abs(q))",
        inputs={"gain": {"index": ["head", "q"], "dtype": "fp32"}},
        tiles=_tiles(),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_core() -> Iterator[None]:
    """Threads of torch would mostly wait for one another, over tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def _kernel(case: Case, folder: Path, mutate: Callable[[str], str] = lambda text: text) -> EmulatedKernel:
    return EmulatedKernel(solve(case.spec(), arch("sm_90a")), folder, mutate)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """With a key for every other row of some heads, not in its first tile, whose exponential leaves fp32's
    range.
    """
    q, k, v = case.tensors()
    q[..., 0] = 0
    q[:, ::2, ::2, 0] = 4
    k[:, case.seqlen_kv // 3, 0, 0] = k[:, case.seqlen_kv // 8, 1:, 0] = 20 * case.head_dim_qk**0.5
    return q, k, v


@pytest.mark.parametrize("name", CASES)
def test_two_launches_are_exact(name: str, folder: Path) -> None:
    case = CASES[name]
    kernel = _kernel(case, folder)
    schedule = kernel.plan.schedule
    assert isinstance(schedule, Sm90Schedule)
    inputs = _inputs(case) if schedule.reference == "first" else case.tensors()
    seed = 2 * list(CASES).index(name)
    o, lse = kernel(case, inputs, Machine(blocks=5, resident=2, seed=seed))
    assert_exact(case, o, lse, *inputs, **case.given())
    if schedule.tile_order == "stream_k":
        assert kernel.workspace.numel() > 0, "some tiles are cut"
    if schedule.reference == "first":
        kept = kernel.links == _KEPT  # of each tile and warpgroup
        assert kept.any()
        if "reference=first" in name or "repeat" in name:
            assert not kept.all(), "some tiles are repeated, others not"
    again, lse_again = kernel(case, inputs, Machine(blocks=5, resident=2, seed=seed + 1))
    assert torch.equal(again, o) and torch.equal(lse_again, lse), "another order of the threads shows"


def test_the_lse_does_not_drift(folder: Path) -> None:
    """A maximum that stays corrects by 1, exactly. Were one of the products that are subtracted not rounded,
    188 key tiles with scores of several hundred would add up to 8e-6.
    """
    tiles = _tiles(64, 16, reference="running", tile_order="static")
    case = Case(64, 64, heads_kv=1, batch=1, seqlen_q=64, seqlen_kv=3000, tiles=tiles, target="sm_90a")
    q, k, v = case.tensors()
    k[:, ::5] *= 200
    _, lse = _kernel(case, folder)(case, (q, k, v), Machine(blocks=5, resident=5))
    _, exact = reference(case.spec(), q, k, v)
    assert float(((lse.double() - exact) / exact).abs().max()) < 1e-6


_IN_SHORT_LOOP = "softmax.exponentiate(s, scale_log2, 0);"


@pytest.mark.parametrize("mask", ["full", "q - kv < 1000"])
@pytest.mark.parametrize(
    ("was", "instead", "kept"),
    [
        ("", "", True),
        ("has_usual_maximum", "has_maximum", False),
        (_IN_SHORT_LOOP, f"in_range = false; {_IN_SHORT_LOOP}", False),
    ],
    ids=["as it is", "any maximum", "the short loop shows"],
)
def test_keys_that_a_bias_all_but_drops_are_no_reference(
    folder: Path, mask: Any, was: str, instead: str, kept: bool
) -> None:
    """The first key tile of each row: exponentials relative to -1e9 would all have to be repeated."""
    score = "score - where(kv < seqlen_kv - 40, 0, 1e9)"
    case = replace(_CAUSAL, mask=mask, score=score, tiles=_tiles(reference="first"))
    kernel = _kernel(case, folder, lambda text: text.replace(was, instead) if was else text)
    o, lse = kernel(case, inputs := case.tensors(), Machine(blocks=5, resident=2))
    assert_exact(case, o, lse, *inputs)
    assert bool((kernel.links == _KEPT).all()) == kept


@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.parametrize("cap", [20, 50])
def test_scores_beyond_the_polynomial_of_tanh_are_noticed(folder: Path, cap: int, order: str) -> None:
    """By the sums alone: a key of every other row, not in its first tile, has tanh(1)."""
    case = replace(
        _CAUSAL, group=1, batch=2, score=f"softcap({cap})", tiles=_tiles(reference="first", key_order=order)
    )
    usual, unusual = case.tensors(), case.tensors()
    q, k, _ = unusual
    q[..., 0] = 0
    q[:, ::2, :, 0] = 4
    k[:, case.seqlen_kv // 3, :, 0] = cap / 4 * case.head_dim_qk**0.5
    machine = Machine(blocks=5, resident=2)
    kernel = _kernel(case, folder)
    for inputs, kept in ((usual, True), (unusual, False)):
        o, lse = kernel(case, inputs, machine)
        assert_exact(case, o, lse, *inputs)
        assert bool((kernel.links == _KEPT).all()) == kept
    if cap == 20:  # at tanh(1), the polynomial is off by a third of a unit
        unaware = _kernel(
            case, folder, lambda text: text.replace("&= softmax.polynomial", "|= softmax.polynomial")
        )
        o, lse = unaware(case, unusual, machine)
        with pytest.raises(AssertionError):
            assert_exact(case, o, lse, *unusual)


def test_a_low_cap_and_a_steep_edge_repeat_no_tile(folder: Path) -> None:
    """Where the polynomial cannot serve, tanh is taken at once; and what edge tiles add is not its affair."""
    tiles = _tiles(64, 64, reference="first", key_order="ascending")
    low = replace(_CAUSAL, heads_kv=1, group=1, seqlen_q=256, seqlen_kv=256, score="softcap(20)", tiles=tiles)
    steep = replace(low, score="softcap(50)")
    q, k, v = low.tensors()
    q[:], k[:] = 0, 0
    q[..., 0], k[..., 0] = 1, -6 * low.head_dim_qk**0.5  # all scores are -6, but that of key 0
    k[:, 0] = 0
    peaked = q, k, v
    q, k, v = steep.tensors()
    k = q * (24 * steep.head_dim_qk**0.5 / (q * q).sum(-1, keepdim=True))  # 24 on the diagonal
    for case, inputs in ((low, peaked), (steep, (q, k.to(q.dtype), v))):
        kernel = _kernel(case, folder)
        o, lse = kernel(case, inputs, Machine(blocks=5, resident=2))
        assert_exact(case, o, lse, *inputs)
        assert (kernel.links == _KEPT).all()


_STATEMENT = "if (lane == 0) shared.{0}_empty[{0}_ring.stage].arrive();"
# What is left out or wrong in the printed text, and how that shows.
MUTANTS = {
    "a missing arrive": (_STATEMENT.format("k"), "", "deadlock"),
    "a missing barrier": (
        "fence_async_proxy();\n    named_barrier_sync<128>(own_barrier);", "", "error|NaN"
    ),
    "a wrong parity": (
        "k_empty[k_ring.stage].wait(k_ring.parity ^ 1)",
        "k_empty[k_ring.stage].wait(k_ring.parity)",
        "deadlock",
    ),
    "a missing wait for V": (
        "shared.v_full[v_ring.stage].wait(v_ring.parity);\n      issue_output", "issue_output", "error|NaN"
    ),
    "an arrival too many": (
        "arrive_expect(kQBytes);", "arrive_expect(kQBytes); full.arrive();", "more arrivals at an mbarrier"
    ),
    "a barrier of fewer threads": (
        "named_barrier_sync<256>(kTurn", "named_barrier_sync<128>(kTurn", "named barrier . is for"
    ),
    "a store that is not waited for": (
        "tma_store_wait_read();  // before the block", ";  //", "ends before its stores"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_seen(name: str, folder: Path) -> None:
    before, after, message = MUTANTS[name]
    case = replace(_CAUSAL, tiles=_tiles())

    def mutate(text: str) -> str:
        assert before in text
        return text.replace(before, after)

    kernel = _kernel(case, folder, mutate)
    inputs = case.tensors()
    with pytest.raises((EmulationError, AssertionError), match=message):
        for seed in range(6):
            assert_exact(case, *kernel(case, inputs, Machine(2, 2, seed)), *inputs)
