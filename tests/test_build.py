"""Compiling without a GPU: the resource report, the compiler's errors, every spec for every target."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attention_cases import Case
from stopwatch import slowness, within

from flashgen.arch import ARCHS, arch
from flashgen.build import (
    Cubin,
    PlanMismatchWarning,
    Resources,
    artifact,
    build,
    cache,
    compile_source,
    compiler,
    elf,
    mismatches,
    nvrtc,
)
from flashgen.build import compile as compile_module
from flashgen.build.nvrtc import diagnostics
from flashgen.build.resources import parse_log
from flashgen.codegen import Source, render
from flashgen.errors import BuildError, Location
from flashgen.plan import KernelPlan, solve
from flashgen.spec import load_spec

SPECS = sorted((Path(__file__).parent.parent / "specs").glob("*.yaml"))
BUILDS = [
    pytest.param(path, target, id=f"{path.stem}-{target}")
    for path in SPECS
    for spec in [load_spec(path)]
    for target in (ARCHS if spec.target == "auto" else [spec.target])
]

# As NVRTC 13.0 wrote them.
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kern2' for 'sm_90a'
ptxas info    : Function properties for kern2
ptxas         .     400 bytes stack frame, 436 bytes spill stores, 520 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 400 bytes cumulative stack size
ptxas info    : Compile time = 31.223 ms
ptxas info    : Compiling entry function 'kern' for 'sm_90a'
ptxas info    : Function properties for kern
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 39 registers, used 1 barriers, 4096 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 77.014 ms
"""
LOG_SETMAXNREG = """\
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count.
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers
"""
LOG_WGMMA = LOG_SETMAXNREG.replace("C7508", "C7510").replace(
    "'setmaxnreg' ignored; unable to determine register count.",
    "wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma "
    "pipeline in function 'k'",
)
LOG_ERRORS = """\
kern.cu(7): error: identifier "flot" is undefined
      flot s=0;
      ^

tile.cuh(3): error #20: expected a ";"
    int x = y
             ^

kern.cu(1): catastrophic error: could not open source file "nothing.h" (no directories in search list)
  #include <nothing.h>
                      ^

3 errors detected in the compilation of "kern.cu".
"""


def test_report_is_that_of_the_kernel_and_spills_are_those_of_all() -> None:
    resources = parse_log(LOG, "kern", dynamic_smem=1000, compile_s=0.5)
    assert resources == Resources(
        registers=39, spill_bytes=436 + 520, stack_bytes=400, smem_bytes=4096 + 1000, compile_s=0.5
    )


def test_log_without_the_kernel_tells_nothing() -> None:
    assert parse_log(LOG, "other", dynamic_smem=0, compile_s=0) is None
    assert parse_log("", "kern", dynamic_smem=0, compile_s=0) is None


@pytest.mark.parametrize(("log", "code"), [(LOG_SETMAXNREG, "C7508"), (LOG_WGMMA, "C7510")])
def test_what_ptxas_gives_up_on_is_an_error(log: str, code: str) -> None:
    with pytest.raises(BuildError, match=code):
        parse_log(log, "k", dynamic_smem=0, compile_s=0)


def test_errors_are_found_at_their_lines() -> None:
    problems = list(diagnostics(LOG_ERRORS))
    assert [(problem.location, problem.message, problem.hint) for problem in problems] == [
        (Location("kern.cu", 7, 5), 'identifier "flot" is undefined', "flot s=0;"),
        (Location("tile.cuh", 3, 12), 'expected a ";"', "int x = y"),
        (
            Location("kern.cu", 1, 21),
            'could not open source file "nothing.h" (no directories in search list)',
            "#include <nothing.h>",
        ),
    ]


# -- the binary --------------------------------------------------------------------------------------------

GOOD = Source(
    "copy",
    '#include "size.cuh"\nextern "C" __global__ void copy(float *p) { p[threadIdx.x] = p[kSize]; }\n',
    {"size.cuh": "#pragma once\nconstexpr int kSize = 4;\n"},
)
HUNGRY = Source(
    "hungry",
    """\
extern "C" __global__ void hungry(const int *in, int *out) {
  __shared__ int s[64];
  int a[200];
  for (int i = 0; i < 200; ++i) a[i] = in[i];
  s[threadIdx.x % 64] = in[0];
  __syncthreads();
  out[threadIdx.x] = a[in[1]] + s[in[2]];
}
""",
    {},
)


