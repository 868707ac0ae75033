// Addresses in tensors [batch, seqlen, heads, head_dim] of 16-bit elements, 64-bit throughout.
#pragma once

#include "types.cuh"

// Element [batch, row, head, 0]; `stride` counts elements, in the order batch, seq, head.
__device__ __forceinline__ const char *row_address(const void *tensor, const int64_t (&stride)[3], int batch,
                                                   int row, int head) {
  return static_cast<const char *>(tensor) + 2 * (batch * stride[0] + row * stride[1] + head * stride[2]);
}

__device__ __forceinline__ char *row_address(void *tensor, const int64_t (&stride)[3], int batch, int row,
                                             int head) {
  return static_cast<char *>(tensor) + 2 * (batch * stride[0] + row * stride[1] + head * stride[2]);
}
