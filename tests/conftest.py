"""What all tests share: a cache folder of their own, and reasons for what cannot run here."""

from __future__ import annotations

import os
from functools import cache

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: workers with a thread per core each would mostly wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@cache
def missing_gpu() -> str | None:
    """Why GPU tests cannot run, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch is not installed: {error}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


@cache
def missing_compiler() -> str | None:
    """Why tests that compile cannot run, or None."""
    from flashgen.build.nvrtc import compiler_id
    from flashgen.errors import BuildError

    try:
        compiler_id()
    except BuildError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, missing in (("gpu", missing_gpu), ("compiler", missing_compiler)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """No test reads or writes the user's cache; within a session, a kernel is compiled once per worker."""
    folder = tmp_path_factory.mktemp("flashgen-cache")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHGEN_CACHE_DIR", str(folder))
        yield folder
