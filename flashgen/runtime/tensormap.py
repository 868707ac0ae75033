"""Tensor maps: what the tensor memory accelerator (TMA) of Hopper and later must know of a tensor.

CUDA Driver API, "Tensor Map Object Management". Called through ctypes: the driver's library is there wherever
a kernel can run, and CuPy does not wrap these two functions. A map is made once for a layout; when only the
address changes, `cuTensorMapReplaceAddress` patches it in place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

from flashgen.errors import LaunchError

TENSOR_MAP_BYTES = 128
MAP_ALIGNMENT = 64
PANEL_COLUMNS = 64  # elements of two bytes in one row of the 128-byte swizzle

_OTHER_ADDRESS = 0x5A5A5A0000  # some bits of an address: high and low ones, none of the lowest 16

# CUtensorMapDataType, ..Interleave, ..Swizzle, ..L2promotion, ..FloatOOBfill (cuda.h)
_DATA_TYPE = {"fp16": 6, "bf16": 9}
_INTERLEAVE_NONE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_OUT_OF_BOUNDS_ZERO = 0


def encode_tensor_map(
    map_address: int,
    data: int,
    *,
    dtype: str,
    lengths: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
) -> None:
    """Write a map of the tensor at `data` to `map_address` (64-byte aligned).

    Dimensions run from the innermost outwards, in elements; the innermost has stride 1. One copy moves a
    `box`, whose innermost length is `PANEL_COLUMNS`, swizzled by 128 bytes; what lies outside of the tensor
    reads as zero and is not written.
    """
    rank = len(lengths)
    # The stride of a dimension of length 1 is never used, but it is checked: any legal value will do.
    steps = [
        2 * stride if length > 1 else 16 for stride, length in zip(strides[1:], lengths[1:], strict=True)
    ]
    status = _driver().cuTensorMapEncodeTiled(
        map_address,
        _DATA_TYPE[dtype],
        rank,
        data,
        (ctypes.c_uint64 * rank)(*lengths),
        (ctypes.c_uint64 * (rank - 1))(*steps),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        _OUT_OF_BOUNDS_ZERO,
    )
    if status:
        raise LaunchError(
            f"cuTensorMapEncodeTiled: error {status} for {dtype} {tuple(lengths)}, strides {tuple(strides)}",
            hint="this is a mistake in flashgen; q.contiguous() and the like may get around it",
        )


def replace_address(map_address: int, data: int) -> None:
    """Point an encoded map at another address of the same layout."""
    if status := _driver().cuTensorMapReplaceAddress(map_address, data):
        raise LaunchError(f"cuTensorMapReplaceAddress returned {status} for address {data:#x}")


def begins_with_address(map_address: int, data: int) -> bool:
    """Whether the map of the tensor at `data` is that of another address of the same layout once its first
    eight bytes are that address.

    A map is opaque, so this is tried on a copy rather than believed. Writing eight bytes takes a tenth of the
    host time of calling `replace_address`.
    """
    storage = ctypes.create_string_buffer(TENSOR_MAP_BYTES + MAP_ALIGNMENT)
    copy = ctypes.addressof(storage) + -ctypes.addressof(storage) % MAP_ALIGNMENT
    moved = data ^ _OTHER_ADDRESS
    ctypes.memmove(copy, map_address, TENSOR_MAP_BYTES)
    replace_address(copy, moved)
    expected = moved.to_bytes(8, "little") + ctypes.string_at(map_address, TENSOR_MAP_BYTES)[8:]
    return ctypes.string_at(map_address, 8) == data.to_bytes(8, "little") and (
        ctypes.string_at(copy, TENSOR_MAP_BYTES) == expected
    )


@cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        encode, replace = library.cuTensorMapEncodeTiled, library.cuTensorMapReplaceAddress
    except (OSError, AttributeError) as error:
        raise LaunchError(
            f"the CUDA driver has no tensor maps: {error}",
            hint="Hopper kernels need a driver for CUDA 12.0 or newer",
        ) from None
    pointer, u32, enum = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
    encode.argtypes = [
        pointer,
        enum,
        u32,
        pointer,
        pointer,
        pointer,
        pointer,
        pointer,
        enum,
        enum,
        enum,
        enum,
    ]
    replace.argtypes = [pointer, pointer]
    return library


__all__ = [
    "MAP_ALIGNMENT",
    "PANEL_COLUMNS",
    "TENSOR_MAP_BYTES",
    "begins_with_address",
    "encode_tensor_map",
    "replace_address",
]
