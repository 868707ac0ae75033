"""Streams, graphs, devices, torch.compile and host time on a real GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from attention_cases import GALLERY_CASES, Case, assert_exact
from gpu_kernels import kernel_of
from torch import Tensor

import flashgen
from flashgen.errors import LaunchError
from flashgen.runtime import load

pytestmark = pytest.mark.gpu

CASE = Case(128, 128, heads_kv=4, group=2, mask="causal", batch=2, seqlen_q=700, seqlen_kv=700)


def test_runs_on_the_current_stream(family: str) -> None:
    """Behind a kernel that keeps the stream busy, inputs are read only after they were written."""
    kernel = kernel_of(CASE, family)
    q, k, v = CASE.tensors("cuda")
    expected = kernel(q, k, v)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        o = kernel(late, k, v)
    assert not stream.query(), "the launch waited for the GPU"
    stream.synchronize()
    assert torch.equal(o, expected)


def test_streams_side_by_side(family: str) -> None:
    kernel = kernel_of(CASE, family)
    q, k, v = CASE.tensors("cuda")
    expected = kernel(q, k, v)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    outputs = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(kernel(q, k, v))
    torch.cuda.synchronize()
    assert all(torch.equal(o, expected) for o in outputs)


def test_threads_share_a_kernel(family: str) -> None:
    kernel = kernel_of(CASE, family)
    inputs = [replace(CASE, seed=seed).tensors("cuda") for seed in range(4)]
    expected = [kernel(*tensors) for tensors in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                o = kernel(*inputs[index])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(o, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_has_not_used_the_gpu(family: str) -> None:
    """It has no CUDA context until some call makes one current; torch's cached allocations do not."""
    kernel = kernel_of(CASE, family)
    q, k, v = CASE.tensors("cuda")
    expected = kernel(q, k, v)
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(kernel(q, k, v)))
    del expected
    thread.start()
    thread.join()
    assert torch.equal(results[0], kernel(q, k, v))


def test_graph_is_captured_and_replayed(family: str) -> None:
    kernel = kernel_of(CASE, family)
    q, k, v = CASE.tensors("cuda")
    kernel(q, k, v)  # loads the module, which a capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = kernel(q, k, v, return_lse=True)
        twice = kernel(o, k, v)
    for seed in (1, 2, 3):
        for tensor, values in zip((q, k, v), replace(CASE, seed=seed).tensors("cuda"), strict=True):
            tensor.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        assert_exact(CASE, o, lse, q, k, v)
        assert torch.equal(twice, kernel(o, k, v))


def test_loading_during_a_capture_is_an_error() -> None:
    kernel = load(replace(CASE, head_dim_qk=24, head_dim_v=24).spec())
    q, k, v = replace(CASE, head_dim_qk=24, head_dim_v=24).tensors("cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(LaunchError, match="call it once before the capture"), torch.cuda.graph(graph):
        kernel(q, k, v)


def test_another_device_than_the_current_one(family: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    kernel = kernel_of(CASE, family)
    with torch.cuda.device(0):
        for index in (1, 0, 1):
            q, k, v = CASE.tensors(f"cuda:{index}")
            o, lse = kernel(q, k, v, return_lse=True)
            assert o.device.index == lse.device.index == index
            assert_exact(CASE, o, lse, q, k, v)
            assert torch.cuda.current_device() == 0
    with pytest.raises(LaunchError, match="k is on cuda:0, q is on cuda:1"):
        kernel(q, k.to("cuda:0"), v)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(family: str, backend: str) -> None:
    kernel = kernel_of(CASE, family)
    q, k, v = CASE.tensors("cuda")
    compiled = torch.compile(lambda q, k, v: kernel(q, k, v) * 2, fullgraph=True, backend=backend)
    assert torch.equal(compiled(q, k, v), kernel(q, k, v) * 2)
    compiled = torch.compile(
        lambda q, k, v: flashgen.attention(q, k, v, causal=True), fullgraph=True, backend=backend
    )
    assert torch.equal(compiled(q, k, v), flashgen.attention(q, k, v, causal=True))


def test_opcheck(family: str) -> None:
    kernel = kernel_of(CASE, family)
    arguments = (*CASE.tensors("cuda"), None, kernel.key, True, [], [], None, [])
    torch.library.opcheck(torch.ops.flashgen.forward.default, arguments)


def test_both_ways_to_the_kernel_agree(family: str) -> None:
    kernel = kernel_of(CASE, family)
    q, k, v = CASE.tensors("cuda")
    through_the_dispatcher, _ = torch.ops.flashgen.forward(q, k, v, None, kernel.key, False, [], [], None, [])
    assert torch.equal(kernel(q, k, v), through_the_dispatcher)


def test_needed_gradient_is_an_error(family: str) -> None:
    q, k, v = CASE.tensors("cuda")
    with pytest.raises(LaunchError, match="no backward"):
        kernel_of(CASE, family)(q.requires_grad_(), k, v)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 100}], ids=str)
