"""NVRTC: CUDA source -> cubin for any target, with neither a GPU nor a driver.

CuPy ships the bindings and finds the library. Its own `RawModule(code=...)` is not used: it appends a plain
``-arch=sm_90`` and so cannot reach sm_90a, and its disk cache does not see edits in included headers.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from flashgen.build.elf import whole
from flashgen.codegen import Source
from flashgen.errors import BuildError, Location, Problem

_SYSTEM_INCLUDE = re.compile(r"^\s*#\s*include\s*<([^>]+)>", re.MULTILINE)
_DIAGNOSTIC = re.compile(
    r"^(?P<file>[^\s(][^(\n]*)\((?P<line>\d+)\): (?:catastrophic )?error(?: #\S+)?: (?P<message>.*)$"
)
_ASSEMBLER = re.compile(r"^\s*ptxas (?:.*?;\s*)?(?:error|fatal)\s*: (?P<message>.*)$")

_INVALID_OPTION = 5  # NVRTC_ERROR_INVALID_OPTION
_WHERE_KNOWN = (
    "--no-cache",  # since 12.9 NVRTC keeps compilations on disk, and tells nothing of the resources on a hit
    "-frandom-seed=1",  # otherwise names in anonymous namespaces hold the process and the time
)
_loading = Lock()
_refused: set[str] = set()  # of these, by the NVRTC that is loaded: it is too old for them


@dataclass(frozen=True)
class Compilation:
    """What came out of one run of the compiler."""

    binary: bytes
    log: str
    seconds: float


def options(source: Source, target: str) -> tuple[str, ...]:
    """What `source` is compiled with. Include folders are named only where the source needs one."""
    chosen = [f"-arch={target}", "-std=c++17", "--ptxas-options=-v"]
    texts = (source.text, *source.headers.values())
    wanted = {name for text in texts for name in _SYSTEM_INCLUDE.findall(text)}
    if wanted - source.headers.keys():
        chosen.append(f"--include-path={toolkit_headers()}")
    return tuple(chosen)


def compile_to_cubin(source: Source, chosen: tuple[str, ...]) -> Compilation:
    """Compile. Raises `BuildError` with one problem for each of the compiler's errors, at its line of the
    source.
    """
    nvrtc = _nvrtc()
    names = list(source.headers)
    program = nvrtc.createProgram(
        source.text,
        f"{source.name}.cu",
        [source.headers[name].encode() for name in names],
        [n.encode() for n in names],
    )
    started = time.perf_counter()
    try:
        _compile(nvrtc, program, chosen)
        seconds = time.perf_counter() - started
        return Compilation(whole(nvrtc.getCUBIN(program)), nvrtc.getProgramLog(program), seconds)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise BuildError(
            list(diagnostics(log)) or [Problem(f"NVRTC: {error}", hint=log.strip() or None)]
        ) from None
    finally:
        nvrtc.destroyProgram(program)


def _compile(nvrtc: Any, program: Any, chosen: tuple[str, ...]) -> None:
    """With those of `_WHERE_KNOWN` that this NVRTC knows."""
    while True:
        wanted = [option for option in _WHERE_KNOWN if option not in _refused]
        try:
            nvrtc.compileProgram(program, [*chosen, *wanted])
            return
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            unknown = [option for option in wanted if option.partition("=")[0] in log]
            if error.status != _INVALID_OPTION or not unknown:
                raise
            _refused.update(unknown)


def diagnostics(log: str) -> Iterator[Problem]:
    """The errors in a log: ``file(line): error: ...``, the source line, and a caret under the column."""
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if match := _DIAGNOSTIC.match(line):
            quoted, caret = (*lines[number + 1 : number + 3], "", "")[:2]
            # NVRTC quotes the line two columns to the right of where it stands in the file.
            column = caret.index("^") - 1 if caret.strip() == "^" else 1
            location = Location(match["file"], int(match["line"]), max(column, 1))
            yield Problem(match["message"], location, hint=quoted.strip() or None)
        elif match := _ASSEMBLER.match(line):
            yield Problem(f"ptxas: {match['message']}")


def compiler_id() -> str:
    """The compiler's own name for itself, down to the build: it heads every PTX file that it writes.

    `nvrtcVersion` knows only major and minor, too coarse for a cache key.
    """
    with _loading:
        return _loaded()[1]


@cache
def toolkit_headers() -> Path:
    """The CUDA headers: those of the wheel ``nvidia-cuda-runtime``, or a toolkit's. Raises `BuildError`
    without any.
    """
    for folder in _header_candidates():
        if (folder / "cuda_runtime.h").is_file():
            return folder
    raise BuildError(
        "the source includes CUDA headers, and none were found",
        hint="pip install nvidia-cuda-runtime (for CUDA 12: nvidia-cuda-runtime-cu12), or set CUDA_HOME",
    )


def _header_candidates() -> Iterator[Path]:
    packages = find_spec(
        "nvidia"
    )  # a namespace package: CUDA 13 wheels share nvidia/cu13, CUDA 12's have one each
    for root in (packages.submodule_search_locations or ()) if packages else ():
        yield from sorted(Path(root).glob("cu*/include"), reverse=True)
        yield Path(root) / "cuda_runtime" / "include"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if name in os.environ:
            yield Path(os.environ[name]) / "include"
    yield Path("/usr/local/cuda/include")


def _nvrtc() -> Any:
    """CuPy's bindings. Raises `BuildError` where they, or NVRTC itself, cannot be loaded."""
    with _loading:
        return _loaded()[0]


@cache
def _loaded() -> tuple[Any, str]:
    """The bindings and `compiler_id`, for one thread at a time: the first compilation loads NVRTC's builtins,
    and one beside it fails, as if they were not installed.
    """
    hint = "pip install 'flashgen[cuda13]', or 'flashgen[cuda12]' for drivers older than 580"
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise BuildError(
            f"CuPy, through which flashgen calls NVRTC, cannot be imported: {error}", hint=hint
        ) from None
    try:
        nvrtc.getVersion()
    except (
        Exception
    ) as error:  # CuPy raises RuntimeError or its pathfinder's own error when the library is missing
        raise BuildError(f"NVRTC cannot be loaded: {error}", hint=hint) from None
    program = nvrtc.createProgram("", "version.cu", [], [])
    try:
        nvrtc.compileProgram(program, ["-arch=compute_80"])
        banner = nvrtc.getPTX(program).decode(errors="replace")
    finally:
        nvrtc.destroyProgram(program)
    names = (line.removeprefix("//").strip() for line in banner.splitlines() if line.startswith("// C"))
    return nvrtc, " ".join(names)


__all__ = ["Compilation", "compile_to_cubin", "compiler_id", "diagnostics", "options", "toolkit_headers"]
