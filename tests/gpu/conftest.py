"""What the GPU tests share: kernel families, and outputs that are poisoned before they are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attention_cases import Case, assert_exact
from gpu_kernels import FAMILIES, finish, kernel_of, missing
from poison import poison


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each kernel family that runs on this GPU."""
    if reason := missing(request.param):
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def hopper() -> None:
    """For tests of what the sm90 family alone has."""
    if reason := missing("sm90"):
        pytest.skip(reason)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that a launch allocates holds what no kernel writes: outputs, ranges, lists of tiles."""
    poison(monkeypatch)


Check = Callable[[Case], None]


@pytest.fixture
def check(family: str, poisoned: None) -> Check:
    """Run a case and hold it against float64."""

    def run(case: Case) -> None:
        q, k, v = case.tensors("cuda")
        given = case.given("cuda")
        o, lse = kernel_of(case, family)(q, k, v, return_lse=True, **given)
        finish(case, family)
        assert o.is_contiguous()
        assert_exact(case, o, lse, q, k, v, **given)

    return run
