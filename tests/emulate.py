"""Whole printed sm90 kernels on the CPU: `emulator/` has the SM, this compiles a plan for it and launches.

The text is the printed one. What is assembly becomes a declaration, which `emulator/hopper.h` defines.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from attention_cases import Case
from host_kernel import compile_library, on_host, stand_ins
from torch import Tensor

from flashgen.codegen import PREPARE_THREADS, render
from flashgen.plan.model import KernelPlan, Sm90Schedule
from flashgen.runtime import parameters
from flashgen.runtime.inputs import Declarations, Sizes, arrange
from flashgen.runtime.preparation import blocks, prepared_shapes

_FOLDER = Path(__file__).parent / "emulator"
_HEADERS = (
    *("types.cuh", "integer.cuh", "softmax.cuh", "elementary.cuh", "capped_softmax.cuh", "read.cuh"),
    *("mask.cuh", "mma.cuh", "mbarrier.cuh", "tma.cuh", "wgmma.cuh", "swizzled_panel.cuh", "stream_k.cuh"),
)
_UNWRITTEN = 0x7FFF  # of O: kUnwritten in emulator/hopper.h
_GARBAGE = 0x5A5A5A5A  # in a workspace, which nobody initialises

_LAUNCH = """
extern "C" const char *run(const AttentionParams *params, int blocks, int cluster, int resident, int bytes,
                           unsigned seed) {
  return launch([=] { KERNEL(*params); }, kThreads, blocks, cluster, resident, bytes, seed);
}
"""
_PREPARE = """
extern "C" const char *prepare(const AttentionParams *params, int blocks, unsigned seed) {
  return launch([=] { KERNEL_prepare(*params); }, THREADS, blocks, 1, 1, 0, seed);
}
"""

_FUNCTION = re.compile(
    r"^(?P<indent> *)(?P<signature>(?:inline )?__device__[^{;]*?) "
    r"\{(?:\n.*?\n(?P=indent)\}|[^\n]*\})$",
    re.MULTILINE | re.DOTALL,
)
_STMATRIX = re.compile(r'asm volatile\("stmatrix[^:]*::(.*?)\s*: "memory"\);', re.DOTALL)


class EmulationError(AssertionError):
    """A launch that deadlocks, or does what a GPU forbids."""


@dataclass(frozen=True)
class Machine:
    """How much of the grid runs at a time, and in which order threads take turns."""

    blocks: int = 3  # persistent, or clusters of them
    resident: int = 2
    seed: int = 0


class EmulatedKernel:
    """One plan, compiled into `folder`; `mutate` changes the printed text."""

    def __init__(
        self, plan: KernelPlan, folder: Path, mutate: Callable[[str], str] = lambda text: text
    ) -> None:
        assert isinstance(plan.schedule, Sm90Schedule)
        self.plan = plan
        self.schedule = plan.schedule
        text = self._source(mutate(render(plan).text))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        source = folder / f"{plan.kernel}_{digest}.cpp"
        library = source.with_suffix(".so")
        if not library.exists():
            _precompile(folder / "before.h")
            source.write_text(text)
            compile_library(source, library)
        self._library = ctypes.CDLL(str(library))

    def _source(self, text: str) -> str:
        text = re.sub(r"#include .*", "", text)
        text = text.replace(
            "extern __shared__ char dynamic_shared[];", "char *dynamic_shared = emulator::shared_memory();"
        )
        launches = _LAUNCH
        if self.plan.preparation:
            launches += _PREPARE.replace("THREADS", str(PREPARE_THREADS[self.plan.preparation]))
        return "\n".join(
            [
                '#include "before.h"',
                without_assembly(text),
                *map(_part, ("hopper.h", "launch.h")),
                launches.replace("KERNEL", self.plan.kernel),
            ]
        )

    def __call__(self, case: Case, qkv: Sequence[Tensor], machine: Machine) -> tuple[Tensor, Tensor]:
        """O and lse of one launch. Raises `EmulationError`."""
        q, k, v = qkv
        plan = self.plan
        sizes = Sizes.of(q, k, plan.align)
        o = torch.full((*q.shape[:3], plan.head_dim_v), _UNWRITTEN, dtype=torch.int16)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
        given = case.given()
        inputs = arrange(Declarations.of(plan), given["tensors"], given["params"], given["sink"], name="case")
        shapes = parameters.Shapes(
            *(q.shape, k.shape, v.shape, o.shape),
            *(q.stride()[:3], k.stride()[:3], v.stride()[:3], o.stride()[:3]),
            tuple(tensor.stride() for tensor in inputs.tensors),
        )
        sms = machine.blocks * self.schedule.cluster
        prepared = parameters.Sm90Parameters(plan, shapes, sms)
        counters = torch.zeros(parameters.counter_words(plan, sms * plan.blocks_per_sm), dtype=torch.int32)
        self.workspace = torch.full((prepared.workspace_words,), _GARBAGE, dtype=torch.int32)
        maps = [torch.full(shape, -(2**20), dtype=torch.int32) for shape in prepared_shapes(plan, sizes)]
        with (
            patch.object(parameters, "encode_tensor_map", _encode),
            patch.object(parameters, "begins_with_address", lambda *_: True),
        ):
            qkvo = q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr()
            prepared.point_at(*qkvo, lse.data_ptr(), counters.data_ptr(), plan.scale)
        if prepared.workspace_words:
            prepared.point_at_workspace(self.workspace.data_ptr())
        self.links = self.workspace[prepared.partial_words :]
        prepared.inputs.write([tensor.data_ptr() for tensor in (*inputs.all_tensors(), *maps)], inputs.params)
        params = ctypes.c_void_p(prepared.address)
        if plan.preparation:
            self._run("prepare", params, blocks(plan, sizes), machine.seed)
        self._run(
            "run",
            *(params, prepared.grid, self.schedule.cluster, machine.resident, plan.smem_bytes, machine.seed),
        )
        if counters.any():
            raise EmulationError(f"counters are not left at 0: {counters.tolist()}")
        return o.view(q.dtype), lse

    def _run(self, function: str, *arguments: object) -> None:
        launch = getattr(self._library, function)
        launch.restype = ctypes.c_char_p
        if message := launch(*arguments):
            raise EmulationError(message.decode())


def _part(name: str) -> str:
    return (_FOLDER / name).read_text().replace("#pragma once", "")


def _precompile(before: Path) -> None:
    """What stands before every kernel: a third of the time that it takes to compile one."""
    if before.exists():
        return
    headers = (without_assembly(on_host(header, flags=False)) for header in _HEADERS)
    before.write_text("\n".join([stand_ins(_part("machine.h")), *headers]))
    compile_library(before, before.with_suffix(".h.gch"))


def without_assembly(text: str) -> str:
    """Functions with assembly in them are declared only."""

    def declared(match: re.Match[str]) -> str:
        return match[0] if "asm" not in match[0] else f"{match['indent']}{match['signature']};"

    text = _STMATRIX.sub(lambda match: f"store_matrices({match[1]});".replace('"r"', ""), text)
    return _FUNCTION.sub(declared, text)


def _encode(
    address: int, data: int, *, dtype: str, lengths: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> None:
    """In place of the driver's: `HostTensorMap` of emulator/hopper.h."""
    layout = _HostTensorMap.from_address(address)
    layout.data, layout.rank = data, len(lengths)
    for name, values in (("strides", strides), ("lengths", lengths), ("box", box)):
        getattr(layout, name)[: len(values)] = list(values)


class _HostTensorMap(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 5),
        ("lengths", ctypes.c_int32 * 5),
        ("box", ctypes.c_int32 * 5),
        ("rank", ctypes.c_int32),
    )


__all__ = ["EmulatedKernel", "EmulationError", "Machine", "without_assembly"]
