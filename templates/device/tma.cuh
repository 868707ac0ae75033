// The tensor memory accelerator: bulk copies of boxes of a tensor that a 128-byte tensor map describes.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk.tensor" and "Tensor-map".
//
// Coordinates run from the innermost dimension outwards: (column, sequence, head, batch); packed tensors have the query
// heads of a K/V head as a dimension between column and sequence, always copied whole. Elements outside the tensor
// are read as zero and not written, so ragged sequence lengths need no predicates.
#pragma once

#include "mbarrier.cuh"

// CUtensorMap; <cuda.h> does not compile under NVRTC.
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load(void *destination, const TensorMap *map, Barrier *full, int column,
                                         int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
          "r"(shared_address(destination)),
      "l"(map), "r"(shared_address(full)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ __forceinline__ void tma_load_packed(void *destination, const TensorMap *map, Barrier *full,
                                                int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %7, %4, %5, %6}], [%2];" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(full)), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(0)
      : "memory");
}

// The same box lands at the same offset in every block of `blocks`, and completes on each one's own barrier.
__device__ __forceinline__ void tma_load_multicast(void *destination, const TensorMap *map, Barrier *full,
                                                   uint16_t blocks, int column, int row, int head,
                                                   int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(full)), "h"(blocks), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap *map, const void *source, int column, int row,
                                          int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ __forceinline__ void tma_store_packed(const TensorMap *map, const void *source, int column,
                                                 int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %6, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(0)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's stores have read their shared memory (it may be overwritten; the writes may be in flight).
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Orders this thread's ordinary shared-memory accesses before later ones of the copy engine and the tensor cores
// (PTX "Async proxy").
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
