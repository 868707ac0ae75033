"""Exponentials relative to the maximum of the first key tile (`reference: first`): sm90 only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_exact
from gpu_kernels import finish, kernel_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

FIRST = {"schedule": {"reference": "first"}}
MASKS: tuple[Any, ...] = ("full", "causal", {"window": 200}, {"window": 1000})


def schedules(**choices: Any) -> dict[str, Any]:
    return {"schedule": {"reference": "first", **choices}}


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_against_float64(poisoned: None, dims: tuple[int, int], mask: Any, dtype: str) -> None:
    case = Case(*dims, heads_kv=2, group=2, dtype=dtype, mask=mask, batch=3, tiles=FIRST)
    for seqlen_q, seqlen_kv in ((1, 1), (77, 300), (700, 650), (1500, 1500), (130, 2900), (900, 333)):
        run(replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv))


@pytest.mark.parametrize("reference", ["first", "running"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("head_dim", "q_stages"), [(64, 2), (128, 2), (128, 1), (256, 1)])
def test_outputs_staged_in_v(poisoned: None, head_dim: int, q_stages: int, mask: Any, reference: str) -> None:
    tiles = {"q": 128, "kv": 80, "schedule": {"reference": reference, "o_buffer": "v", "q_stages": q_stages}}
    case = Case(head_dim, head_dim, heads_kv=4, group=2, mask=mask, batch=3, tiles=tiles)
    for seqlen_q, seqlen_kv in ((1, 1), (77, 300), (700, 650), (1500, 1500), (130, 2900), (900, 333)):
        shaped = replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        run(shaped)
        run(shaped, longer_keys=0.003)


@pytest.mark.parametrize("reference", ["first", "running"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_more_buffers_of_v_than_of_k(poisoned: None, mask: Any, reference: str) -> None:
    schedule = {"reference": reference, "o_buffer": "v", "q_stages": 1, "extra_v_stages": 1}
    tiles = {"q": 128, "kv": 64, "stages": 2, "schedule": schedule}
    case = Case(256, 256, heads_kv=4, group=2, mask=mask, batch=3, tiles=tiles)
    for seqlen_q, seqlen_kv in ((1, 1), (77, 300), (700, 650), (1500, 1500), (130, 2900), (900, 333)):
        shaped = replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        run(shaped)
        run(shaped, longer_keys=0.003)


@pytest.mark.parametrize("reference", ["first", "running"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("head_dims", "kv", "o_buffer"),
    [((64, 64), 128, "own"), ((128, 128), 96, "q"), ((192, 128), 96, "v"), ((256, 256), 64, "v")],
)
def test_clusters(
    poisoned: None, head_dims: tuple[int, int], kv: int, o_buffer: str, mask: Any, reference: str
) -> None:
    """A tile that one block does not keep is repeated by both."""
    schedule = {"reference": reference, "cluster": 2, "o_buffer": o_buffer, "q_stages": 1}
    case = Case(
        *head_dims, heads_kv=4, group=2, mask=mask, batch=3, tiles={"q": 128, "kv": kv, "schedule": schedule}
    )
    for seqlen_q, seqlen_kv in ((1, 1), (77, 300), (700, 650), (1500, 1500), (130, 2900), (900, 333)):
        shaped = replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        run(shaped)
        run(shaped, longer_keys=0.003)


@pytest.mark.parametrize("reference", ["first", "running"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("head_dims", "kv", "steps"),
    [((40, 72), 96, 3), ((64, 64), 128, 4), ((192, 128), 96, 5), ((256, 256), 64, 4)],
)
def test_steps_of_q_in_registers(
    poisoned: None, head_dims: tuple[int, int], kv: int, steps: int, mask: Any, reference: str
) -> None:
    tiles = {"q": 128, "kv": kv, "schedule": {"reference": reference, "q_register_steps": steps}}
    case = Case(*head_dims, heads_kv=4, group=2, mask=mask, batch=3, tiles=tiles)
    for seqlen_q, seqlen_kv in ((1, 1), (77, 300), (700, 650), (1500, 1500), (130, 2900), (900, 333)):
        shaped = replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        run(shaped)
        run(shaped, longer_keys=0.003)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_that_blocks_share(poisoned: None, head_dim: int) -> None:
    """A part that leaves the range has the whole tile repeated, by the block that began it."""
    tiles = schedules(tile_order="stream_k")
    case = Case(head_dim, head_dim, heads_kv=5, mask="full", batch=2, tiles=tiles)
    for seqlen_q, seqlen_kv in ((333, 2777), (100, 9000), (2000, 1500)):
        for share in (0.0, 0.003, 0.3):
            run(replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv), longer_keys=share)


@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.parametrize("tile_order", ["static", "dynamic"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_that_leave_the_range_are_repeated(
    poisoned: None, head_dim: int, mask: Any, tile_order: str, order: str
) -> None:
    """Some keys are so long that their scores lie hundreds above the others', in some of the batches."""
    tiles = schedules(tile_order=tile_order, key_order=order)
    case = Case(head_dim, head_dim, heads_kv=8, mask=mask, batch=4, tiles=tiles)
    for seqlen_q, seqlen_kv in ((1100, 1100), (300, 2000)):
        for share in (0.003, 0.3):
            run(replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv), longer_keys=share)


