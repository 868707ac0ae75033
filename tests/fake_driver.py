"""A driver that records launches instead of making them, and the plans that the tests launch through it."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import GALLERY_CASES, Case
from torch import Tensor

from flashgen.arch import arch
from flashgen.plan import KernelPlan, MaskPlan, Sm90Schedule, solve
from flashgen.plan.model import ScorePlan
from flashgen.runtime import launch, preparation
from flashgen.runtime.counters import TileCounters
from flashgen.runtime.inputs import Inputs
from flashgen.runtime.launch import LoadedKernel
from flashgen.runtime.layouts import Outputs, Run
from flashgen.runtime.structs import struct_of

CASE = Case(mask="causal", heads_kv=2, group=2, seqlen_q=300, seqlen_kv=500, batch=3)


def sm80_plan() -> KernelPlan:
    return solve(replace(CASE, tiles={"q": 128, "kv": 64}).spec(), arch("sm_80"))


def sm90_plan(**schedule: Any) -> KernelPlan:
    hopper = {"family": "sm90", "target": "sm_90a", "warps": 8, "stages": 2, "blocks_per_sm": 1}
    return replace(sm80_plan(), tile_kv=128, smem_bytes=232_448, schedule=Sm90Schedule(**schedule), **hopper)


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
        loaded._workspaces = None  # allocated by each call
        self.loaded = loaded

        def allocate(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty_strided(size, stride, dtype=dtype)

        for module, name, value in (
            (torch._C, "_cuda_getCurrentRawStream", lambda index: stream),
            (torch._C, "_cuda_getDevice", lambda: -1),
            (loaded._counters, "_capturing", lambda: False),
            (launch, "empty_strided", allocate),
            (preparation, "empty_words", lambda shape, device: torch.empty(shape, dtype=torch.int32)),
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
