"""A launch without a GPU: what is written into the struct, which layouts are copied, what is allocated."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import GALLERY_CASES, Case, laid_out
from torch import Tensor

from flashgen.arch import ARCHS, arch
from flashgen.build import compile_source
from flashgen.codegen import render
from flashgen.errors import LaunchError
from flashgen.plan import KernelPlan, MaskPlan, Sm90Schedule, solve
from flashgen.plan.model import ScorePlan
from flashgen.runtime import counters, launch, parameters, tensormap
from flashgen.runtime.counters import TileCounters
from flashgen.runtime.devices import runs
from flashgen.runtime.inputs import Declarations, Inputs, Sizes, arrange
from flashgen.runtime.launch import LoadedKernel
from flashgen.runtime.layouts import Outputs, Run
from flashgen.runtime.prepare import prepared_shapes
from flashgen.runtime.structs import PREPARED, struct_of

CASE = Case(mask="causal", heads_kv=2, group=2, seqlen_q=300, seqlen_kv=500, batch=3)


def sm80_plan() -> KernelPlan:
    return solve(replace(CASE, tiles={"q": 128, "kv": 64}).spec(), arch("sm_80"))


def sm90_plan(**schedule: Any) -> KernelPlan:
    hopper = {"family": "sm90", "target": "sm_90a", "warps": 8, "stages": 2, "blocks_per_sm": 1}
    return replace(sm80_plan(), tile_kv=128, smem_bytes=232_448, schedule=Sm90Schedule(**schedule), **hopper)


# -- the struct --------------------------------------------------------------------------------------------


def with_mathematics(plan: KernelPlan, name: str) -> KernelPlan:
    """A plan with the mask, score and inputs of a case of the gallery."""
    attention = replace(CASE, **GALLERY_CASES[name]).spec().attention
    return replace(
        plan,
        mask=MaskPlan(attention.mask_label, attention.condition, attention.derivation),
        score=ScorePlan(attention.score_label, attention.score_expr),
        tensors=attention.inputs,
        parameters=attention.runtime,
        sink=attention.sink,
    )


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


class FakeDriver:
    """Records launches, with a copy of the struct as it was then."""

    def __init__(self, plan: KernelPlan, monkeypatch: pytest.MonkeyPatch, stream: int = 7) -> None:
        self.plan = plan
        self.struct = struct_of(plan)
        self.launches: list[tuple[Any, ...]] = []
        self.structs: list[Any] = []
        loaded = LoadedKernel.__new__(LoadedKernel)
        loaded.plan, loaded.device, loaded.sms, loaded.function = plan, torch.device("cpu"), 132, 42
        loaded.launch_kernel, loaded.driver_error = self.launch_kernel, RuntimeError
        loaded._counters = TileCounters.__new__(TileCounters)
        loaded._counters._of_stream = {stream: 0xC0}
        self.loaded = loaded

        def allocate(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty_strided(size, stride, dtype=dtype)

        for module, name, value in (
            (torch._C, "_cuda_getCurrentRawStream", lambda index: stream),
            (torch._C, "_cuda_getDevice", lambda: -1),
            (loaded._counters, "_capturing", lambda: False),
            (launch, "empty_strided", allocate),
        ):
            monkeypatch.setattr(module, name, value, raising=False)

    def launch_kernel(self, *arguments: int) -> None:
        (pointer,) = (ctypes.c_void_p * 1).from_address(arguments[9])
        size = ctypes.sizeof(self.struct)
        self.structs.append(self.struct.from_buffer_copy(ctypes.string_at(pointer, size)))
        self.launches.append(arguments)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, return_lse: bool = False,
        inputs: Inputs | None = None,
    ) -> Outputs:  # fmt: skip
        return self.prepare(q, k, v, inputs)(q, k, v, scale, return_lse, inputs)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs | None = None) -> Run:
        return self.loaded.prepare(q, k, v, self.run, inputs)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver(sm80_plan(), monkeypatch)


def test_struct_of_a_launch(ampere: FakeDriver) -> None:
    q, k, v = replace(CASE, layout="heads_first").tensors()
    o, lse = ampere.run(q, k, v, 0.25, True)
    (struct,), (arguments,) = ampere.structs, ampere.launches
    assert lse is not None
    assert (struct.q, struct.k, struct.v) == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    assert (struct.o, struct.lse) == (o.data_ptr(), lse.data_ptr())
    assert list(struct.q_stride) == list(q.stride()[:3]) and list(struct.v_stride) == list(v.stride()[:3])
    assert list(struct.o_stride) == [300 * 4 * 64, 4 * 64, 64] == list(o.stride()[:3])
    assert (struct.batch, struct.heads_q, struct.heads_kv, struct.seqlen_q, struct.seqlen_kv) == (
        3,
        4,
        2,
        300,
        500,
    )
    assert struct.scale == 0.25
    assert o.shape == (3, 300, 4, 64) and o.dtype == q.dtype and lse.shape == (3, 4, 300)
    threads = ampere.plan.threads
    assert arguments[:9] == (42, 3 * 3 * 4, 1, 1, threads, 1, 1, ampere.plan.smem_bytes, 7)


def test_defaults_of_a_launch(ampere: FakeDriver) -> None:
    launched = ampere.prepare(*CASE.tensors())
    launched(*CASE.tensors(), 0.5, True)
    _, lse = launched(*CASE.tensors(), None, False)  # nothing of the first call may linger
    assert lse is None and not ampere.structs[1].lse
    assert ampere.structs[1].scale == pytest.approx(ampere.plan.scale)


@pytest.mark.parametrize(
    ("layout", "copied"),
    [
        ("contiguous", False),
        ("heads_first", False),
        ("packed", False),
        ("expanded", False),
        ("last_strided", True),
        ("misaligned", True),
    ],
)
def test_what_cannot_be_read_is_copied_once(ampere: FakeDriver, layout: str, copied: bool) -> None:
    q, k, v = replace(CASE, layout=layout).tensors()
    ampere.run(q, k, v)
    (struct,) = ampere.structs
    assert (struct.q != q.data_ptr()) == (struct.k != k.data_ptr()) == copied
    assert all(data % 16 == 0 for data in (struct.q, struct.k, struct.v))
    if copied:
        assert list(struct.q_stride) == [300 * 4 * 64, 4 * 64, 64]


def test_only_the_tensor_that_needs_it_is_copied(ampere: FakeDriver) -> None:
    q, k, v = CASE.tensors()
    k = laid_out(k, "last_strided")
    ampere.run(q, k, v)
    (struct,) = ampere.structs
    assert struct.q == q.data_ptr() and struct.k != k.data_ptr() and struct.v == v.data_ptr()


def test_odd_row_strides_are_copied(ampere: FakeDriver) -> None:
    q, k, v = CASE.tensors()
    odd = torch.zeros(3, 300, 4, 65, dtype=q.dtype)[..., :64]  # rows of 130 bytes
    ampere.run(odd, k, v)
    assert list(ampere.structs[0].q_stride) == [300 * 4 * 64, 4 * 64, 64]


@pytest.mark.parametrize("change", [{"seqlen_q": 0}, {"seqlen_kv": 0}, {"batch": 0}], ids=str)
def test_nothing_to_do_launches_nothing(ampere: FakeDriver, change: dict[str, int]) -> None:
    case = replace(CASE, **change)
    o, lse = ampere.run(*case.tensors(), None, True)
    assert not ampere.launches and lse is not None
    assert o.shape == (case.batch, case.seqlen_q, 4, 64) and not o.any()
    assert lse.shape == (case.batch, 4, case.seqlen_q) and torch.all(lse == -torch.inf)


def test_scale_is_checked(ampere: FakeDriver) -> None:
    with pytest.raises(LaunchError, match="scale must be positive"):
        ampere.run(*CASE.tensors(), 0.0)


def test_more_blocks_than_a_grid_holds_is_an_error(ampere: FakeDriver) -> None:
    q, k, v = (torch.empty(1, 1, 1, 64, dtype=torch.bfloat16).expand(2**28, 129, 8, 64) for _ in range(3))
    with pytest.raises(LaunchError, match="split the batch"):
        ampere.prepare(q, k, v)


class Refusal(RuntimeError):
    """As CuPy's CUDADriverError."""

    def __init__(self, status: int, name: str) -> None:
        super().__init__(name)
        self.status = status


