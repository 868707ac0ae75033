// Warpgroup matrix multiply: 128 threads issue D[64 x N] += A[64 x 16] B[16 x N] and go on while it runs.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". The instruction wrappers themselves, one per shape used,
// are printed into each kernel (templates/kernels/sm90/wgmma.cuh.j2): N alone has 32 values.
//
// Protocol. `wgmma_fence` before the first instruction that reads registers written by ordinary code; `wgmma_commit`
// closes a group; `wgmma_wait<n>` returns when at most n groups are unfinished. Registers of an unfinished group must
// not be touched: ptxas serialises everything (C7510) when it cannot prove that they aren't.
//
// Operands in shared memory stand in panels: 64 two-byte elements = 128 bytes to a row, rows following one another, the
// eight 16-byte chunks of a row permuted by `chunk ^ (row % 8)` (the 128-byte swizzle, which TMA writes and which makes
// every access pattern below free of bank conflicts). Panels are 1024-byte aligned, since the pattern repeats every
// 8 rows and is computed from address bits. A descriptor (PTX "Matrix-descriptor") names such an operand:
//   bits 0-13 address / 16, bits 16-29 leading-dimension offset / 16, bits 32-45 stride offset / 16, bits 62-63 = 1.
//   K-major (Q and K in S = Q K^T: the head dimension, over which is summed, is contiguous): the stride offset, 1024,
//     leads to the next 8 rows; the leading offset is unused. A step of 16 along k is +32 bytes within a panel.
//   MN-major (V in O = P V: the summed dimension is the row): the leading offset leads to the next panel of 64 columns,
//     the stride offset, 1024, to the next 8 rows of k. A step of 16 along k is +2048 bytes.
#pragma once

#include "mbarrier.cuh"

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kUnfinished>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kUnfinished) : "memory");
}

// Keeps the compiler from moving accesses of these registers across: it does not know that `wgmma` is asynchronous.
template <int kTiles>
__device__ __forceinline__ void pin_registers(float (&registers)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    asm volatile(""
                 : "+f"(registers[j][0]), "+f"(registers[j][1]), "+f"(registers[j][2]),
                   "+f"(registers[j][3])::"memory");
  }
}

template <int kSteps>
__device__ __forceinline__ void pin_registers(uint32_t (&registers)[kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    asm volatile(""
                 : "+r"(registers[k][0]), "+r"(registers[k][1]), "+r"(registers[k][2]),
                   "+r"(registers[k][3])::"memory");
  }
}

// Descriptor of an operand in 128-byte-swizzled panels; `leading_bytes` counts for MN-major operands only.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void *panel, uint32_t leading_bytes) {
  uint32_t low = ((shared_address(panel) & 0x3FFFF) >> 4) | ((leading_bytes >> 4) << 16);
  uint32_t high = (1024 >> 4) | (1u << 30);
  return (static_cast<uint64_t>(high) << 32) | low;
}

// The descriptor `bytes` further on; never carries out of the address bits within 227 KiB.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Registers of this warpgroup, once at the start of its role (PTX "setmaxnreg").
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
