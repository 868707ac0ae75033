"""A launch without a GPU: what is written into the struct, which layouts are copied, what is allocated."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import laid_out
from fake_driver import CASE, FakeDriver, sm80_plan, sm90_plan

from flashgen.arch import ARCHS
from flashgen.errors import LaunchError
from flashgen.runtime import counters, parameters, tensormap
from flashgen.runtime.arguments import signature
from flashgen.runtime.counters import TileCounters, Workspaces
from flashgen.runtime.devices import runs
from flashgen.runtime.launch import LoadedKernel


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
        (50, 2, 2**15, {}, 8),  # 32 MiB hold K and V of 4 heads, for 2 query heads each
        (50, 2, 2**15, {"pack_gqa": True}, 4),
        (50, 2, 2**15, {"section_mib": 16}, 4),
        (50, 2, 2**11, {}, 100),  # 50 MiB in two halves, not in 32 and 18
        (50, 2, 2**11, {"pack_gqa": True}, 50),
        (1, 1, 2**19, {}, 2),  # one head is more than a section
        (8, 2, 7 * 2**13, {}, 4),  # 16 of 14 MiB: 3 would fit, and leave one
        (17, 1, 31 * 2**12, {}, 2),  # 17 of 31 MiB: two would be twice what fits
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
    monkeypatch.setattr(counters, "zero_words", lambda words, device: 1 << 20)
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


def test_a_small_workspace_is_the_streams_own(
    maps: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "zero_words", lambda words, device: 1 << 20)
    monkeypatch.setattr(counters, "_WORKSPACES", 1)
    capturing = False
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: capturing, raising=False)
    hopper = FakeDriver(sm90_plan(reference="first", tile_order="dynamic"), monkeypatch)
    own = hopper.loaded._workspaces = Workspaces(torch.device("cpu"))
    q, k, v = CASE.tensors()
    launch = hopper.prepare(q, k, v)
    for _ in range(2):
        launch(q, k, v, None, False)
    assert [struct.links for struct in hopper.structs] == 2 * [1 << 20]
    assert own.address(8) is None, "there is no other: the launch allocates"
    capturing = True
    launch(q, k, v, None, False)
    assert hopper.structs[2].links not in (0, 1 << 20), "from the graph's memory"
    capturing = False
    hopper.run(*replace(CASE, batch=1, heads_kv=2048, seqlen_q=600).tensors())
    assert hopper.structs[3].links not in (0, 1 << 20), "too many tiles for it"


def test_strides_of_contiguous_tensors_are_not_looked_at() -> None:
    q, k, v = replace(CASE, batch=1).tensors()
    strides = (1, *q.stride()[1:])
    assert signature(q.as_strided(q.shape, strides), k, v) == signature(q, k, v)
    turned = replace(CASE, batch=1, layout="heads_first").tensors()
    assert signature(*turned) != signature(q, k, v)


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
