"""Launches of masks and scores without a GPU: what is written into the struct, copied, prepared and kept."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import GALLERY_CASES, Case
from fake_driver import CASE, FakeDriver, sm80_plan, sm90_plan, with_mathematics
from poison import UNWRITTEN, poison

from flashgen.build import compile_source
from flashgen.codegen import render
from flashgen.errors import LaunchError
from flashgen.runtime.inputs import Declarations, Inputs, Sizes, arrange
from flashgen.runtime.preparation import prepared_shapes
from flashgen.runtime.structs import PREPARED, struct_of


def offsets_of(struct: type[ctypes.Structure], prefix: str = "", base: int = 0) -> Iterator[tuple[str, int]]:
    for name, kind in struct._fields_:  # type: ignore[misc]
        offset = base + getattr(struct, name).offset
        if not name.startswith("_"):
            yield f"{prefix}{name}", offset
        if name == "inputs":
            yield from offsets_of(kind, "inputs.", offset)


LAID_OUT = (
    None,
    "alibi",
    "dense_bias",
    "document",
    "rows and keys",
    "padded causal",
    "runtime step",
    "keys left out",
)


@pytest.mark.compiler
@pytest.mark.parametrize("plan", [sm80_plan, sm90_plan], ids=["sm80", "sm90"])
@pytest.mark.parametrize("name", LAID_OUT, ids=str)
def test_struct_is_laid_out_as_in_the_kernel(plan: Any, name: str | None) -> None:
    """The compiler compares its offsets with those of ctypes."""
    made = plan() if name is None else with_mathematics(plan(), name)
    struct = struct_of(made)
    c_offset = "__INTADDR__(&((AttentionParams *)0)->{})"  # what offsetof expands to under NVRTC's front end
    source = render(made)
    offsets = [f"static_assert({c_offset.format(name)} == {offset});" for name, offset in offsets_of(struct)]
    size = f"static_assert(sizeof(AttentionParams) == {ctypes.sizeof(struct)});"
    compile_source(replace(source, text="\n".join([source.text, *offsets, size])), made.target)


PREPARE = 43  # the preparation kernel's function


def driver_of(name: str, monkeypatch: pytest.MonkeyPatch, stream: int = 7) -> FakeDriver:
    driver = FakeDriver(with_mathematics(sm80_plan(), name), monkeypatch, stream)
    driver.loaded.prepare_function = PREPARE
    return driver


def inputs_of(name: str, case: Case = CASE) -> Inputs:
    case = replace(case, **GALLERY_CASES[name])
    return arrange(Declarations.of(case.spec()), **case.given(), name=name)


def test_inputs_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, inputs = driver_of("rows and keys", monkeypatch), inputs_of("rows and keys")
    q, k, v = CASE.tensors()
    driver.run(q, k, v, None, False, inputs)
    (struct,) = driver.structs
    names = [tensor.name for tensor in driver.plan.tensors]
    assert names == ["gain", "left", "right"]
    assert [getattr(struct.inputs, name) for name in names] == [t.data_ptr() for t in inputs.tensors]
    assert list(struct.inputs.left_stride) == [2 * 300, 300] and list(struct.inputs.right_stride) == [
        4 * 500,
        500,
    ]
    assert not hasattr(struct.inputs, "gain_stride")
    assert struct.q == q.data_ptr() and struct.scale == pytest.approx(driver.plan.scale)


def test_numbers_change_between_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of("runtime cap", monkeypatch)
    run = driver.prepare(*CASE.tensors(), Inputs(params=(1.0,)))
    for cap in (30.0, 50.0):
        run(*CASE.tensors(), None, False, Inputs(params=(cap,)))
    assert [struct.inputs.cap for struct in driver.structs] == [30.0, 50.0]
    driver = driver_of("runtime window", monkeypatch)
    driver.run(*CASE.tensors(), None, False, Inputs(params=(40.0,)))
    assert driver.structs[0].inputs.size == 40


@pytest.mark.parametrize(
    ("change", "copied"),
    [
        (lambda bias: bias, False),
        (lambda bias: bias[:1].expand(4, 300, 500), False),
        (lambda bias: bias[:, :1].expand(4, 300, 500), False),
        (lambda bias: bias.permute(1, 0, 2).contiguous().permute(1, 0, 2), False),
        (lambda bias: bias.mT.contiguous().mT, True),
        (lambda bias: bias[:, :, :1].expand(4, 300, 500), True),
        (lambda bias: bias.repeat_interleave(2, 2)[:, :, ::2], True),
    ],
    ids=["as is", "one for heads", "one for rows", "rows first", "keys first", "one for keys", "strided"],
)  # fmt: skip
def test_strides_of_inputs(monkeypatch: pytest.MonkeyPatch, change: Any, copied: bool) -> None:
    """Any are taken as they are, zero included, but for that of the last axis."""
    driver = driver_of("dense_bias", monkeypatch)
    bias = change(torch.randn(4, 300, 500).bfloat16())
    driver.run(*CASE.tensors(), None, False, Inputs((bias,)))
    (struct,) = driver.structs
    assert (struct.inputs.bias != bias.data_ptr()) == copied
    strides = bias.contiguous().stride() if copied else bias.stride()
    assert list(struct.inputs.bias_stride) == list(strides[:2])


def test_ranges_are_prepared_before_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, inputs = driver_of("document", monkeypatch), inputs_of("document")
    for _ in range(2):
        driver.run(*CASE.tensors(), None, False, inputs)
    assert [launch[0] for launch in driver.launches] == [PREPARE, 42] * 2
    prepare, struct = driver.launches[0], driver.structs[0]
    assert prepare[1:8] == (3 * 1 * 3, 1, 1, 128, 1, 1, 0)  # batches, rows of 128; no shared memory
    assert abs(struct.inputs.key_last - struct.inputs.key_first) >= 3 * 300 * 4
    assert driver.structs[1].inputs.key_first == struct.inputs.key_first


@pytest.mark.parametrize("name", ["document", "documents out of order"])
def test_what_a_preparation_leaves_unwritten_shows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As the tests on a GPU poison it: the driver here writes nothing at all."""
    driver, q, k, v = driver_of(name, monkeypatch), *CASE.tensors()
    poison(monkeypatch)
    prepared = driver.loaded.prepared(q, k, v, inputs_of(name))
    assert len(prepared) == 2 and all(bool((tensor == UNWRITTEN).all()) for tensor in prepared)
    assert driver.run(q, k, v, None, True, inputs_of(name))[0].isnan().all()