@pytest.mark.compiler
@pytest.mark.parametrize("target", ARCHS)
@pytest.mark.parametrize("source", [HUNGRY, GOOD], ids=["local and shared memory", "neither"])
def test_binary_tells_what_the_report_tells(source: Source, target: str) -> None:
    cubin = compile_source(source, target, dynamic_smem=100)
    told = elf.resources(cubin.binary, source.name, dynamic_smem=100, compile_s=cubin.resources.compile_s)
    assert told == cubin.resources
    if source is HUNGRY:
        assert told.stack_bytes == 800 and told.smem_bytes == 356


@pytest.mark.compiler
def test_compilation_without_a_report_is_measured_by_its_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compile_source(HUNGRY, "sm_90a").resources
    compiled = nvrtc.compile_to_cubin
    monkeypatch.setattr(
        nvrtc, "compile_to_cubin", lambda *given: replace(compiled(*given), log="", seconds=1)
    )
    assert compile_source(HUNGRY, "sm_90a").resources == replace(expected, compile_s=1)
    with pytest.raises(BuildError, match="has no entry function 'other'"):
        compile_source(replace(HUNGRY, name="other"), "sm_90a")


@pytest.mark.compiler
def test_binary_is_whole_and_reproducible() -> None:
    binary = compile_source(GOOD, "sm_90a").binary
    (sections_at,) = struct.unpack_from("<Q", binary, 40)
    segments_at, segment_bytes, segments, section_bytes, sections = (
        *struct.unpack_from("<Q", binary, 32), *struct.unpack_from("<HHHH", binary, 54),
    )  # fmt: skip
    tables_end = max(segments_at + segment_bytes * segments, sections_at + section_bytes * sections)
    assert len(binary) == tables_end
    assert elf.whole(binary) == elf.whole(binary[:-1]) == binary
    for damaged in (binary[:-2], b"", b"\x7fELF", b"no ELF file" * 20):
        with pytest.raises(BuildError, match="incomplete"):
            elf.whole(damaged)
    assert compile_source(GOOD, "sm_90a").binary == binary


class OldNvrtc:
    """NVRTC as it was before it knew an option."""

    def __init__(self, nvrtc: Any, unknown: str) -> None:
        self._nvrtc, self._unknown = nvrtc, unknown
        self.calls: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nvrtc, name)

    def compileProgram(self, program: Any, options: list[str]) -> None:
        self.calls.append(options)
        spelt = {self._unknown: "--bogus=1"}  # what this NVRTC does not know either
        self._nvrtc.compileProgram(program, [spelt.get(option, option) for option in options])

    def getProgramLog(self, program: Any) -> str:
        return str(self._nvrtc.getProgramLog(program).replace("--bogus=1", self._unknown))


@pytest.mark.compiler
@pytest.mark.parametrize("unknown", ["--no-cache", "-frandom-seed=1"])
def test_option_that_nvrtc_does_not_know_is_left_out_from_then_on(
    monkeypatch: pytest.MonkeyPatch, unknown: str
) -> None:
    old = OldNvrtc(nvrtc._nvrtc(), unknown)
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: old)
    monkeypatch.setattr(nvrtc, "_refused", set())
    assert compile_source(GOOD, "sm_90a").resources.registers > 0
    assert [unknown in call for call in old.calls[:2]] == [True, False]
    old.calls.clear()
    compile_source(GOOD, "sm_90a")
    assert [unknown in call for call in old.calls] == [False]
    with pytest.raises(BuildError, match=r"NVRTC.*\n.*--nonsense"):
        nvrtc.compile_to_cubin(GOOD, ("-arch=sm_90a", "--nonsense"))


# -- against the plan --------------------------------------------------------------------------------------


@pytest.fixture
def plan() -> KernelPlan:
    return solve(Case(mask="causal", seqlen_q=1024, seqlen_kv=1024).spec(), arch("sm_80"))


