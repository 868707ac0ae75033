"""What shows only over many launches: hangs, and results that depend on timing."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_exact
from gpu_kernels import finish, kernel_of
from torch import Tensor

from flashgen.runtime.arguments import DTYPES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

HEAD_DIMS = (
    (8, 8), (40, 40), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (160, 160), (192, 128), (192, 192),
    (248, 248), (256, 256),
)  # fmt: skip
CLUSTERED = ((64, 64), (128, 128), (192, 128), (256, 256))
CLUSTERS = {"q": 128, "schedule": {"cluster": 2, "reference": "first", "o_buffer": "v", "q_stages": 1}}
KINDS: tuple[dict[str, Any], ...] = (
    {"mask": "full", "dtype": "bf16"},
    {"mask": "causal", "dtype": "bf16", "group": 2},
    {"mask": {"window": 64}, "dtype": "fp16"},
)
LAUNCHES = 12  # of each kind
LONGEST = 300


def _lengths(seed: int) -> list[int]:
    """One length for each launch of `HEAD_DIMS` x `KINDS`, each of 1..300 at least once."""
    launches = len(HEAD_DIMS) * len(KINDS) * LAUNCHES
    assert launches >= LONGEST
    rng = random.Random(seed)
    return [length for _ in range(2) for length in rng.sample(range(1, LONGEST + 1), LONGEST)][:launches]


SEQLENS_Q, SEQLENS_KV = _lengths(0), _lengths(100)


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_every_launch_ends(family: str, head_dims: tuple[int, int]) -> None:
    """Barriers that wait for a phase that never comes hang at some lengths only."""
    _launch_at_lengths(head_dims, family)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dims", CLUSTERED, ids=str)
def test_every_launch_of_clusters_ends(head_dims: tuple[int, int]) -> None:
    _launch_at_lengths(head_dims, "sm90", tiles=CLUSTERS)


def _launch_at_lengths(head_dims: tuple[int, int], family: str, **parts: Any) -> None:
    start = HEAD_DIMS.index(head_dims) * len(KINDS) * LAUNCHES
    for number in range(len(KINDS) * LAUNCHES):
        case = Case(
            *head_dims,
            heads_kv=2,
            batch=2,
            seqlen_q=SEQLENS_Q[start + number],
            seqlen_kv=SEQLENS_KV[start + number],
            seed=number,
            **KINDS[number % len(KINDS)],
            **parts,
        )
        q, k, v = case.tensors("cuda")
        o, lse = kernel_of(case, family)(q, k, v, return_lse=True)
        finish(case, family)
        assert_exact(case, o, lse, q, k, v)


RACING = (
    Case(64, 64, heads_kv=2, mask="full"),
    Case(128, 128, heads_kv=2, group=2, mask="causal"),
    Case(192, 128, heads_kv=3, mask="causal", dtype="fp16"),
    Case(256, 256, heads_kv=2, mask={"window": 200}),
)
REPEATS = 20  # of the same inputs


def test_results_do_not_depend_on_timing(family: str) -> None:
    """$FLASHGEN_RACE_LAUNCHES (2,000) launches of random shapes, on two streams at once: all runs of the same
    inputs agree bit by bit. Shapes from seed $FLASHGEN_FUZZ_SEED (0).
    """
    _race(RACING, family)


@pytest.mark.usefixtures("hopper")
def test_clusters_do_not_depend_on_timing() -> None:
    """The same, where both blocks of a cluster repeat what one of them does not keep."""
    causal = [Case(*dims, heads_kv=2, mask="causal", tiles=CLUSTERS) for dims in CLUSTERED]
    _race([*causal, *(replace(case, mask="full") for case in causal)], "sm90", longer_keys=0.003)


def _race(cases: Sequence[Case], family: str, longer_keys: float = 0.0) -> None:
    launches = int(os.environ.get("FLASHGEN_RACE_LAUNCHES", "2000"))
    rng = random.Random(int(os.environ.get("FLASHGEN_FUZZ_SEED", "0")))
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    done = 0
    while done < launches:
        drawn = replace(
            rng.choice(cases),
            batch=rng.randint(1, 4),
            heads_kv=rng.randint(1, 6),
            seqlen_q=rng.randint(1, 1500),
            seqlen_kv=rng.randint(1, 1500),
            seed=done,
        )
        q, k, v = _inputs(drawn)
        seeded = torch.Generator("cuda").manual_seed(done)
        k[torch.rand(k.shape[:2], generator=seeded, device="cuda") < longer_keys] *= 100
        kernel = kernel_of(drawn, family)
        expected = _bits(kernel(q, k, v, return_lse=True))
        finish(drawn, family)
        differing = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in streams]
        torch.cuda.synchronize()
        repeats = min(REPEATS, launches - done)
        for number in range(repeats):
            with torch.cuda.stream(streams[number % 2]):
                for bits, first in zip(_bits(kernel(q, k, v, return_lse=True)), expected, strict=True):
                    differing[number % 2] |= (bits != first).any()
        for stream in streams:
            with torch.cuda.stream(stream):
                finish(drawn, family)
        assert not any(differing), f"runs of the same inputs differ: {drawn}"
        done += repeats
    print(f"\nraces: {family}, {done} launches")


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """As `Case.tensors`, but drawn on the GPU, which takes no time."""
    generator = torch.Generator("cuda").manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DTYPES[case.dtype], device="cuda")

    return (
        normal(case.batch, case.seqlen_q, case.heads_kv * case.group, case.head_dim_qk),
        normal(case.batch, case.seqlen_kv, case.heads_kv, case.head_dim_qk),
        normal(case.batch, case.seqlen_kv, case.heads_kv, case.head_dim_v),
    )


def _bits(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Integers with the same bits: NaN differs from itself, and 0 does not from -0."""
    o, lse = outputs
    return o.view(torch.int16), lse.view(torch.int32)
