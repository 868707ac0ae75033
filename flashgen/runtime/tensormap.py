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
PANEL_COLUMNS = 64  # elements of two bytes in one row of the 128-byte swizzle

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
    shape: Sequence[int],
    strides: Sequence[int],
    box_rows: int,
) -> None:
    """Write the map of a [batch, seqlen, heads, head_dim] tensor to `map_address` (64-byte aligned).

    Dimensions run from the innermost outwards: head_dim, seqlen, heads, batch. One copy moves a box of 64
    columns of `box_rows` rows of one head, swizzled by 128 bytes; what lies outside of the tensor reads as
    zero. `strides` are in elements, those of dimensions of length 1 excepted multiples of 8.
    """
    batch, seqlen, heads, head_dim = shape
    lengths = (head_dim, seqlen, heads, batch)
    # The stride of a dimension of length 1 is never used, but it is checked: any legal value will do.
    outer = (strides[1], strides[2], strides[0])
    steps = [2 * stride if length > 1 else 16 for stride, length in zip(outer, lengths[1:], strict=True)]
    status = _driver().cuTensorMapEncodeTiled(
        map_address,
        _DATA_TYPE[dtype],
        4,
        data,
        (ctypes.c_uint64 * 4)(*lengths),
        (ctypes.c_uint64 * 3)(*steps),
        (ctypes.c_uint32 * 4)(PANEL_COLUMNS, box_rows, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        _OUT_OF_BOUNDS_ZERO,
    )
    if status:
        raise LaunchError(
            f"cuTensorMapEncodeTiled: error {status} for {dtype} {tuple(shape)}, strides {tuple(strides)}",
            hint="this is a mistake in flashgen; q.contiguous() and the like may get around it",
        )


def replace_address(map_address: int, data: int) -> None:
    """Point an encoded map at another address of the same layout."""
    if status := _driver().cuTensorMapReplaceAddress(map_address, data):
        raise LaunchError(f"cuTensorMapReplaceAddress returned {status} for address {data:#x}")


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


__all__ = ["PANEL_COLUMNS", "TENSOR_MAP_BYTES", "encode_tensor_map", "replace_address"]