def test_errors_of_the_driver_are_told(ampere: FakeDriver) -> None:
    def refuse(*_: int) -> None:
        raise Refusal(700, "CUDA_ERROR_ILLEGAL_ADDRESS")

    ampere.loaded.launch_kernel = refuse
    with pytest.raises(LaunchError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        ampere.run(*CASE.tensors())


def test_thread_without_a_context_gets_one(ampere: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    current = False

    def make_current(self: LoadedKernel) -> None:
        nonlocal current
        current = True

    def launch_kernel(*arguments: int) -> None:
        if not current:
            raise Refusal(201, "CUDA_ERROR_INVALID_CONTEXT")
        ampere.launch_kernel(*arguments)

    monkeypatch.setattr(LoadedKernel, "make_current", make_current)
    ampere.loaded.launch_kernel = launch_kernel
    ampere.run(*CASE.tensors())
    assert len(ampere.launches) == 1


# -- what masks and scores read ----------------------------------------------------------------------------

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


def test_a_sink_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of("sink", monkeypatch)
    case = replace(CASE, seqlen_kv=0)
    sink = torch.randn(4)
    o, lse = driver.run(*case.tensors(), None, True, Inputs(sink=sink))
    assert not driver.launches and not o.any() and lse is not None
    assert torch.equal(lse, sink[:, None].expand(3, 4, 300))
    driver.run(*CASE.tensors(), None, False, Inputs(sink=sink))
    assert driver.structs[0].inputs.sink == sink.data_ptr()


# -- tensor maps -------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["opaque maps", "maps that begin with the address"])
def writable(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch, writable: bool) -> Iterator[list[tuple[Any, ...]]]:
    """The driver's two functions, recorded."""
    calls: list[tuple[Any, ...]] = []

    def encode(map_address: int, data: int, **layout: Any) -> None:
        assert map_address % 64 == 0
        calls.append(("encode", data, layout))

    monkeypatch.setattr(parameters, "encode_tensor_map", encode)
    monkeypatch.setattr(
        parameters, "replace_address", lambda map_address, data: calls.append(("replace", data))
    )
    monkeypatch.setattr(parameters, "begins_with_address", lambda map_address, data: writable)
    yield calls


def test_maps_are_encoded_once_and_then_follow_the_addresses(
    maps: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    hopper = FakeDriver(sm90_plan(), monkeypatch)
    q, k, v = CASE.tensors()
    run = hopper.prepare(q, k, v)
    kept = run(q, k, v, None, False)
    assert [call[0] for call in maps] == ["encode"] * 4
    assert [call[2]["box"] for call in maps] == [(64, rows, 1, 1) for rows in (64, 128, 128, 64)]
    assert [call[2]["lengths"] for call in maps] == [
        (64, seqlen, heads, 3) for seqlen, heads in ((300, 4), (500, 2), (500, 2), (300, 4))
    ]
    assert maps[0][2]["strides"] == (1, 4 * 64, 64, 300 * 4 * 64)
    assert maps[3][1] == kept[0].data_ptr()
    maps.clear()
    moved = q.clone()
    other = run(moved, k, v, None, False)
    if not writable:
        assert maps == [("replace", moved.data_ptr()), ("replace", other[0].data_ptr())]
        return
    assert not maps
    starts = [int.from_bytes(bytes(getattr(hopper.structs[1], name))[:8], "little") for name in "qkvo"]
    assert starts == [tensor.data_ptr() for tensor in (moved, k, v, other[0])]


def map_of(data: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data.to_bytes(8, "little") + bytes(range(120)), 128)


@pytest.mark.parametrize(("written_at", "begins"), [(0, True), (8, False)])
def test_whether_maps_begin_with_the_address_is_tried(
    monkeypatch: pytest.MonkeyPatch, written_at: int, begins: bool
) -> None:
    def replace_address(map_address: int, data: int) -> None:
        ctypes.memmove(map_address + written_at, data.to_bytes(8, "little"), 8)

    monkeypatch.setattr(tensormap, "replace_address", replace_address)
    encoded = map_of(0x7F00_1234_5600)
    assert tensormap.begins_with_address(ctypes.addressof(encoded), 0x7F00_1234_5600) == begins
    assert encoded.raw == map_of(0x7F00_1234_5600).raw
    assert not tensormap.begins_with_address(ctypes.addressof(encoded), 0x7F00_1234_5700)


def test_hopper_copies_what_tma_cannot_step_through(
    maps: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = FakeDriver(sm90_plan(), monkeypatch)
    q, k, v = replace(CASE, layout="expanded").tensors()
    hopper.run(q, k, v)
    assert [call[2]["strides"] for call in maps[:3]] == [
        (1, tensor.shape[2] * 64, 64, tensor.shape[1] * tensor.shape[2] * 64) for tensor in (q, k, v)
    ]


@pytest.mark.parametrize(
    ("schedule", "grid", "tiles", "tiles_per_head"),
    [({}, 36, 36, 3), ({"cluster": 2}, 48, 24, 2), ({"pack_gqa": True}, 30, 30, 5)],
    ids=["one block", "clusters of 2", "packed heads"],
)
def test_persistent_grid(
    maps: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    schedule: dict[str, Any],
    grid: int,
    tiles: int,
    tiles_per_head: int,
) -> None:
    hopper = FakeDriver(sm90_plan(tile_order="dynamic", **schedule), monkeypatch)
    hopper.run(*CASE.tensors())
    (struct,) = hopper.structs
    assert hopper.launches[0][1] == grid
    assert (struct.tiles, struct.tiles_per_head) == (tiles, tiles_per_head)
    assert struct.tile_counter == 0xC0
    hopper.run(*replace(CASE, batch=50).tensors())
    assert hopper.launches[1][1] == 132


def test_packed_heads_are_a_dimension_of_their_own(
    maps: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = FakeDriver(sm90_plan(pack_gqa=True), monkeypatch)
    hopper.run(*CASE.tensors())
    q = maps[0][2]
    assert q["lengths"] == (64, 2, 300, 2, 3) and q["box"] == (64, 2, 32, 1, 1)
    assert q["strides"] == (1, 64, 4 * 64, 2 * 64, 300 * 4 * 64)


@pytest.mark.parametrize(
    ("batch", "heads_kv", "seqlen_kv", "schedule", "heads"),
    [
        (3, 2, 500, {}, 12),  # no more than there are
        (50, 2, 500, {}, 200),
        (50, 2, 2**15, {}, 32),  # 32 MiB hold K and V of 4 heads for 2 query heads each: too few to balance
        (50, 2, 2**15, {"pack_gqa": True}, 32),
        (50, 2, 2**11, {}, 128),
        (50, 2, 2**11, {"pack_gqa": True}, 64),
    ],
)
def test_a_section_is_the_heads_whose_keys_and_values_share_l2(
    batch: int, heads_kv: int, seqlen_kv: int, schedule: dict[str, Any], heads: int
) -> None:
    plan = sm90_plan(tile_order="dynamic", **schedule)
    q, kv = (batch, 300, 2 * heads_kv, 64), (batch, seqlen_kv, heads_kv, 64)
    stride = (1, 1, 1)
    shapes = parameters.Shapes(q, kv, kv, q, stride, stride, stride, stride)
    assert parameters.Sm90Parameters(plan, shapes, sms=132).struct.heads_per_section == heads


def test_more_tiles_than_an_int_counts_are_refused() -> None:
    q, stride = (2**26, 64, 64, 64), (1, 1, 1)
    shapes = parameters.Shapes(q, q, q, q, stride, stride, stride, stride)
    with pytest.raises(LaunchError, match="4,294,967,296 tiles"):
        parameters.Sm90Parameters(replace(sm90_plan(), group=1), shapes, sms=132)


def test_static_order_needs_no_counter(maps: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = FakeDriver(sm90_plan(tile_order="static"), monkeypatch)
    hopper.run(*CASE.tensors())
    assert hopper.structs[0].tile_counter is None


def test_counters_are_one_to_a_stream_and_one_to_a_captured_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(counters, "_COUNTERS", 4)
    capturing = False
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: capturing, raising=False)
    own = TileCounters(torch.device("cpu"))
    first, second = own.address(1), own.address(2)
    assert first != second and own.address(1) == first
    capturing = True
    third, fourth = own.address(1), own.address(1)
    assert len({first, second, third, fourth}) == 4
    assert own.address(1) not in {first, second, third, fourth}  # from the graph's memory
    capturing = False
    assert own.address(1) == first
    with pytest.raises(LaunchError, match="more than 4 streams"):
        own.address(3)


# -- targets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "capability", "expected"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 7), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_100a", (10, 3), False),
    ],
)
def test_which_binaries_run_where(target: str, capability: tuple[int, int], expected: bool) -> None:
    assert runs(ARCHS[target], capability) == expected
