"""The sm80 family on a GPU: every tiling below against float64, then against torch's flash backend (FA2).

    python benchmarks/check_sm80.py [--dims 64,128,256] [--rounds 5] [--only check|time]

Plans are written by hand, so that tilings the solver would not propose are measured too. Needs torch, CuPy,
jinja2 and sympy; not pydantic, hence the spec and plan packages are entered without their ``__init__``.
Times: 16k tokens, hidden 2048, TFLOP/s of 4 * b * h * sq * sk * d (half of it for causal), median over the
rounds, all callables of a cell interleaved.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cupy
import numpy as np
import sympy
import torch
from cupy.cuda import nvrtc
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for package in ("spec", "plan"):
    module = ModuleType(f"flashgen.{package}")
    module.__path__ = [str(ROOT / "flashgen" / package)]
    sys.modules[module.__name__] = module

from flashgen.codegen import render  # noqa: E402
from flashgen.plan.model import KernelPlan, MaskPlan, Sm80Schedule  # noqa: E402
from flashgen.spec.bounds import RowBounds  # noqa: E402

Q = sympy.Symbol("q", integer=True)
WINDOW = 100
MASKS = {
    "full": RowBounds(None, None),
    "causal": RowBounds(None, Q),
    f"window{WINDOW}": RowBounds(Q - (WINDOW - 1), Q),
}
# (head_dim, tile_q, tile_kv, warps, stages, blocks_per_sm, q_in_registers)
TILINGS = [
    (64, 128, 128, 4, 1, 2, False),
    (64, 128, 128, 4, 1, 2, True),
    (64, 128, 128, 4, 2, 2, False),
    (64, 128, 64, 4, 1, 2, False),
    (64, 128, 64, 4, 2, 2, False),
    (64, 128, 64, 4, 3, 2, False),
    (64, 192, 64, 4, 2, 2, False),
    (64, 256, 32, 4, 2, 2, False),
    (64, 256, 32, 4, 3, 2, False),
    (64, 256, 64, 8, 2, 1, False),
    (64, 64, 64, 4, 2, 4, True),
    (128, 128, 64, 4, 1, 2, False),
    (128, 128, 64, 4, 2, 2, False),
    (128, 128, 48, 4, 1, 2, False),
    (128, 128, 48, 4, 2, 2, False),
    (128, 128, 32, 4, 1, 2, False),
    (128, 128, 32, 4, 2, 2, False),
    (128, 128, 32, 4, 3, 2, False),
    (128, 256, 64, 8, 2, 1, False),
    (128, 128, 64, 8, 2, 1, True),
    (128, 128, 128, 8, 1, 1, False),
    (128, 64, 64, 4, 1, 3, True),
    (256, 128, 64, 8, 1, 1, False),
    (256, 128, 64, 8, 2, 1, False),
    (256, 128, 64, 8, 1, 1, True),
    (256, 128, 32, 8, 2, 1, False),
    (256, 128, 32, 8, 3, 1, False),
    (256, 64, 64, 4, 1, 2, False),
    (256, 64, 32, 4, 1, 2, False),
    (256, 64, 32, 4, 2, 2, False),
]
# Further head dims, checked only: (head_dim_qk, head_dim_v, tile_q, tile_kv, warps, stages, blocks_per_sm)
OTHER_DIMS = [
    (8, 8, 64, 64, 4, 1, 2),
    (40, 40, 128, 64, 4, 1, 2),
    (72, 72, 128, 64, 4, 2, 2),
    (80, 80, 128, 64, 4, 1, 2),
    (96, 96, 128, 64, 4, 2, 2),
    (160, 160, 128, 64, 8, 1, 1),
    (192, 192, 128, 64, 8, 1, 1),
    (192, 128, 128, 64, 8, 2, 1),
    (248, 248, 64, 64, 4, 1, 2),
    (64, 128, 128, 64, 4, 1, 2),
    (24, 200, 64, 48, 4, 2, 1),
]
SHAPES = [  # seqlen_q, seqlen_kv
    (1, 1),
    (1, 257),
    (257, 1),
    (64, 64),
    (127, 129),
    (128, 256),
    (300, 517),
    (517, 300),
    (64, 0),
    (700, 700),
]


def pitch(head_dim: int) -> int:
    columns = -(-head_dim // 16) * 16
    return columns if columns % 64 == 0 else columns + 8


def make_plan(
    qk: int,
    v: int,
    tile_q: int,
    tile_kv: int,
    warps: int,
    stages: int,
    blocks: int,
    q_in_registers: bool,
    mask: str,
    dtype: str = "bf16",
    group: int = 1,
    align: str = "bottom_right",
) -> KernelPlan:
    q, o = 2 * tile_q * pitch(qk), 2 * tile_q * pitch(v)
    kv = 2 * stages * tile_kv * (pitch(qk) + pitch(v))
    return KernelPlan(
        spec="check",
        family="sm80",
        target=target(),
        dtype=dtype,
        head_dim_qk=qk,
        head_dim_v=v,
        group=group,
        align=align,
        mask=MaskPlan(mask, MASKS[mask]),
        scale=qk**-0.5,
        tile_q=tile_q,
        tile_kv=tile_kv,
        stages=stages,
        warps=warps,
        schedule=Sm80Schedule(q_in_registers),
        smem_bytes=max(q, kv, o) if q_in_registers else max(q, o) + kv,
        registers=255,
        blocks_per_sm=blocks,
    )


def target() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def title(plan: KernelPlan) -> str:
    tiles = f"{plan.tile_q}x{plan.tile_kv} w{plan.warps} s{plan.stages} b{plan.blocks_per_sm}"
    return tiles + (" q-reg" if plan.schedule.q_in_registers else "")


# ---- compile and launch, with nothing of flashgen but the source ----


def compile_plan(plan: KernelPlan) -> tuple[bytes, str]:
    source = render(plan)
    names = [name.encode() for name in source.headers]
    program = nvrtc.createProgram(
        source.text, f"{source.name}.cu", [text.encode() for text in source.headers.values()], names
    )
    try:
        nvrtc.compileProgram(
            program, [f"-arch={plan.target}", "-std=c++17", "--ptxas-options=-v", "-lineinfo"]
        )
    except nvrtc.NVRTCError:
        raise RuntimeError(nvrtc.getProgramLog(program)) from None
    log = nvrtc.getProgramLog(program)
    registers = re.search(r"Used (\d+) registers", log)[1]
    spills = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()))
    return nvrtc.getCUBIN(program), f"{registers} regs" + (f", {spills} B SPILLED" if spills else "")


PARAMS = np.dtype(
    [
        ("q", "u8"),
        ("k", "u8"),
        ("v", "u8"),
        ("o", "u8"),
        ("lse", "u8"),
        ("strides", "i8", 12),
        ("sizes", "i4", 5),
        ("scale", "f4"),
    ]
)


class Compiled:
    """A plan's kernel, loaded: call it with [batch, seqlen, heads, head_dim] tensors."""

    def __init__(self, plan: KernelPlan, cubin: bytes, resources: str, folder: Path, index: int) -> None:
        path = folder / f"{index}.cubin"
        path.write_bytes(cubin)
        self.plan, self.resources = plan, resources
        self.module = cupy.RawModule(path=str(path))
        self.function = self.module.get_function(plan.kernel)
        self.function.max_dynamic_shared_size_bytes = plan.smem_bytes

    def bind(self, q: Any, k: Any, v: Any, o: Any, lse: Any) -> Any:
        params = np.zeros((), PARAMS)
        for name, tensor in zip("qkvo", (q, k, v, o), strict=True):
            params[name] = tensor.data_ptr()
        params["lse"] = lse.data_ptr() if lse is not None else 0
        params["strides"] = [t.stride(i) for t in (q, k, v, o) for i in range(3)]
        params["sizes"] = [q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1]]
        params["scale"] = self.plan.scale
        blocks = -(-q.shape[1] // self.plan.tile_q) * q.shape[2] * q.shape[0]
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

        def launch() -> None:
            with stream:
                self.function((blocks,), (self.plan.threads,), (params[()],), shared_mem=self.plan.smem_bytes)

        return launch if blocks else lambda: None


def compile_all(plans: list[KernelPlan], folder: Path) -> list[Compiled]:
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(compile_plan, plans))
    return [
        Compiled(plan, *result, folder, i)
        for i, (plan, result) in enumerate(zip(plans, results, strict=True))
    ]


