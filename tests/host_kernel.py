"""The printed mathematics of a plan compiled for the CPU, so that its arithmetic is compared without a GPU.

What `templates/kernels/{inputs,elements,prepare}.cuh.j2` print is compiled by g++ behind stand-ins for what
only CUDA has. An approximate instruction is the function that it approximates. A thread of a warp runs alone,
and votes alone, but in the kernel that maps tiles: its blocks are threads of the host.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashgen.codegen import PREPARE_THREADS, render
from flashgen.codegen.elements import elements
from flashgen.codegen.environment import environment, templates_dir
from flashgen.plan.model import KernelPlan

COMPILER = shutil.which("g++")

Array = npt.NDArray[np.int32]

_HEADERS = (
    *("types.cuh", "integer.cuh", "softmax.cuh", "elementary.cuh"),
    *("capped_softmax.cuh", "read.cuh", "mask.cuh"),
)

_STAND_INS = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static
using std::abs, std::max, std::min;
struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
inline float __int_as_float(int bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float from_half(unsigned short bits) { _Float16 x; std::memcpy(&x, &bits, 2); return x; }
inline uint32_t to_half(float x) {
  const _Float16 rounded = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint32_t to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? 0.0f : x; }
inline float __logf(float x) { return std::log(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
WARPS
inline bool __any_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, vote) != 0; }
inline bool __all_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, !vote) == 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T> T __ldg(const T *address) {
  T value;
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) == 0) {
    std::memcpy(&value, address, sizeof(T));
  } else {
    std::memset(&value, 0xff, sizeof(T));  // NaN, where CUDA faults
  }
  return value;
}
inline void __threadfence_block() {}
inline void __threadfence() {}
template <typename T> T __ldcg(const T *address) { return *address; }
template <typename T> void __stcg(T *address, T value) { *address = value; }
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
"""

_ALONE = """
inline float __shfl_xor_sync(unsigned, float x, int) { return x; }
inline unsigned __ballot_sync(unsigned, bool vote) { return vote; }
"""

_TOGETHER = """
inline float __shfl_xor_sync(unsigned, float x, int) { return x; }
#include <barrier>
#include <memory>
#include <thread>
#include <vector>
struct Warp {
  std::barrier<> barrier{32};
  unsigned ballots[2] = {0, 0};
  int turn = 0;
};
static thread_local Warp *warp_of_thread = nullptr;  // null: a thread alone
static thread_local int turn = 0;
static std::barrier<> *block = nullptr;
inline unsigned __ballot_sync(unsigned, bool vote) {
  if (warp_of_thread == nullptr) return vote;
  unsigned &ballot = warp_of_thread->ballots[turn];
  turn = 1 - turn;
  if (vote) __atomic_fetch_or(&ballot, 1u << (threadIdx.x % 32), __ATOMIC_RELAXED);
  warp_of_thread->barrier.arrive_and_wait();
  const unsigned result = ballot;
  warp_of_thread->barrier.arrive_and_wait();
  if (threadIdx.x % 32 == 0) ballot = 0;
  return result;
}
inline void __syncthreads() { block->arrive_and_wait(); }
"""

# Exponentials of the scores: the softmax's own, but for its maximum.
_CAPPED = """
    CappedSoftmax softmax;
    float correction[2];
    softmax.update(s, CAP, correction, Masked{});
    for (auto &columns : s)
      for (int e = 0; e < 4; ++e) columns[e] *= exp2_approx(softmax.reference[e / 2]);
"""

_INSTRUCTIONS = {
    "ex2.approx": "flushed(std::exp2(x))",
    "rcp.approx": "1.0f / x",
    "lg2.approx": "std::log2(x)",
    "rsqrt.approx": "1.0f / std::sqrt(x)",
    "sqrt.approx": "std::sqrt(x)",
}

_PAIRS = {"bf16x2": "to_bfloat", "f16x2": "to_half"}

_FLAGS = {
    "st.release": "__atomic_store_n(flag, 1u, __ATOMIC_RELEASE);",
    "st.relaxed": "__atomic_store_n(flag, 0u, __ATOMIC_RELAXED);",
    "ld.acquire": "raised = __atomic_load_n(flag, __ATOMIC_ACQUIRE);",
}

_DRIVERS = """
extern "C" void score(int batch, int head, int q_begin, int kv_begin, float *tile) {
  for (int lane = 0; lane < 32; ++lane) {
    threadIdx.x = lane;
    float s[kTileKv / 8][4];
    float *own = tile + lane / 4 * kTileKv + 2 * (lane % 4);
    for (int j = 0; j < kTileKv / 8; ++j)
      for (int e = 0; e < 4; ++e) s[j][e] = own[e / 2 * 8 * kTileKv + 8 * j + e % 2];
    const int q = q_begin + lane / 4;
    TERMS
    BODY
    for (int j = 0; j < kTileKv / 8; ++j)
      for (int e = 0; e < 4; ++e) own[e / 2 * 8 * kTileKv + 8 * j + e % 2] = s[j][e];
  }
}
"""


