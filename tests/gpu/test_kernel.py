"""The kernels against float64: the same grid as the interpreter's, with poisoned outputs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import CASES, HEAD_DIMS, LAYOUTS, LENGTHS, MASKS, Case, assert_exact, random_case
from gpu_kernels import kernel_of
from hypothesis import HealthCheck, given, settings

from flashgen.runtime import interpret, reference, same_precision, tolerance
from flashgen.runtime.devices import target_of

Check = Callable[[Case], None]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [("full", "bf16"), ("causal", "bf16"), ({"window": 64}, "bf16"), ("causal", "fp16")],
    ids=str,
)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_and_dtypes(check: Check, head_dim: int, dtype: str, mask: Any) -> None:
    case = Case(head_dim, head_dim, heads_kv=2, dtype=dtype, mask=mask, batch=2, seqlen_q=333, seqlen_kv=333)
    check(case)
    check(replace(case, seqlen_q=130, seqlen_kv=515))
    check(replace(case, seqlen_q=515, seqlen_kv=130))


@pytest.mark.parametrize(
    ("head_dim_qk", "head_dim_v"), [(192, 128), (64, 128), (128, 64), (40, 256), (256, 8)]
)
def test_head_dims_that_differ(check: Check, head_dim_qk: int, head_dim_v: int) -> None:
    check(Case(head_dim_qk, head_dim_v, heads_kv=2, group=2, mask="causal", seqlen_q=300, seqlen_kv=400))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 71])
def test_grouped_heads(check: Check, group: int) -> None:
    check(Case(heads_kv=2, group=group, mask="causal", batch=2, seqlen_q=200, seqlen_kv=264))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_every_length_near_a_tiles_edge(check: Check, align: str, mask: Any) -> None:
    for seqlen_q in LENGTHS:
        for seqlen_kv in LENGTHS:
            check(Case(mask=mask, align=align, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv))


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv", "batch"), [(0, 5, 1), (5, 0, 2), (5, 5, 0), (0, 0, 1)])
def test_nothing_to_compute(check: Check, seqlen_q: int, seqlen_kv: int, batch: int) -> None:
    check(Case(mask="causal", batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(check: Check, layout: str) -> None:
    check(Case(heads_kv=2, group=2, mask="causal", batch=2, seqlen_q=200, seqlen_kv=300, layout=layout))


@pytest.mark.parametrize("seqlen", [4096, 8192])
def test_long_sequences(check: Check, seqlen: int) -> None:
    for head_dim, mask in ((64, "full"), (128, "causal"), (256, {"window": 1000})):
        check(Case(head_dim, head_dim, heads_kv=2, mask=mask, seqlen_q=seqlen, seqlen_kv=seqlen))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES)
def test_error_is_at_most_twice_the_textbooks(check: Check, case: Case) -> None:
    check(case)


def test_random_specs_and_shapes(check: Check) -> None:
    """For $FLASHGEN_FUZZ_SECONDS (20), from seed $FLASHGEN_FUZZ_SEED (the time), which is printed."""
    seconds = float(os.environ.get("FLASHGEN_FUZZ_SECONDS", "20"))
    first = int(os.environ.get("FLASHGEN_FUZZ_SEED", time.time_ns() // 1_000_000 % 10**9))
    stop, seed = time.monotonic() + seconds, first
    while time.monotonic() < stop or seed == first:
        try:
            check(random_case(seed))
        except Exception:
            print(f"\nfuzz: seed {seed} fails; FLASHGEN_FUZZ_SEED={seed} starts with it")
            raise
        seed += 1
    print(f"\nfuzz: seeds {first} to {seed - 1}, {seed - first} cases")


def test_repeated_runs_are_bitwise_equal(family: str) -> None:
    case = Case(128, 128, heads_kv=4, group=2, mask="causal", batch=2, seqlen_q=1500, seqlen_kv=1500)
    q, k, v = case.tensors("cuda")
    kernel = kernel_of(case, family)
    o, lse = kernel(q, k, v, return_lse=True)
    for _ in range(200):
        again, lse_again = kernel(q, k, v, return_lse=True)
        assert torch.equal(again, o) and torch.equal(lse_again, lse)


def test_scale_of_a_call(family: str) -> None:
    case = Case(mask="causal", heads_kv=2, seqlen_q=200, seqlen_kv=200)
    q, k, v = case.tensors("cuda")
    o = kernel_of(case, family)(q, k, v, scale=0.05)
    expected, _ = reference(case.spec(), q, k, v, scale=0.05)
    allowed = tolerance(expected, same_precision(case.spec(), q, k, v, scale=0.05)[0])
    assert (o.double() - expected).abs().max() <= allowed


def test_interpreter_and_kernel_agree(family: str) -> None:
    """The same plan: they differ by the order of sums and the rounding of exp2, not by a tile."""
    case = Case(128, 128, heads_kv=2, mask={"window": 200}, seqlen_q=700, seqlen_kv=900)
    q, k, v = case.tensors("cuda")
    kernel = kernel_of(case, family)
    plan = kernel.plan_for(target_of(q.device))
    o, lse = kernel(q, k, v, return_lse=True)
    expected, expected_lse = interpret(plan, q.cpu(), k.cpu(), v.cpu())
    torch.testing.assert_close(o.cpu(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-5, atol=1e-5)


# -- more than 2^31 elements -------------------------------------------------------------------------------


def _needs_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory; {free / 1e9:.1f} GB are free")


def test_batches_past_2_to_the_31_elements(family: str) -> None:
    _needs_memory(45)
    case = Case(128, 128, heads_kv=16, mask="causal", batch=1040, seqlen_q=1024, seqlen_kv=1024)
    shape = (case.batch, case.seqlen_q, case.heads_kv, 128)
    assert case.batch * case.seqlen_q * case.heads_kv * 128 > 2**31
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    o, lse = kernel_of(case, family)(q, k, v, return_lse=True)
    for index in (0, 1023, 1024, 1039):
        batch = slice(index, index + 1)
        one = replace(case, batch=1)
        assert_exact(one, o[batch], lse[batch], q[batch], k[batch], v[batch])


def test_rows_past_2_to_the_31_elements(family: str) -> None:
    """One head, whose last rows lie more than 2^31 elements after its first."""
    _needs_memory(20)
    case = Case(64, 64, mask={"window": 64}, seqlen_q=2200, seqlen_kv=2200)
    row = 2**20
    dense = case.tensors("cuda")
    tensors = []
    for tensor in dense:
        sparse = torch.empty(case.seqlen_q * row, dtype=tensor.dtype, device="cuda")
        view = sparse.as_strided(tensor.shape, (0, row, 64, 1))
        view.copy_(tensor)
        tensors.append(view)
    assert tensors[0].stride(1) * (case.seqlen_q - 1) > 2**31
    o, lse = kernel_of(case, family)(*tensors, return_lse=True)
    assert_exact(case, o, lse, *dense)
