"""What the GPU tests share: kernel families, and outputs that are poisoned before they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_exact
from gpu_kernels import FAMILIES, kernel_of, missing


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each kernel family that runs on this GPU."""
    if reason := missing(request.param):
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that a launch allocates is full of NaN before the kernel writes to it."""
    empty = torch.empty

    def full_of_nan(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(torch.nan) if tensor.is_cuda and tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", full_of_nan)


Check = Callable[[Case], None]


@pytest.fixture
def check(family: str, poisoned: None) -> Check:
    """Run a case and hold it against float64."""

    def run(case: Case) -> None:
        q, k, v = case.tensors("cuda")
        o, lse = kernel_of(case, family)(q, k, v, return_lse=True)
        assert o.is_contiguous()
        assert_exact(case, o, lse, q, k, v)

    return run