def test_kernel_that_keeps_its_plan_has_no_mismatch(plan: KernelPlan) -> None:
    assert mismatches(plan, Resources(plan.registers, 0, 0, plan.smem_bytes)) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill_bytes": 8}, "8 bytes of registers spill"),
        ({"stack_bytes": 64}, "64 bytes of stack"),
        ({"smem_bytes": 999_999}, "999,999 B of shared memory; the plan says"),
        ({"registers": 2048}, "0 blocks of"),
    ],
)
def test_each_broken_promise_is_named(plan: KernelPlan, changes: dict[str, int], message: str) -> None:
    kept = Resources(plan.registers, 0, 0, plan.smem_bytes)
    (problem,) = mismatches(plan, replace(kept, **changes))
    assert message in problem.message and plan.kernel in problem.message


@pytest.mark.compiler
def test_mismatch_warns_users_and_fails_tests(plan: KernelPlan) -> None:
    greedy = replace(plan, blocks_per_sm=100)
    with pytest.warns(PlanMismatchWarning, match="the plan says 100"):
        cubin = build(greedy)
    assert cubin.binary.startswith(b"\x7fELF")
    with pytest.raises(BuildError, match="the plan says 100"):
        build(greedy, on_mismatch="raise")


# -- the compiler ------------------------------------------------------------------------------------------


@pytest.mark.compiler
@pytest.mark.parametrize("target", ARCHS)
def test_every_target_compiles_without_a_gpu(target: str) -> None:
    cubin = compile_source(GOOD, target, dynamic_smem=100)
    assert cubin.binary.startswith(b"\x7fELF") and cubin.path is None
    assert 0 < cubin.resources.registers < 32 and cubin.resources.smem_bytes == 100
    assert cubin.manifest["target"] == target and f"-arch={target}" in cubin.manifest["options"]


@pytest.mark.compiler
def test_compile_errors_name_line_and_column() -> None:
    bad = Source("copy", GOOD.text.replace("kSize", "kSpeed"), GOOD.headers)
    with pytest.raises(BuildError) as error:
        compile_source(bad, "sm_90a")
    (problem,) = error.value.problems
    column = bad.text.splitlines()[1].index("kSpeed") + 1
    assert problem.location == Location("copy.cu", 2, column)
    assert 'identifier "kSpeed" is undefined' in problem.message
    assert error.value.__cause__ is None and error.value.__suppress_context__


@pytest.mark.compiler
def test_errors_in_headers_name_the_header() -> None:
    bad = Source("copy", GOOD.text, {"size.cuh": "constexpr int kSize = four;\n"})
    with pytest.raises(BuildError, match=r"size\.cuh:1:23: identifier \"four\" is undefined"):
        compile_source(bad, "sm_90a")


@pytest.mark.compiler
def test_errors_of_the_assembler_are_reported() -> None:
    bad = Source("copy", GOOD.text.replace("{ p", '{ asm volatile("foo.bar;"); p'), GOOD.headers)
    with pytest.raises(BuildError, match="ptxas: Not a name of any known instruction: 'foo'"):
        compile_source(bad, "sm_90a")


@pytest.mark.compiler
def test_more_shared_memory_than_there_is_is_an_error() -> None:
    body = "__shared__ float s[99999]; s[threadIdx.x] = *p; __syncthreads(); *p = s[0];"
    text = f'extern "C" __global__ void copy(float *p) {{ {body} }}'
    with pytest.raises(BuildError, match="too much shared data"):
        compile_source(Source("copy", text, {}), "sm_90a")


@pytest.mark.compiler
def test_toolkit_headers_are_searched_only_when_needed() -> None:
    assert not any("include" in option for option in nvrtc.options(GOOD, "sm_90a"))
    needs = Source("copy", "#include <cuda_bf16.h>\n" + GOOD.text, GOOD.headers)
    assert any("include" in option for option in nvrtc.options(needs, "sm_90a"))
    assert compile_source(needs, "sm_90a").resources.spill_bytes == 0


@pytest.mark.compiler
def test_cold_build_takes_seconds_and_a_warm_one_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    plan = solve(Case(mask="causal", head_dim_qk=128, head_dim_v=128).spec(), arch("sm_80"))
    with within(5):
        cold = build(plan)
    with within(0.5):
        warm = [build(plan) for _ in range(5)]
    assert all(again.binary == cold.binary and again.path == cold.path for again in warm)


