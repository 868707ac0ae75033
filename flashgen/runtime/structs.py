"""`AttentionParams`, the one by-value struct that a kernel takes, laid out by ctypes as the compiler does.

The members that all kernels of a family have are those of ``templates/kernels/<family>/forward.cu.j2``. What
a plan's mask and score read comes last, in a struct of its own: ``templates/kernels/inputs.cuh.j2``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from flashgen.plan.model import KernelPlan
from flashgen.runtime.tensormap import MAP_ALIGNMENT, TENSOR_MAP_BYTES


class Sm80Struct(ctypes.Structure):
    """The members of the sm80 family."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("o", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64 * 3),
        ("k_stride", ctypes.c_int64 * 3),
        ("v_stride", ctypes.c_int64 * 3),
        ("o_stride", ctypes.c_int64 * 3),
        ("batch", ctypes.c_int32),
        ("heads_q", ctypes.c_int32),
        ("heads_kv", ctypes.c_int32),
        ("seqlen_q", ctypes.c_int32),
        ("seqlen_kv", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class Sm90Struct(ctypes.Structure):
    """The members of the sm90 family; a tensor map is opaque."""

    _fields_ = (
        ("q", ctypes.c_ubyte * TENSOR_MAP_BYTES),
        ("k", ctypes.c_ubyte * TENSOR_MAP_BYTES),
        ("v", ctypes.c_ubyte * TENSOR_MAP_BYTES),
        ("o", ctypes.c_ubyte * TENSOR_MAP_BYTES),
        ("lse", ctypes.c_void_p),
        ("tile_counter", ctypes.c_void_p),
        ("batch", ctypes.c_int32),
        ("heads_q", ctypes.c_int32),
        ("heads_kv", ctypes.c_int32),
        ("seqlen_q", ctypes.c_int32),
        ("seqlen_kv", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("tiles_per_head", ctypes.c_int32),
        ("heads_per_section", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


_FIRST_REFERENCE = (("links", ctypes.c_void_p),)
_STREAM_K = (
    ("partials", ctypes.c_void_p),
    ("whole_tiles", ctypes.c_int32),
    ("shares", ctypes.c_int32),
)

PREPARED = {None: (), "ranges": ("key_first", "key_last"), "map": ("tile_counts", "tile_list")}
"""The int32 arrays that a plan's preparation writes."""


@lru_cache(maxsize=256)
def struct_of(plan: KernelPlan) -> type[ctypes.Structure]:
    """`AttentionParams` of a plan: its family's members, its schedule's, its inputs, and C's padding."""
    family: Any = Sm90Struct if plan.family == "sm90" else Sm80Struct
    inputs = _inputs_struct(plan)
    further = (_FIRST_REFERENCE if plan.first_reference else ()) + (_STREAM_K if plan.stream_k else ())
    fields = [*family._fields_, *further, *([("inputs", inputs)] if inputs else [])]
    if plan.family == "sm90":  # aligned as the tensor maps in it, of which ctypes knows nothing
        name, last = fields[-1]
        end = getattr(_struct("AttentionParams", fields), name).offset + ctypes.sizeof(last)
        fields.append(("_padding", ctypes.c_ubyte * (-end % MAP_ALIGNMENT)))
    return _struct("AttentionParams", fields)


def _inputs_struct(plan: KernelPlan) -> type[ctypes.Structure] | None:
    """`Inputs`; None where mask and score read nothing.

    All addresses come first (the plan's tensors, the sink, what is prepared), then the strides of each tensor
    but that of its last axis, which is 1, then the integer parameters and the others.
    """
    tensors, sink = plan.tensors, ("sink",) if plan.sink else ()
    pointers = (*(tensor.name for tensor in tensors), *sink, *PREPARED[plan.preparation])
    strided = [tensor for tensor in tensors if len(tensor.index) > 1]
    fields: list[tuple[str, Any]] = [
        *((name, ctypes.c_void_p) for name in pointers),
        *((f"{tensor.name}_stride", ctypes.c_int64 * (len(tensor.index) - 1)) for tensor in strided),
        *((parameter.name, ctypes.c_int32) for parameter in plan.parameters if parameter.kind == "int"),
        *((parameter.name, ctypes.c_float) for parameter in plan.parameters if parameter.kind == "float"),
    ]
    return _struct("Inputs", fields) if fields else None


def _struct(name: str, fields: list[tuple[str, Any]]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


class InputFields:
    """The `inputs` of a plan's struct: strides are written once, addresses and numbers before each launch."""

    def __init__(self, struct: Any, plan: KernelPlan, strides: Sequence[Sequence[int]]) -> None:
        """`strides` are those of the plan's tensors, in elements, of all their axes."""
        data = memoryview(struct).cast("B")
        self._words, self._first_word = data.cast("Q"), 0
        self._slots: list[tuple[memoryview[Any], int]] = []
        if not hasattr(struct, "inputs"):
            return
        inputs = struct.inputs
        for tensor, steps in zip(plan.tensors, strides, strict=True):
            if len(steps) > 1:
                getattr(inputs, f"{tensor.name}_stride")[:] = steps[:-1]
        offset = type(struct).inputs.offset
        self._first_word = offset // 8
        views: dict[str, memoryview[Any]] = {"int": data.cast("i"), "float": data.cast("f")}
        self._slots = [
            (views[parameter.kind], (offset + getattr(type(inputs), parameter.name).offset) // 4)
            for parameter in plan.parameters
        ]

    def write(self, addresses: Sequence[int], numbers: Sequence[float]) -> None:
        """What one launch brings: addresses of the tensors, of the sink where there is one and of what was
        prepared, and the runtime parameters.
        """
        words = self._words
        for index, address in enumerate(addresses, self._first_word):
            words[index] = address
        for (view, slot), number in zip(self._slots, numbers, strict=True):
            view[slot] = int(number) if view.format == "i" else number


__all__ = ["PREPARED", "InputFields", "Sm80Struct", "Sm90Struct", "struct_of"]
