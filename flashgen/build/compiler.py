"""The compiler's identity, remembered between processes.

It is part of every cache key, and loading NVRTC to ask for it costs more than all the rest of a warm build.
So the answer lies in the cache folder, with the library that gave it; it holds while that file stays as it
was.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from flashgen.build import nvrtc
from flashgen.build.artifact import digest
from flashgen.build.cache import COMPILER_PREFIX, cache_dir

_SEARCHED = ("LD_LIBRARY_PATH", "CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX")  # where CuPy finds NVRTC
_MAPPINGS = Path("/proc/self/maps")  # Linux: the files that are loaded


def compiler_id() -> str:
    """`nvrtc.compiler_id`, without loading NVRTC where the answer is remembered.

    What is remembered is a guess: another library may be found first by now. A wrong one yields a kernel that
    the other NVRTC compiled from the same source, or a cache miss, after which the right one is known.
    """
    return recall() or remember(nvrtc.compiler_id())


def recall() -> str | None:
    """What is remembered, or None: nothing, or the library has changed since."""
    path = _path()
    try:
        memory = json.loads(path.read_bytes())
        library, stamp, compiler = memory["library"], memory["stamp"], memory["compiler"]
        return compiler if isinstance(compiler, str) and stamp == _stamp(library) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(compiler: str) -> str:
    """Keep `compiler` for the NVRTC that this process has loaded; returns it. Does nothing where the system
    does not tell which file that is.
    """
    library = _loaded_library()
    if library is None:
        return compiler
    memory = {"library": library, "stamp": _stamp(library), "compiler": compiler}
    path = _path()
    with suppress(OSError):  # the next process will ask NVRTC again
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as temporary:
            temporary.write(json.dumps(memory).encode())
        os.replace(temporary.name, path)
    return compiler


def _path() -> Path:
    """One memory for each set of places that NVRTC is searched for in."""
    cupy = find_spec("cupy")
    places = [sys.prefix, cupy.origin if cupy else None, *map(os.environ.get, _SEARCHED)]
    return cache_dir() / f"{COMPILER_PREFIX}{digest(json.dumps(places))[:16]}.json"


def _stamp(library: str) -> list[int]:
    status = os.stat(library)
    return [status.st_size, status.st_mtime_ns]


def _loaded_library() -> str | None:
    try:
        mappings = _MAPPINGS.read_text().splitlines()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[5] for line in mappings if "/" in line}
    found = [file for file in files if os.path.basename(file).startswith("libnvrtc.so")]
    return found[0] if len(found) == 1 else None  # two: no telling which one answers


__all__ = ["compiler_id", "recall", "remember"]
