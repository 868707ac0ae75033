"""The struct of one launch's arguments, per family, kept ready between launches.

Everything that depends on shapes and strides alone is filled in once; a launch writes the addresses and the
numbers that it brings.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

from flashgen.errors import LaunchError
from flashgen.plan.model import KernelPlan, Sm90Schedule
from flashgen.plan.order import divide, heads_per_section
from flashgen.runtime.memory import WORD_BYTES
from flashgen.runtime.structs import InputFields, Sm80Struct, Sm90Struct, struct_of
from flashgen.runtime.tensormap import (
    MAP_ALIGNMENT,
    PANEL_COLUMNS,
    TENSOR_MAP_BYTES,
    begins_with_address,
    encode_tensor_map,
    replace_address,
)

_INT32_MAX = 2**31 - 1
_WARPGROUP_ROWS = 64  # rows of Q and O that one copy moves: those of one warpgroup


@dataclass(frozen=True)
class Shapes:
    """The shapes and strides of one launch. Strides in elements, in the order batch, seqlen, heads."""

    q: tuple[int, ...]  # [batch, seqlen_q, heads_q, head_dim_qk]
    k: tuple[int, ...]
    v: tuple[int, ...]
    o: tuple[int, ...]
    q_stride: tuple[int, ...]
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    o_stride: tuple[int, ...]
    input_strides: tuple[tuple[int, ...], ...] = ()  # of the plan's tensors, all axes


class Parameters(Protocol):
    """What a launch needs of either family."""

    address: int  # of the struct
    grid: int  # thread blocks
    needs_counter: bool  # whether the kernel draws its tiles from a counter, or raises flags
    workspace_words: int  # 32-bit words that the blocks leave notes in; 0 where they need none
    inputs: InputFields  # what mask and score read

    def point_at(self, q: int, k: int, v: int, o: int, lse: int, counter: int, scale: float) -> None:
        """Fill in what one launch brings: addresses (0 where there is no lse or counter) and the scale."""

    def point_at_workspace(self, address: int) -> None:
        """`workspace_words`, not initialised, that nothing else uses until the launch has ended."""


class Sm80Parameters:
    """Pointers and strides."""

    needs_counter = False
    workspace_words = 0

    def __init__(self, plan: KernelPlan, shapes: Shapes) -> None:
        self.struct: Any = struct_of(plan)(
            q_stride=shapes.q_stride,
            k_stride=shapes.k_stride,
            v_stride=shapes.v_stride,
            o_stride=shapes.o_stride,
            batch=shapes.q[0],
            heads_q=shapes.q[2],
            heads_kv=shapes.k[2],
            seqlen_q=shapes.q[1],
            seqlen_kv=shapes.k[1],
        )
        self.address = ctypes.addressof(self.struct)
        self._words, self._floats = _views(self.struct)
        self.inputs = InputFields(self.struct, plan, shapes.input_strides)
        self.grid = -(-shapes.q[1] // plan.tile_q) * shapes.q[2] * shapes.q[0]

    def point_at(self, q: int, k: int, v: int, o: int, lse: int, counter: int, scale: float) -> None:
        words = self._words
        words[0], words[1], words[2], words[3], words[4] = q, k, v, o, lse
        self._floats[_SM80_SCALE] = scale

    def point_at_workspace(self, address: int) -> None:
        raise AssertionError("the sm80 family needs no workspace")


class Sm90Parameters:
    """Tensor maps, encoded at the first launch; later ones only move their addresses."""

    def __init__(self, plan: KernelPlan, shapes: Shapes, sms: int) -> None:
        schedule = plan.schedule
        assert isinstance(schedule, Sm90Schedule)
        group = plan.group if schedule.pack_gqa else 1  # query heads that are folded into the rows of a tile
        share = plan.tile_kv // schedule.cluster  # each block of a cluster loads its share of K and V for all
        self._dtype = plan.dtype
        self._layouts = (
            _layout(shapes.q, shapes.q_stride, _WARPGROUP_ROWS, group),
            _layout(shapes.k, shapes.k_stride, share),
            _layout(shapes.v, shapes.v_stride, share),
            _layout(shapes.o, shapes.o_stride, _WARPGROUP_ROWS, group),
        )
        self._data = [0, 0, 0, 0]
        layout = struct_of(plan)
        self._storage = ctypes.create_string_buffer(ctypes.sizeof(layout) + MAP_ALIGNMENT)
        offset = -ctypes.addressof(self._storage) % MAP_ALIGNMENT
        struct: Any = layout.from_buffer(self._storage, offset)
        self.struct = struct
        self.address = ctypes.addressof(struct)
        self._words, self._floats = _views(struct)
        self.inputs = InputFields(struct, plan, shapes.input_strides)
        self._writable = False  # whether an address is moved by writing it to the first word of its map
        self._maps = [self.address + index * TENSOR_MAP_BYTES for index in range(4)]
        batch, seqlen_q, heads_q, _ = shapes.q
        struct.batch, struct.heads_q, struct.heads_kv = batch, heads_q, shapes.k[2]
        struct.seqlen_q, struct.seqlen_kv = seqlen_q, shapes.k[1]
        struct.tiles_per_head = -(-seqlen_q * group // (plan.tile_q * schedule.cluster))
        heads = batch * heads_q // group
        tiles = struct.tiles_per_head * heads
        blocks = sms * plan.blocks_per_sm
        if tiles > _INT32_MAX - blocks:  # a block counts one stride past its last tile
            raise LaunchError(
                f"{plan.kernel}: {tiles:,} tiles; a launch counts {_INT32_MAX - blocks:,}",
                hint="split the batch",
            )
        struct.tiles = tiles
        kv_bytes = 2 * (plan.head_dim_qk + plan.head_dim_v) * shapes.k[1]
        struct.heads_per_section = heads_per_section(
            heads, kv_bytes, plan.group // group, schedule.section_mib
        )
        self.grid = min(tiles, blocks // schedule.cluster) * schedule.cluster
        self.needs_counter = schedule.tile_order == "dynamic"
        partial_words = 0
        if plan.stream_k:
            key_tiles = -(-shapes.k[1] // plan.tile_kv)
            division = divide(tiles, key_tiles, blocks)
            struct.whole_tiles, struct.shares = division.whole, division.shares
            self.grid = max(self.grid, struct.shares)
            self.needs_counter = struct.shares > 0
            partial_words = struct.shares * plan.warps // 4 * partial_floats(plan.head_dim_v)
        self.partial_words = partial_words  # of the workspace; links come after them
        places = {"partials": 0, "links": partial_words * WORD_BYTES}
        self._workspace = [  # words of the struct that point into it, and bytes from its start
            (getattr(layout, name).offset // 8, offset)
            for name, offset in places.items()
            if hasattr(layout, name)
        ]
        links = tiles * schedule.cluster * plan.warps // 4 if plan.first_reference else 0
        self.workspace_words = partial_words + links

    def point_at(self, q: int, k: int, v: int, o: int, lse: int, counter: int, scale: float) -> None:
        words = self._words
        if self._writable:
            words[0], words[_MAP_WORDS], words[2 * _MAP_WORDS], words[3 * _MAP_WORDS] = q, k, v, o
        else:
            self._move([q, k, v, o])
        words[_SM90_LSE], words[_SM90_COUNTER] = lse, counter
        self._floats[_SM90_SCALE] = scale

    def point_at_workspace(self, address: int) -> None:
        for word, offset in self._workspace:
            self._words[word] = address + offset

    def _move(self, data: list[int]) -> None:
        for index, (old, new) in enumerate(zip(self._data, data, strict=True)):
            if old == 0:
                layout = self._layouts[index]
                encode_tensor_map(
                    self._maps[index],
                    new,
                    dtype=self._dtype,
                    lengths=layout.lengths,
                    strides=layout.strides,
                    box=layout.box,
                )
            elif old != new:
                replace_address(self._maps[index], new)
        if 0 in self._data:
            self._writable = all(map(begins_with_address, self._maps, data))
        self._data = data


def counter_words(plan: KernelPlan, sms: int) -> int:
    """int32 zeros that a launch needs as its counter: where blocks share tiles, a flag of each warpgroup."""
    return sms * plan.blocks_per_sm * plan.warps // 4 if plan.stream_k else 1


def partial_floats(head_dim_v: int) -> int:
    """Of `Partial` in templates/device/stream_k.cuh: O, two maxima with references, two sums a thread."""
    return 128 * (4 * -(-head_dim_v // 8) + 6)


def _views(struct: ctypes.Structure) -> tuple[memoryview[int], memoryview[float]]:
    """The struct as 64-bit words and as floats: an element is written in half the time of a field."""
    data = memoryview(struct).cast("B")
    return data.cast("Q"), data.cast("f")


_SM80_SCALE = Sm80Struct.scale.offset // 4
_SM90_SCALE = Sm90Struct.scale.offset // 4
_MAP_WORDS = TENSOR_MAP_BYTES // 8
_SM90_LSE, _SM90_COUNTER = Sm90Struct.lse.offset // 8, Sm90Struct.tile_counter.offset // 8


@dataclass(frozen=True)
class _Layout:
    """A tensor as a tensor map has it: from the innermost dimension outwards, in elements."""

    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


def _layout(shape: tuple[int, ...], stride: tuple[int, ...], rows: int, group: int = 1) -> _Layout:
    """(head_dim, seqlen, heads, batch), or with packed query heads (head_dim, group, seqlen, heads_kv,
    batch).
    """
    (batch, seqlen, heads, head_dim), (batch_step, seqlen_step, head_step) = shape, stride
    if group == 1:
        return _Layout(
            (head_dim, seqlen, heads, batch),
            (1, seqlen_step, head_step, batch_step),
            (PANEL_COLUMNS, rows, 1, 1),
        )
    return _Layout(
        (head_dim, group, seqlen, heads // group, batch),
        (1, head_step, seqlen_step, group * head_step, batch_step),
        (PANEL_COLUMNS, group, rows // group, 1, 1),
    )


def parameters(plan: KernelPlan, shapes: Shapes, sms: int) -> Parameters:
    """The parameters of one launch of `plan` on a GPU of `sms` multiprocessors."""
    return Sm90Parameters(plan, shapes, sms) if plan.family == "sm90" else Sm80Parameters(plan, shapes)


__all__ = [
    "Parameters",
    "Shapes",
    "Sm80Parameters",
    "Sm90Parameters",
    "counter_words",
    "parameters",
    "partial_floats",
]