@pytest.mark.parametrize(
    ("mask", "tiles"),
    [("causal", FIRST), ("full", schedules(tile_order="stream_k"))],
    ids=["causal", "shared"],
)
def test_repeated_runs_are_bitwise_equal(mask: str, tiles: dict[str, Any]) -> None:
    case = Case(128, 128, heads_kv=16, mask=mask, batch=4, seqlen_q=2000, seqlen_kv=2000, tiles=tiles)
    q, k, v = case.tensors("cuda")
    k[1, ::100] *= 100
    kernel = kernel_of(case, "sm90")
    o, lse = kernel(q, k, v, return_lse=True)
    for _ in range(200):
        again, lse_again = kernel(q, k, v, return_lse=True)
        assert torch.equal(again, o) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e38])
def test_values_that_are_not_finite_come_out_as_they_would(poisoned: None, value: float) -> None:
    case = Case(128, 128, heads_kv=4, mask="causal", batch=2, seqlen_q=1000, seqlen_kv=1000, tiles=FIRST)
    q, k, v = case.tensors("cuda")
    v[0, 100, 1, 5] = value
    o = kernel_of(case, "sm90")(q, k, v)
    expected = kernel_of(replace(case, tiles="auto"), "sm90")(q, k, v)
    torch.testing.assert_close(o, expected, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("cap", [1, 20, 50])
@pytest.mark.parametrize("mask", MASKS[:3], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_capped_scores(poisoned: None, head_dim: int, mask: Any, cap: int) -> None:
    case = Case(head_dim, head_dim, heads_kv=4, mask=mask, score=f"softcap({cap})", batch=2, tiles=FIRST)
    for seqlen_q, seqlen_kv in ((77, 300), (1500, 1500), (900, 333)):
        shaped = replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        run(shaped)
        run(shaped, longer_keys=0.01)


@pytest.mark.parametrize("score", ["relative_bias", "alibi", "dense_bias", "t5_encoder_bias"])
@pytest.mark.parametrize("order", ["descending", "ascending"])
@pytest.mark.parametrize("mask", MASKS[:3], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scores_of_elements(poisoned: None, head_dim: int, mask: Any, order: str, score: str) -> None:
    tiles = schedules(key_order=order)
    case = Case(head_dim, head_dim, heads_kv=2, group=2, mask=mask, score=score, batch=2, tiles=tiles)
    for seqlen_q, seqlen_kv in ((77, 300), (1500, 1500), (900, 333)):
        shaped = replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        run(shaped)
        run(shaped, longer_keys=0.01)


def test_sinks(poisoned: None) -> None:
    case = Case(64, 64, heads_kv=4, mask="causal", sink=True, seqlen_q=900, seqlen_kv=900, tiles=FIRST)
    run(case)
    run(case, longer_keys=0.01)


def run(case: Case, longer_keys: float = 0.0) -> None:
    q, k, v = case.tensors("cuda")
    if longer_keys:
        chosen = torch.rand(k.shape[:2], generator=torch.Generator().manual_seed(1)) < longer_keys
        chosen[::2] = False
        k[chosen.to("cuda")] *= 100
    given = case.given("cuda")
    o, lse = kernel_of(case, "sm90")(q, k, v, return_lse=True, **given)
    finish(case, "sm90")
    assert_exact(case, o, lse, q, k, v, **given)