def test_a_map_is_prepared_once_where_it_reads_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: capturing, raising=False)
    driver = driver_of("runtime step", monkeypatch)
    run = driver.prepare(*CASE.tensors(), Inputs(params=(1.0,)))
    for step in (2.0, 2.0, 3.0, 2.0):
        run(*CASE.tensors(), None, False, Inputs(params=(step,)))
    assert [launch[0] for launch in driver.launches] == [PREPARE, 42, 42, PREPARE, 42, 42]
    kept = [struct.inputs.tile_list for struct in driver.structs]
    assert kept[0] == kept[1] == kept[2] == kept[5] != kept[3] == kept[4]
    assert [struct.inputs.step for struct in driver.structs] == [2, 2, 2, 3, 3, 2]
    assert driver.launches[0][1] == 3  # q tiles; the mask tells neither batches nor heads apart
    driver.launches.clear()
    capturing = True  # a graph must not read what may be forgotten
    for _ in range(2):
        run(*CASE.tensors(), None, False, Inputs(params=(2.0,)))
    assert [launch[0] for launch in driver.launches] == [PREPARE, 42] * 2
    driver.launches.clear()
    capturing = False
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 8, raising=False)
    other = driver.prepare(*CASE.tensors(), Inputs(params=(1.0,)))
    for _ in range(2):
        other(*CASE.tensors(), None, False, Inputs(params=(2.0,)))
    assert [launch[0] for launch in driver.launches] == [PREPARE, 42, 42]


def test_a_map_is_prepared_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `flashgen.attention` calls a mask that reads nothing."""
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    driver = driver_of("natten_2d", monkeypatch)
    driver.run(*CASE.tensors())
    assert [launch[0] for launch in driver.launches] == [PREPARE, 42]
    assert driver.structs[1].inputs.tile_list


def test_a_map_that_reads_tensors_is_prepared_before_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, inputs = driver_of("keys left out", monkeypatch), inputs_of("keys left out")
    for _ in range(2):
        driver.run(*CASE.tensors(), None, False, inputs)
    assert [launch[0] for launch in driver.launches] == [PREPARE, 42] * 2
    assert driver.launches[0][1:8] == (3 * 1 * 3, 1, 1, 512, 1, 1, 0)


@pytest.mark.parametrize("name", ["document", "runtime step", "keys left out"])
def test_what_is_prepared_beforehand_is_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    driver, inputs = driver_of(name, monkeypatch), inputs_of(name)
    q, k, v = CASE.tensors()
    made = driver.loaded.prepared(q, k, v, inputs)
    assert [launch[0] for launch in driver.launches] == [PREPARE]
    assert [tuple(tensor.shape) for tensor in made] == list(
        prepared_shapes(driver.plan, Sizes.of(q, k, "bottom_right"))
    )
    driver.run(q, k, v, None, False, replace(inputs, prepared=made))
    assert [launch[0] for launch in driver.launches] == [PREPARE, 42]
    first, second = PREPARED[driver.plan.preparation]
    struct = driver.structs[1].inputs
    assert (getattr(struct, first), getattr(struct, second)) == tuple(t.data_ptr() for t in made)
    for wrong in (made[:1], (made[0], made[1].long()), (made[0], made[1][:, :, :1])):
        with pytest.raises(LaunchError, match="what was prepared does not fit"):
            driver.run(q, k, v, None, False, replace(inputs, prepared=wrong))


@pytest.mark.parametrize(
    ("change", "copied"),
    [
        (lambda sink: sink, False),
        (lambda sink: sink[:1].expand(4), True),
        (lambda sink: torch.stack([sink, sink], 1)[:, 1], True),
    ],
    ids=["as is", "one for heads", "a layer's"],
)  # fmt: skip
def test_strides_of_a_sink(monkeypatch: pytest.MonkeyPatch, change: Any, copied: bool) -> None:
    driver = driver_of("sink", monkeypatch)
    sink = change(torch.randn(4))
    read: list[list[float]] = []
    launch_kernel = driver.loaded.launch_kernel

    def launch(*arguments: int) -> None:
        launch_kernel(*arguments)
        read.append(list((ctypes.c_float * 4).from_address(driver.structs[-1].inputs.sink)))

    driver.loaded.launch_kernel = launch
    driver.run(*CASE.tensors(), None, False, Inputs(sink=sink))
    assert read == [sink.tolist()]
    assert (driver.structs[0].inputs.sink != sink.data_ptr()) == copied


def test_a_sink_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of("sink", monkeypatch)
    case = replace(CASE, seqlen_kv=0)
    sink = torch.randn(4)
    o, lse = driver.run(*case.tensors(), None, True, Inputs(sink=sink))
    assert not driver.launches and not o.any() and lse is not None
    assert torch.equal(lse, sink[:, None].expand(3, 4, 300))
    driver.run(*CASE.tensors(), None, False, Inputs(sink=sink))
    assert driver.structs[0].inputs.sink == sink.data_ptr()