@pytest.mark.compiler
def test_warm_build_in_a_new_process_does_not_load_nvrtc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    plan = tmp_path / "plan"
    plan.write_bytes(pickle.dumps(solve(Case(mask="causal").spec(), arch("sm_80"))))
    code = """
import pathlib, pickle, sys, time
from flashgen.build import build
plan = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
started = time.process_time()  # not of what else runs on the machine
build(plan)
print(time.process_time() - started, "cupy" in sys.modules)
"""
    told = [
        subprocess.run(
            [sys.executable, "-c", code, str(plan)], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(6)
    ]
    assert [loaded for _, loaded in told] == ["True"] + 5 * ["False"]
    # A tenth of a second, for the templates to be read.
    assert min(float(seconds) for seconds, _ in told[1:]) < 0.15 * slowness()


@pytest.mark.compiler
def test_threads_may_compile_first_at_the_same_time() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from flashgen.build.nvrtc import compile_to_cubin
from flashgen.codegen import Source
source = Source("k", 'extern "C" __global__ void k() {}', {})
together = Barrier(8)
def first(_):
    together.wait()
    return compile_to_cubin(source, ("-arch=sm_80",)).binary
with ThreadPoolExecutor(8) as threads:
    assert len(set(threads.map(first, range(8)))) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library that is loaded, and remembered to be NVRTC 1."""
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    library = tmp_path / "libnvrtc.so.13"
    library.write_bytes(b"1")
    mappings = tmp_path / "maps"
    mappings.write_text(f"7f00-7f01 r-xp 00000000 00:1d 42   {library}\n7f02-7f03 rw-p 00000000 00:00 0\n")
    monkeypatch.setattr(compiler, "_MAPPINGS", mappings)
    monkeypatch.setattr(nvrtc, "compiler_id", lambda: "NVRTC 2")
    assert compiler.remember("NVRTC 1") == "NVRTC 1"
    return library


def test_compiler_is_remembered_while_its_library_stays(remembered: Path) -> None:
    assert compiler.compiler_id() == "NVRTC 1"
    remembered.write_bytes(b"22")
    assert compiler.recall() is None
    assert compiler.compiler_id() == "NVRTC 2" == compiler.recall()
    remembered.unlink()
    assert compiler.recall() is None


def test_compiler_is_remembered_for_the_places_it_is_searched_in(
    remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_PATH", "/elsewhere")
    assert compiler.recall() is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"library": 1, "stamp": [1], "compiler": "x"}'])
def test_damaged_memory_of_the_compiler_is_ignored(remembered: Path, text: str) -> None:
    (memory,) = cache.cache_dir().iterdir()
    memory.write_text(text)
    assert compiler.recall() is None


def test_clear_forgets_the_compiler(remembered: Path) -> None:
    assert cache.clear() == 0 and not list(cache.cache_dir().iterdir())


def test_entry_lies_under_the_compiler_that_made_it(
    plan: KernelPlan, remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the memory was wrong."""
    made = Cubin(b"", render(plan), plan.target, Resources(1, 0, 0, plan.smem_bytes), {"compiler": "NVRTC 2"})
    manifest = artifact.describe(made.source, made.target, (), made.resources, "NVRTC 2")
    monkeypatch.setattr(compile_module, "_compiled", lambda *_: replace(made, manifest=manifest))
    built = build(plan)
    options = nvrtc.options(made.source, plan.target)
    assert built.path is not None
    assert built.path.parent.name == cache.cache_key(made.source, options, "NVRTC 2")
    assert compiler.recall() == "NVRTC 2"


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize(("path", "target"), BUILDS)
def test_every_spec_builds_as_planned(path: Path, target: str) -> None:
    plan = solve(load_spec(path), arch(target))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanMismatchWarning)
        cubin = build(plan, on_mismatch="raise")
    assert cubin.resources.spill_bytes == 0 and cubin.resources.stack_bytes == 0
    assert cubin.resources.smem_bytes == plan.smem_bytes <= arch(target).smem_per_block
    assert cubin.resources.registers <= arch(target).max_registers_per_thread
    # The dynamic part is not in the compiler's report; the source holds sizeof against this number instead.
    assert (
        str(plan.smem_bytes) in cubin.source.text
        and "static_assert(sizeof(SharedStorage)" in cubin.source.text
    )