# ---- correctness ----


def poisoned(batch: int, seqlen: int, heads: int, head_dim: int, dtype: torch.dtype, random: bool) -> Any:
    """A view into a larger tensor full of NaN; `random` fills the view itself with N(0, 1)."""
    whole = torch.full((batch, seqlen + 3, heads + 1, head_dim + 8), math.nan, device="cuda", dtype=dtype)
    view = whole[:, 1 : seqlen + 1, :heads, :head_dim]
    if random:
        view.copy_(torch.randn(view.shape, device="cuda"))
    return whole, view


def textbook(
    plan: KernelPlan, q: Any, k: Any, v: Any, dtype: torch.dtype, rounding: torch.dtype
) -> tuple[Any, Any]:
    """softmax(scale Q K^T) V and lse in `dtype`, P and O rounded to `rounding`; masked rows 0 and -inf."""
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(plan.group, 1) for t in (k, v))
    s = (q @ k.transpose(-1, -2)) * plan.scale
    seqlen_q, seqlen_kv = s.shape[-2:]
    row = torch.arange(seqlen_q, device=q.device)[:, None]
    row = row + (seqlen_kv - seqlen_q if plan.align == "bottom_right" else 0)
    kv = torch.arange(seqlen_kv, device=q.device)[None, :]
    keep = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool, device=q.device)
    if plan.mask.label != "full":
        keep &= kv <= row
    if plan.mask.label.startswith("window"):
        keep &= row - kv < WINDOW
    s = s.masked_fill(~keep, -math.inf)
    p = torch.softmax(s, -1).nan_to_num(0.0).to(rounding).to(dtype)
    lse = s.exp().sum(-1).log()  # scores are small here; logsumexp refuses an empty row
    return (p @ v).transpose(1, 2).to(rounding), lse


