"""Masks and scores on the GPU: every entry of the gallery, and what it leaves out, against float64.

Outputs are poisoned. Each case runs at three pairs of odd lengths, grouped heads, two batches; the last pair
has more queries than keys, so that under causal masks whole rows have no key.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import GALLERY_CASES, Case, assert_exact
from gpu_kernels import finish, kernel_of
from torch import Tensor

import flashgen
from flashgen.runtime import Kernel
from flashgen.runtime.devices import target_of
from flashgen.runtime.elements import Elements
from flashgen.runtime.inputs import Declarations, Sizes, arrange
from flashgen.runtime.preparation import prepared_in_torch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

LENGTHS = ((333, 333), (129, 515), (300, 77))
PREPARED = [
    "document", "causal document", "document of a prefix", "natten_2d", "dilated", "runtime step",
    "keys left out", "pairs left out", "documents out of order", "rows without keys",
]  # fmt: skip


def case_of(name: str, head_dim: int = 64, **changes: Any) -> Case:
    sizes = {"heads_kv": 2, "group": 2, "batch": 2, "seqlen_q": 333, "seqlen_kv": 333}
    return Case(head_dim, head_dim, **{**sizes, **GALLERY_CASES[name], **changes})


def run(kernel: Kernel, case: Case, family: str, **given: Any) -> tuple[Tensor, Tensor]:
    q, k, v = case.tensors("cuda")
    o, lse = kernel(q, k, v, return_lse=True, **given)
    finish(case, family)
    given.pop("prepared", None)
    assert_exact(case, o, lse, q, k, v, **given)
    return o, lse


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", GALLERY_CASES)
def test_gallery(family: str, name: str, head_dim: int) -> None:
    case = case_of(name, head_dim)
    kernel = kernel_of(case, family)
    for seqlen_q, seqlen_kv in LENGTHS:
        shaped = replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        run(kernel, shaped, family, **shaped.given("cuda"))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "causal", {"window": 100}, "window(40) or kv < 4"])
@pytest.mark.parametrize("score", ["relative_bias", "t5_bias", "t5_encoder_bias"])
def test_distance_terms_beside_the_products(hopper: None, score: str, mask: Any, head_dim: int) -> None:
    tiles = {"schedule": {"distance_terms": "early"}}
    case = case_of("full", head_dim, mask=mask, score=score, tiles=tiles)
    kernel = kernel_of(case, "sm90")
    for seqlen_q, seqlen_kv in LENGTHS:
        shaped = replace(case, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        run(kernel, shaped, "sm90", **shaped.given("cuda"))


@pytest.mark.parametrize(
    "name", ["alibi", "document", "natten_2d", "relative_bias", "sink_window", "padded causal"]
)
def test_every_length_near_a_tiles_edge(family: str, name: str) -> None:
    kernel = kernel_of(case_of(name), family)
    for seqlen_q in (1, 63, 64, 65, 128, 129):
        for seqlen_kv in (1, 16, 63, 64, 65, 127, 128, 129, 257):
            case = case_of(name, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, batch=1)
            run(kernel, case, family, **case.given("cuda"))


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("name", ["document", "natten_2d", "alibi", "sink"])
def test_without_queries_or_keys(family: str, name: str, lengths: tuple[int, int]) -> None:
    case = case_of(name, seqlen_q=lengths[0], seqlen_kv=lengths[1])
    run(kernel_of(case, family), case, family, **case.given("cuda"))


@pytest.mark.parametrize(
    "name", ["two bands", "document", "keys left out", "alibi", "dense_bias", "rows without keys"]
)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_long_sequences(family: str, name: str, align: str) -> None:
    case = case_of(name, 128, align=align, seqlen_q=2500, seqlen_kv=3100, batch=2, dtype="fp16")
    run(kernel_of(case, family), case, family, **case.given("cuda"))


# -- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameter", "values"),
    [
        ("runtime window", "size", (1, 2, 17, 64, 1000)),
        ("runtime prefix", "prefix", (0, 1, 65, 333, 10_000)),
        ("runtime step", "step", (1, 2, 5, 400)),
        ("runtime cap", "cap", (0.5, 5.0, 50.0)),
    ],
)
def test_parameters_change_between_calls(
    family: str, name: str, parameter: str, values: tuple[float, ...]
) -> None:
    case = case_of(name, 128)
    kernel = kernel_of(case, family)
    target = target_of(torch.device("cuda", 0))
    for value in (*values, values[0]):
        run(kernel, case, family, params={parameter: value})
        cubin = kernel.cubin_for(target)
    assert kernel.cubin_for(target) is cubin


# -- preparation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_what_is_prepared_is_what_follows_from_the_definition(
    family: str, name: str, lengths: tuple[int, int]
) -> None:
    """Ranges may differ where a row is empty; lists of tiles may not differ at all."""
    case = case_of(name, 128, seqlen_q=lengths[0], seqlen_kv=lengths[1])
    kernel = kernel_of(case, family)
    q, k, v = case.tensors("cuda")
    given = case.given("cuda")
    first, second = kernel.prepare(q, k, v, **given).tensors
    plan = kernel.plan_for(target_of(q.device))
    declared, sizes = Declarations.of(plan), Sizes.of(q, k, plan.align)
    inputs = arrange(declared, **given, name=name)
    elements = Elements(declared, inputs, sizes, scale=plan.scale, real=torch.float32, device=q.device)
    expected_first, expected_second = prepared_in_torch(plan, elements)
    if plan.preparation == "ranges":
        some = expected_first <= expected_second
        assert torch.equal(first <= second, some)
        assert torch.equal(first[some], expected_first[some])
        assert torch.equal(second[some], expected_second[some])
        return
    assert torch.equal(first, expected_first)
    listed = torch.arange(second.shape[-1], device="cuda") < first[..., None]
    assert torch.equal(second[listed], expected_second[listed])


@pytest.mark.parametrize("name", PREPARED)
def test_prepared_once_for_many_calls(family: str, name: str) -> None:
    case = case_of(name, 64)
    kernel = kernel_of(case, family)
    q, k, v = case.tensors("cuda")
    given = case.given("cuda")
    prepared = kernel.prepare(q, k, v, **given)
    expected, _ = run(kernel, case, family, **given)
    for _ in range(3):
        assert torch.equal(run(kernel, case, family, prepared=prepared, **given)[0], expected)


def test_tensors_that_change_are_read_anew(family: str) -> None:
    """The same memory, other documents: nothing of the first call may linger."""
    case = case_of("document", 64)
    kernel = kernel_of(case, family)
    given = case.given("cuda")
    for shift in (0, 7, 0):
        given["tensors"]["doc"].copy_((torch.arange(333, device="cuda") + shift) // 50)
        run(kernel, case, family, **given)


def test_kept_maps_belong_to_their_stream(family: str) -> None:
    case = case_of("runtime step", 64)
    kernel = kernel_of(case, family)
    q, k, v = case.tensors("cuda")
    expected = {step: kernel(q, k, v, params={"step": step}) for step in (1, 2, 3)}
    torch.cuda.synchronize()
    for _ in range(20):
        for step in (1, 2, 3):
            with torch.cuda.stream(torch.cuda.Stream()):
                o = kernel(q, k, v, params={"step": step})
                torch.cuda.current_stream().synchronize()
            assert torch.equal(o, expected[step])


@pytest.mark.parametrize(
    "name", ["causal document", "runtime step", "alibi", "padded causal", "keys left out"]
)
@pytest.mark.parametrize("beforehand", [False, True])
def test_graphs_are_replayed_on_other_values(family: str, name: str, beforehand: bool) -> None:
    case = case_of(name, 64)
    kernel = kernel_of(case, family)
    q, k, v = case.tensors("cuda")
    given = case.given("cuda")
    kernel(q, k, v, **given)
    prepared = kernel.prepare(q, k, v, **given) if beforehand else None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = kernel(q, k, v, return_lse=True, prepared=prepared, **given)
    for seed in (1, 2):
        for tensor, values in zip((q, k, v), replace(case, seed=seed).tensors("cuda"), strict=True):
            tensor.copy_(values)
        for tensor in given["tensors"].values():
            # What was prepared beforehand stays as it was, and documents stay in order.
            if not beforehand and tensor.dtype != torch.int32:
                tensor.copy_(tensor.flip(0))
        graph.replay()
        finish(case, family)
        assert_exact(case, o, lse, q, k, v, **given)


# -- layouts of inputs -------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda bias: bias,
    "one for all heads": lambda bias: bias[:1].expand(bias.shape),
    "one for all rows": lambda bias: bias[:, :1].expand(bias.shape),
    "one for all keys": lambda bias: bias[:, :, :1].expand(bias.shape),
    "keys first": lambda bias: bias.mT.contiguous().mT,
    "rows first": lambda bias: bias.transpose(0, 1).contiguous().transpose(0, 1),
    "every other key": lambda bias: bias.repeat_interleave(2, 2)[:, :, ::2],
    "within a larger one": lambda bias: torch.nn.functional.pad(bias, (1, 2, 3, 4))[:, 3:-4, 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["causal", "kv <= q and bias[head, q, kv] > -0.5"], ids=["score", "mask"])
def test_layouts_of_a_bias(family: str, layout: str, mask: str) -> None:
    declared = {"bias": {"index": ["head", "q", "kv"], "dtype": "bf16"}}
    case = case_of("dense_bias", 64, mask=mask, inputs=declared, seqlen_q=130, seqlen_kv=217)
    bias = LAYOUTS[layout](case.given("cuda")["tensors"]["bias"])
    run(kernel_of(case, family), case, family, tensors={"bias": bias})


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_biases_of_any_alignment(family: str, dtype: str) -> None:
    """Neighbouring columns are one load where the address allows it; where it does not, that would fault."""
    case = case_of("dense_bias", 64, inputs={"bias": {"index": ["q", "kv"], "dtype": dtype}})
    rows, columns = case.seqlen_q, case.seqlen_kv
    for start in range(4):
        for gap in range(4):
            whole = torch.randn(rows, columns + 8, device="cuda").to(
                torch.float32 if dtype == "fp32" else torch.bfloat16
            )
            bias = whole.reshape(-1).as_strided((rows, columns), (columns + gap, 1), start)
            run(kernel_of(case, family), case, family, tensors={"bias": bias})


def test_layouts_of_a_sink(family: str) -> None:
    case = case_of("sink", 64)
    layers = torch.randn(4, 3, device="cuda")
    for sink in (layers[:, 1], layers[:1, 0].expand(4)):
        run(kernel_of(case, family), case, family, sink=sink)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int32", "bool"])
def test_dtypes_of_a_tensor(family: str, dtype: str) -> None:
    score = "score + where(pair, 1, -1)" if dtype == "bool" else "score + pair / 100"
    pair = {"pair": {"index": ["batch", "head_kv", "q", "kv"], "dtype": dtype}}
    case = case_of("causal", 64, score=score, inputs=pair)
    run(kernel_of(case, family), case, family, **case.given("cuda"))


def test_subscripts_outside_of_their_axis(family: str) -> None:
    tables = {"table": {"index": ["head", 5], "dtype": "fp32"}, "left": {"index": ["q"], "dtype": "fp32"}}
    case = case_of("causal", 64, score="score + table[head, q - kv] + left[kv - 100]", inputs=tables)
    for lengths in LENGTHS:
        shaped = replace(case, seqlen_q=lengths[0], seqlen_kv=lengths[1])
        run(kernel_of(case, family), shaped, family, **shaped.given("cuda"))


# -- from Python -------------------------------------------------------------------------------------------


def test_attention_with_functions_and_tensors() -> None:
    case = case_of("alibi", 128)
    q, k, v = case.tensors("cuda")
    slope = case.given("cuda")["tensors"]["slope"]
    o, lse = flashgen.attention(
        q, k, v,
        mask=lambda q, kv: kv <= q,
        score=lambda score, q, kv, head, slope: score + slope[head] * (kv - q),
        tensors={"slope": slope},
        return_lse=True,
    )  # fmt: skip
    assert_exact(case, o, lse, q, k, v, tensors={"slope": slope})


@pytest.mark.parametrize(
    "name", ["natten_2d", "dilated", "document", "runtime step", "softcap", "sink", "padded causal"]
)
def test_attention_by_name(name: str) -> None:
    """With and without what is prepared beforehand; a map without inputs has nothing else to call for it."""
    case = case_of(name, 64)
    q, k, v = case.tensors("cuda")
    given = case.given("cuda")
    options = {name: value for name, value in given.items() if value is not None and len(value)}
    o, lse = flashgen.attention(q, k, v, mask=case.mask, score=case.score, return_lse=True, **options)
    assert_exact(case, o, lse, q, k, v, **given)
    prepared = flashgen.prepare(q, k, v, mask=case.mask, score=case.score, **options)
    again = flashgen.attention(q, k, v, mask=case.mask, score=case.score, prepared=prepared, **options)
    assert torch.equal(again, o)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["causal document", "runtime cap", "padded causal"])
def test_compiles_without_graph_breaks(family: str, name: str, backend: str) -> None:
    case = case_of(name, 64)
    kernel = kernel_of(case, family)
    q, k, v = case.tensors("cuda")
    given = case.given("cuda")
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: kernel(q, k, v, **given) * 2, fullgraph=True, backend=backend)
    assert torch.equal(compiled(q, k, v), kernel(q, k, v, **given) * 2)


@pytest.mark.parametrize("name", ["causal document", "dilated"])
def test_compiles_with_cuda_graphs(family: str, name: str) -> None:
    """The kernel is loaded, and its map made, while torch's allocator serves the graphs to be."""
    case = case_of(name, 104)  # of no other test, so that it is not loaded yet
    kernel = kernel_of(case, family)
    q, k, v = case.tensors("cuda")
    given = case.given("cuda")
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: kernel(q, k, v, **given) * 2, mode="reduce-overhead")
    outputs = [compiled(q, k, v).clone() for _ in range(5)]
    finish(case, family)
    expected = kernel(q, k, v, **given) * 2
    assert all(torch.equal(output, expected) for output in outputs)


def test_repeated_runs_are_bitwise_equal(family: str) -> None:
    for name in ("causal document", "natten_2d", "relative_bias", "window or first keys"):
        case = case_of(name, 128, seqlen_q=1000, seqlen_kv=1000)
        kernel = kernel_of(case, family)
        q, k, v = case.tensors("cuda")
        given = case.given("cuda")
        o = kernel(q, k, v, **given)
        for _ in range(50):
            assert torch.equal(kernel(q, k, v, **given), o), name