def test_attention_is_exact(options: dict[str, Any]) -> None:
    mask = {"window": 100} if "window" in options else "causal" if options else "full"
    for length in (1, 100, 1000, 3000):
        case = replace(CASE, mask=mask, seqlen_q=length, seqlen_kv=length)
        q, k, v = case.tensors("cuda")
        assert_exact(case, *flashgen.attention(q, k, v, return_lse=True, **options), q, k, v)


# -- host time ---------------------------------------------------------------------------------------------


def _host_us(call: Callable[[], object]) -> float:
    """Microseconds of host time per call: the median of batches short enough for the launch queue, over long
    enough that a process which starts beside them is not all of it.
    """
    batch = 50
    times = []
    for _ in range(400):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(batch):
            call()
        times.append((time.perf_counter() - started) / batch * 1e6)
    return median(times)


@pytest.fixture
def small() -> tuple[Tensor, Tensor, Tensor]:
    """So small that the GPU never makes the host wait."""
    return Case(128, 128, heads_kv=2, mask="causal", seqlen_q=64, seqlen_kv=64).tensors("cuda")


@pytest.mark.alone
def test_host_time_of_a_loaded_op(family: str, small: tuple[Tensor, ...]) -> None:
    kernel = kernel_of(Case(128, 128, heads_kv=2, mask="causal"), family)
    kernel(*small)
    spent = _host_us(lambda: kernel(*small))
    spent_lse = _host_us(lambda: kernel(*small, return_lse=True))
    print(f"\nhost time, {family}: {spent:.1f} us; with lse {spent_lse:.1f} us")
    assert spent < 15


@pytest.mark.alone
def test_host_time_when_addresses_change(family: str) -> None:
    """As in a model: no tensor stays where it was."""
    case = Case(128, 128, heads_kv=2, mask="causal", seqlen_q=64, seqlen_kv=64)
    kernel = kernel_of(case, family)
    sets = [case.tensors("cuda") for _ in range(64)]
    kernel(*sets[0])
    turn = iter(range(10**9))
    spent = _host_us(lambda: kernel(*sets[next(turn) % 64]))
    print(f"\nhost time, {family}, other addresses each time: {spent:.1f} us")
    assert spent < 15


@pytest.mark.alone
@pytest.mark.parametrize("name", ["alibi", "causal document", "runtime cap", "runtime step"])
def test_host_time_with_inputs(family: str, name: str) -> None:
    """Tensors, parameters and the launch that prepares; what it costs is printed, and bounded loosely."""
    case = Case(128, 128, heads_kv=2, seqlen_q=64, seqlen_kv=64, **GALLERY_CASES[name])
    kernel, qkv, given = kernel_of(case, family), case.tensors("cuda"), case.given("cuda")
    kernel(*qkv, **given)
    spent = _host_us(lambda: kernel(*qkv, **given))
    prepared = kernel.prepare(*qkv, **given)
    spent_prepared = _host_us(lambda: kernel(*qkv, prepared=prepared, **given))
    print(f"\nhost time, {family}, {name}: {spent:.1f} us; prepared beforehand {spent_prepared:.1f} us")
    assert spent < 60


@pytest.mark.alone
def test_host_time_of_attention(small: tuple[Tensor, ...]) -> None:
    flashgen.attention(*small, causal=True)
    spent = _host_us(lambda: flashgen.attention(*small, causal=True))
    print(f"\nhost time of flashgen.attention: {spent:.1f} us")
    assert spent < 25