def check(kernel: Compiled, seqlen_q: int, seqlen_kv: int) -> str | None:
    """What is wrong, or None."""
    plan = kernel.plan
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[plan.dtype]
    heads_kv, batch = 2, 2
    heads_q = heads_kv * plan.group
    _, q = poisoned(batch, seqlen_q, heads_q, plan.head_dim_qk, dtype, True)
    _, k = poisoned(batch, seqlen_kv, heads_kv, plan.head_dim_qk, dtype, True)
    _, v = poisoned(batch, seqlen_kv, heads_kv, plan.head_dim_v, dtype, True)
    whole, o = poisoned(batch, seqlen_q, heads_q, plan.head_dim_v, dtype, False)
    lse = torch.full((batch, heads_q, seqlen_q), math.nan, device="cuda")
    kernel.bind(q, k, v, o, lse)()
    torch.cuda.synchronize()
    outside = torch.isnan(whole).sum().item()
    if outside != whole.numel() - o.numel():
        return f"{whole.numel() - o.numel() - outside} elements beside the output written, or NaN in it"
    exact, exact_lse = textbook(plan, q, k, v, torch.float64, torch.float64)
    same, _ = textbook(plan, q, k, v, torch.float32, dtype)
    norm = exact.norm().clamp_min(1e-9)
    error, allowed = ((x.double() - exact).norm().item() / norm.item() for x in (o, same))
    if not error <= 2 * allowed + 1e-7:
        return f"error {error:.2e}, textbook's {allowed:.2e}"
    difference = torch.where(lse.double() == exact_lse, 0.0, (lse.double() - exact_lse).abs())
    if not difference.max().item() < 1e-4:
        return f"lse off by {difference.max().item():.2e}"
    return None