_BLOCKS = """
extern "C" void prepare(int blocks) {
  constexpr int kThreads = 512;
  for (int index = 0; index < blocks; ++index) {
    std::barrier<> all(kThreads);
    block = &all;
    std::unique_ptr<Warp[]> warps(new Warp[kThreads / 32]);
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        threadIdx.x = i, blockIdx.x = index, warp_of_thread = &warps[i / 32];
        KERNEL(params);
      });
    }
    for (std::thread &thread : threads) thread.join();
  }
}
"""


class HostKernel:
    """The functions of one plan's elements, and its parameters. `folder` keeps what was compiled."""

    def __init__(self, plan: KernelPlan, folder: Path) -> None:
        self.plan = plan
        self.elements = elements(plan)
        self.capped = self.elements.score is not None and self.elements.score.capped
        text = self._source()
        # The kernel's name does not tell how its tensors are declared.
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        source = folder / f"{plan.kernel}_{digest}.cpp"
        library = source.with_suffix(".so")
        if not library.exists():
            source.write_text(text)
            compile_library(source, library)
        self._library = ctypes.CDLL(str(library))
        self._kept: list[npt.NDArray[Any]] = []

    def _source(self) -> str:
        plan = self.plan
        text = render(plan).text
        layout = re.search(r"struct AttentionParams \{.*?\n\};", text, re.DOTALL)
        assert layout is not None
        parts = [
            stand_ins(_TOGETHER if plan.preparation == "map" else _ALONE),
            *map(on_host, _HEADERS),
            f"constexpr int kTileQ = {plan.tile_q}, kTileKv = {plan.tile_kv};",
            environment().get_template("kernels/inputs.cuh.j2").render(plan=plan),
            layout[0],
            environment().get_template("kernels/elements.cuh.j2").render(plan=plan),
            "static AttentionParams params;",
        ]
        terms = "const HeadTerms terms = head_terms(params, batch, head);" if self.elements.head_terms else ""
        for name in [
            n for n, part in (("score", self.elements.score), ("mask", self.elements.listed)) if part
        ]:
            kind = "score" if name == "score" else "keep"
            queries = self.elements.score_queries if kind == "score" else self.elements.keep_queries
            body = f"apply_{name}(s, params{self.elements.terms}{queries}, q, q + 8, kv_begin);"
            if queries:
                of = [f"{kind}_query(params{self.elements.terms}, {row})" for row in ("q", "q + 8")]
                body = f"const {kind.capitalize()}Query {kind}_queries[2] = {{{', '.join(of)}}}; {body}"
            if name == "score" and self.capped:
                body = _CAPPED.replace("CAP", f"{self.elements.score.tanh}")
            driver = _DRIVERS.replace("void score", f"void {name}_tile")
            parts.append(driver.replace("TERMS", terms).replace("BODY", body))
        members = ["batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_kv", "scale"]
        members += [f"inputs.{name}" for line in self.elements.inputs for name in _declared(line)]
        parts += [f'extern "C" void *at_{m.replace(".", "_")}() {{ return &params.{m}; }}' for m in members]
        if self.elements.listed and plan.preparation is None:
            parts.append(
                f"""extern "C" int visit(int batch, int head, int q_first, int q_last, int *words) {{
                  {terms}
                  Visits visits = {{params{self.elements.terms}, q_first, q_last, 0}};
                  int count = 0;
                  while ((words[count] = visits.next()) >= 0) ++count;
                  return count;
                }}"""
            )
        if not self.elements.listed:
            segment = self.elements.segments[0]
            lengths = "const int seqlen_q = params.seqlen_q, seqlen_kv = params.seqlen_kv;"
            for name, text in (("first", segment.first or "0"), ("last", segment.last or "seqlen_kv - 1")):
                body = f"{terms} {lengths} return {text};"
                parts.append(f'extern "C" int {name}_key(int batch, int head, int q) {{ {body} }}')
        if plan.preparation == "map":
            parts.append(environment().get_template("kernels/prepare.cuh.j2").render(plan=plan))
            parts.append(_BLOCKS.replace("KERNEL", f"{plan.kernel}_prepare"))
        if plan.preparation == "ranges":
            parts.append(environment().get_template("kernels/prepare.cuh.j2").render(plan=plan))
            parts.append(
                f"""extern "C" void prepare(int blocks) {{
                  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
                    for (threadIdx.x = 0; threadIdx.x < 128; ++threadIdx.x) {plan.kernel}_prepare(params);
                }}"""
            )
        return "\n".join(parts)

    def set(self, **values: int | float) -> None:
        """Members of `AttentionParams`, and parameters among its `inputs`, as ``inputs_<name>``."""
        for name, value in values.items():
            type = ctypes.c_float if isinstance(value, float) else ctypes.c_int32
            type.from_address(self._address(name)).value = value

    def give(self, name: str, array: npt.NDArray[Any]) -> None:
        """A tensor among the `inputs`, in its memory's dtype, its last axis contiguous."""
        self._kept.append(array)
        ctypes.c_void_p.from_address(self._address(f"inputs_{name}")).value = array.ctypes.data
        strides = [step // array.itemsize for step in array.strides[:-1]]
        if strides:
            held = (ctypes.c_int64 * len(strides)).from_address(self._address(f"inputs_{name}_stride"))
            for place, stride in enumerate(strides):
                held[place] = stride

    def _address(self, member: str) -> int:
        function = getattr(self._library, f"at_{member}")
        function.restype = ctypes.c_void_p
        return int(function())

    def tile(self, what: str, batch: int, head: int, q: int, kv: int, s: npt.NDArray[np.float32]) -> None:
        """Apply the score or the mask to 16 rows from position `q` on and one tile of keys, in place."""
        assert s.shape == (16, self.plan.tile_kv) and s.flags.c_contiguous
        function = getattr(self._library, f"{what}_tile")
        function(batch, head, q, kv, s.ctypes.data_as(ctypes.c_void_p))

    def visits(self, batch: int, head: int, q_first: int, q_last: int) -> list[tuple[int, bool]]:
        """Key tiles of the rows at positions q_first..q_last, and whether each is masked."""
        words = (ctypes.c_int * 4096)()
        count = self._library.visit(batch, head, q_first, q_last, words)
        return [(word // 2, word % 2 == 1) for word in words[:count]]

    def ends(self, batch: int, head: int, q: int) -> tuple[int, int]:
        """First and last kept key of the row at position q, not cut to the keys that exist."""
        return self._library.first_key(batch, head, q), self._library.last_key(batch, head, q)

    def prepare_ranges(self, batches: int, heads: int, seqlen_q: int) -> list[Array]:
        """Run the preparation kernel; the first and the last key of each row, [batches, heads, seqlen_q]."""
        return self._prepare(
            dict.fromkeys(("key_first", "key_last"), (batches, heads, seqlen_q)),
            batches * heads * -(-seqlen_q // PREPARE_THREADS["ranges"]),
        )

    def prepare_map(self, batches: int, heads: int, q_tiles: int, kv_tiles: int) -> list[Array]:
        """Run the preparation kernel; `tile_counts` and `tile_list`."""
        shape = (batches, heads, q_tiles)
        return self._prepare(
            {"tile_counts": shape, "tile_list": (*shape, kv_tiles)}, batches * heads * q_tiles
        )

    def _prepare(self, shapes: dict[str, tuple[int, ...]], blocks: int) -> list[Array]:
        arrays = [np.full(shape, -7, np.int32) for shape in shapes.values()]
        for name, array in zip(shapes, arrays, strict=True):
            self._kept.append(array)
            ctypes.c_void_p.from_address(self._address(f"inputs_{name}")).value = array.ctypes.data
        self._library.prepare(blocks)
        return arrays


def stand_ins(warps: str) -> str:
    """What only CUDA has; `warps` is how threads of a warp exchange votes and values."""
    return _STAND_INS.replace("WARPS", warps)


def compile_device_code(headers: tuple[str, ...], text: str, folder: Path) -> ctypes.CDLL:
    """Headers of `templates/device/`, for a thread alone, with a program that uses them."""
    source = folder / "device_code.cpp"
    library = source.with_suffix(".so")
    source.write_text("\n".join([stand_ins(_ALONE), *map(on_host, headers), text]))
    compile_library(source, library)
    return ctypes.CDLL(str(library))


def compile_library(source: Path, library: Path) -> None:
    command = [str(COMPILER), "-std=c++20", "-pthread", "-O1", "-w", "-shared", "-fPIC", "-o", str(library)]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _declared(line: str) -> list[str]:
    """The names that a line of a struct declares."""
    declaration = line.partition(";")[0].partition("[")[0]
    return [re.split(r"[ *]", part)[-1] for part in declaration.split(",")]


def on_host(header: str, *, flags: bool = True) -> str:
    """A device header with host functions for its instructions; of `flags`, those that threads share."""
    text = (templates_dir() / "device" / header).read_text()
    for instruction, value in _INSTRUCTIONS.items():
        pattern = r'float y;\s*asm\("' + re.escape(instruction) + r"[^;]*;[^;]*;\s*return y;"
        text = re.sub(pattern, f"return {value};", text)
    text = re.sub(
        r'float value;\s*asm\("cvt.f32.f16[^;]*;[^;]*;', "float value = from_half(element.bits);", text
    )
    for pair, rounded in _PAIRS.items():
        pattern = rf'asm\("cvt.rn.{pair}[^;]*;[^;]*;'
        text = re.sub(pattern, f"pair = {rounded}(low) | {rounded}(high) << 16;", text)
    for flag, value in _FLAGS.items() if flags else ():
        text = re.sub(r'asm volatile\("' + re.escape(flag) + r"[^;]*;[^;]*;", value, text)
    return re.sub(r"#pragma once|#include .*", "", text)
