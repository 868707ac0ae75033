"""Every device header compiles alone: under NVRTC, and under nvcc where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from flashgen.codegen import Source
from flashgen.codegen.environment import templates_dir

DEVICE = templates_dir() / "device"
HEADERS = sorted(path.name for path in DEVICE.glob("*.cuh"))
TARGET = "sm_90a"  # has the instructions of both families


def probe(header: str) -> str:
    return f'#include "{header}"\n#include "{header}"\nextern "C" __global__ void probe() {{}}\n'


def test_headers_are_found() -> None:
    assert {"types.cuh", "mma.cuh", "softmax.cuh"} <= set(HEADERS)


@pytest.mark.parametrize("name", HEADERS)
def test_opens_with_what_it_is_and_a_guard(name: str) -> None:
    lines = (DEVICE / name).read_text().splitlines()
    assert lines[0].startswith("// ")
    assert "#pragma once" in lines


@pytest.mark.compiler
@pytest.mark.parametrize("name", HEADERS)
def test_compiles_alone_under_nvrtc(name: str) -> None:
    from flashgen.build import compile_source

    headers = {header: (DEVICE / header).read_text() for header in HEADERS}
    compile_source(Source("probe", probe(name), headers), TARGET)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path")
def test_all_compile_under_nvcc(tmp_path: Path) -> None:
    file = tmp_path / "probe.cu"
    file.write_text("".join(f'#include "{name}"\n' for name in HEADERS) + "__global__ void probe() {}\n")
    command = [
        "nvcc",
        "-std=c++17",
        f"-arch={TARGET}",
        "-I",
        str(DEVICE),
        "-cubin",
        "-o",
        str(tmp_path / "probe"),
    ]
    result = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