def check_all(kernels: list[Compiled]) -> int:
    failures = 0
    for kernel in kernels:
        wrong = {}
        for shape in SHAPES:
            if problem := check(kernel, *shape):
                wrong[shape] = problem
        if wrong:
            failures += 1
            shape, problem = next(iter(wrong.items()))
            name = f"{kernel.plan.kernel} {title(kernel.plan)} {kernel.plan.align}"
            print(f"WRONG {name}: {len(wrong)} of {len(SHAPES)} shapes, e.g. {shape}: {problem}", flush=True)
    print(f"checked {len(kernels)} kernels x {len(SHAPES)} shapes: {failures} wrong", flush=True)
    return failures


# ---- time ----


def milliseconds(call: Any, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def time_cell(
    kernels: list[Compiled], head_dim: int, seqlen: int, causal: bool, rounds: int
) -> dict[str, float]:
    """TFLOP/s of every tiling and of FA2."""
    batch, heads = 16384 // seqlen, 2048 // head_dim
    q, k, v, o = (
        torch.randn(batch, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    lse = torch.empty(batch, heads, seqlen, device="cuda")
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))

    def fa2() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(qt, kt, vt, is_causal=causal)

    calls = {"FA2": fa2} | {title(kernel.plan): kernel.bind(q, k, v, o, lse) for kernel in kernels}
    flops = 4.0 * batch * heads * seqlen * seqlen * head_dim * (0.5 if causal else 1.0)
    repeats = max(2, int(10e-3 / (flops / 300e12)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for call in calls.values():
            call()
        for turn in range(rounds):
            names = list(calls)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                calls[name]()
                times[name].append(milliseconds(calls[name], repeats))
    return {name: flops / statistics.median(values) * 1e-9 for name, values in times.items()}


def time_all(kernels: list[Compiled], dims: list[int], seqlens: list[int], rounds: int) -> None:
    for head_dim in dims:
        cells: dict[str, dict[str, float]] = {}
        for seqlen in seqlens:
            for mask in ("full", "causal"):
                chosen = [x for x in kernels if x.plan.mask.label == mask and x.plan.head_dim_qk == head_dim]
                cells[f"{mask} {seqlen // 1024}k"] = time_cell(
                    chosen, head_dim, seqlen, mask == "causal", rounds
                )
        print(f"\nd{head_dim:<24}" + "".join(f"{cell:>12}" for cell in cells))
        for name in next(iter(cells.values())):
            row = "".join(
                f"{cell[name]:>11.0f}{'*' if cell[name] >= max(cell.values()) else ' '}"
                for cell in cells.values()
            )
            resources = {
                x.resources for x in kernels if title(x.plan) == name and x.plan.head_dim_qk == head_dim
            }
            print(f"{name:<25}{row}  {', '.join(sorted(resources))}", flush=True)
        best = {
            cell: max(v for name, v in row.items() if name != "FA2") / row["FA2"]
            for cell, row in cells.items()
        }
        print(f"{'best / FA2':<25}" + "".join(f"{ratio:>11.2f} " for ratio in best.values()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", default="64,128,256")
    parser.add_argument("--seqlens", default="2048,16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["check", "time"])
    options = parser.parse_args()
    dims = [int(x) for x in options.dims.split(",")]
    torch.manual_seed(0)
    tilings = [(d, d, *rest) for d, *rest in TILINGS if d in dims]
    timed = [make_plan(*tiling, mask) for tiling in tilings for mask in ("full", "causal")]
    checked = []
    if options.only != "time":
        window = f"window{WINDOW}"
        checked = [make_plan(*tiling, window, "fp16", 2) for tiling in tilings]
        for dims_and_tiles in OTHER_DIMS:
            causal = make_plan(*dims_and_tiles, False, "causal")
            checked += [
                causal,
                replace(causal, align="top_left"),
                make_plan(*dims_and_tiles, False, "full", group=3),
                make_plan(*dims_and_tiles, False, window, "fp16"),
            ]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_all(timed + checked, Path(folder))
        try:
            if options.only != "time":
                failures = check_all(kernels)
        except Exception:
            traceback.print_exc()
            failures += 1
        if options.only != "check":
            time_all(
                kernels[: len(timed)], dims, [int(x) for x in options.seqlens.split(",")], options.rounds
            )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
