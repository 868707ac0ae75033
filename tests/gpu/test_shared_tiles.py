"""Tiles that blocks share (`tile_order: stream_k`): sm90 only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, assert_exact
from gpu_kernels import finish, kernel_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

# Two buffers of Q with O in its own, one with O in it; keys upwards and downwards.
TILES = (
    (64, {"q": 192, "kv": 112, "schedule": {"tile_order": "stream_k", "o_buffer": "own"}}),
    (128, {"q": 128, "kv": 128, "schedule": {"tile_order": "stream_k", "q_stages": 2, "ping_pong": False}}),
    (128, {"q": 128, "kv": 64, "schedule": {"tile_order": "stream_k", "q_stages": 2, "o_buffer": "q"}}),
    (128, {"q": 64, "kv": 64, "schedule": {"tile_order": "stream_k", "p_in_registers": False}}),
    (256, {"q": 128, "kv": 80, "schedule": {"tile_order": "stream_k", "key_order": "ascending"}}),
)
CASES = [
    Case(head_dim, head_dim, heads_kv=heads, batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, tiles=tiles)
    for head_dim, tiles in TILES
    for heads, batch, seqlen_q, seqlen_kv in (
        (1, 1, 100, 9000),  # one tile for several blocks
        (5, 2, 333, 2777),  # fewer tiles than blocks
        (16, 2, 1100, 1500),  # whole waves, and shares of the rest
        (19, 7, 128, 9000),  # whole waves, and one tile in several parts
        (3, 1, 128, 130),  # nothing that would pay to be cut
    )
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"d{c.head_dim_qk}-{c.batch}x{c.heads_kv}-{c.seqlen_q}-{c.seqlen_kv}"
)
def test_shared_tiles(case: Case, poisoned: None) -> None:
    q, k, v = case.tensors("cuda")
    kernel = kernel_of(case, "sm90")
    o, lse = kernel(q, k, v, return_lse=True)
    finish(case, "sm90")
    assert_exact(case, o, lse, q, k, v)
    for _ in range(50):  # flags are left as they were found
        again, lse_again = kernel(q, k, v, return_lse=True)
        assert torch.equal(again, o) and torch.equal(lse_again, lse)


def test_scores_and_sinks(poisoned: None) -> None:
    for score in ("softcap(20)", "score + 0.1 * abs(q - kv)"):
        case = replace(CASES[6], score=score, sink=True)
        q, k, v = case.tensors("cuda")
        given = case.given("cuda")
        o, lse = kernel_of(case, "sm90")(q, k, v, return_lse=True, **given)
        finish(case, "sm90")
        assert_exact(case, o, lse, q, k, v, **given)


def test_streams_and_graphs_do_not_share_flags() -> None:
    case = CASES[6]
    kernel = kernel_of(case, "sm90")
    q, k, v = case.tensors("cuda")
    expected = kernel(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel(q, k, v)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(50):
        graph.replay()
        outputs = []
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(kernel(q, k, v))
        torch.cuda.synchronize()
        assert all(torch.equal(output, expected) for output in (captured, *outputs))
