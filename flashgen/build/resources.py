"""What a kernel takes of the chip, as the compiler reports it, held against what its plan promised."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flashgen.arch import arch
from flashgen.errors import BuildError, Problem
from flashgen.plan.model import KernelPlan

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)'")
_FRAME = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SMEM = re.compile(r"(?P<bytes>\d+) bytes smem")
_LOSS = re.compile(r"\((?P<code>C\d+)\) Potential Performance Loss: (?P<what>.*)")
_REGISTER_UNIT = (
    256  # registers are handed to a warp in units of 256 (CUDA C++ Programming Guide, compute capabilities)
)


@dataclass(frozen=True)
class Resources:
    """Of one kernel. Registers are 32-bit, per thread; shared memory is per block."""

    registers: int
    spill_bytes: int  # stored and loaded, all functions of the cubin together
    stack_bytes: int  # of the deepest function: arrays that did not stay in registers
    smem_bytes: int  # static, as reported, plus the dynamic part, which the source itself asserts
    compile_s: float = 0.0  # wall time in NVRTC; 0 where a manifest does not tell


def parse_log(log: str, kernel: str, *, dynamic_smem: int, compile_s: float) -> Resources | None:
    """Read the report that ``--ptxas-options=-v`` puts into NVRTC's log; `None` where it tells nothing of
    `kernel`, as when NVRTC took the binary from a cache of its own.

    Raises `BuildError` when ptxas says that it gave up on what the kernel is built on: C7510/C7511 (wgmma
    serialised), C7508 (setmaxnreg ignored). The binary would be right but slow.
    """
    if losses := list(_LOSS.finditer(log)):
        raise BuildError([Problem(f"{kernel}: ptxas {loss['code']}: {loss['what']}") for loss in losses])
    spill = stack = 0
    registers: int | None = None
    static_smem = 0
    entry = ""
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry = match["name"]
        if match := _FRAME.search(line):
            spill += int(match["stores"]) + int(match["loads"])
            stack = max(stack, int(match["stack"]))
        if (match := _USED.search(line)) and entry == kernel:
            registers = int(match["registers"])
            if smem := _SMEM.search(line):
                static_smem = int(smem["bytes"])
    if registers is None:
        return None
    return Resources(registers, spill, stack, static_smem + dynamic_smem, compile_s)


def mismatches(plan: KernelPlan, resources: Resources) -> tuple[Problem, ...]:
    """Where the compiled kernel breaks the promises of its plan; empty when it keeps them all."""
    chip = arch(plan.target)
    found = []
    if resources.spill_bytes:
        found.append(
            f"{resources.spill_bytes} bytes of registers spill to local memory "
            f"({resources.registers} registers a thread; the plan predicted {plan.registers})"
        )
    elif resources.stack_bytes:  # spilled registers live on the stack too
        found.append(f"{resources.stack_bytes} bytes of stack: an array does not stay in registers")
    if resources.smem_bytes != plan.smem_bytes:
        found.append(f"{resources.smem_bytes:,} B of shared memory; the plan says {plan.smem_bytes:,} B")
    per_warp = -(-resources.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    blocks = chip.registers_per_sm // (per_warp * plan.threads // 32)
    if blocks < plan.blocks_per_sm:
        found.append(
            f"{resources.registers} registers a thread let {blocks} blocks of {plan.threads} threads "
            f"onto an SM; the plan says {plan.blocks_per_sm}"
        )
    tiling = f"tile_q={plan.tile_q}, tile_kv={plan.tile_kv}, stages={plan.stages}, warps={plan.warps}"
    hint = f"{tiling}: try smaller tiles"
    return tuple(Problem(f"{plan.kernel}: {text}", hint=hint) for text in found)


__all__ = ["Resources", "mismatches", "parse_log"]
