// Asynchronous copies from global to shared memory that bypass registers (sm_80 and later).
//
// PTX: "Data Movement and Conversion Instructions: Asynchronous copy": "cp.async", "cp.async.commit_group",
// "cp.async.wait_group". `.cg` caches in L2 only, which 16-byte copies allow.
#pragma once

#include "types.cuh"

// 16 bytes. Where `inside` is false nothing is read, and 16 zero bytes are written.
__device__ __forceinline__ void cp_async_or_zero(uint32_t shared, const void *global, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(inside ? 16 : 0)
               : "memory");
}

// Closes the group of the copies issued since the last commit; an empty group is allowed.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most kPending of this thread's newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}
