// Elements of tensors that a mask or score reads, through the read-only cache, as the numbers they stand for.
#pragma once

#include "types.cuh"

// The upper half of an fp32.
__device__ __forceinline__ float to_fp32(bf16 element) {
  return __uint_as_float(static_cast<uint32_t>(element.bits) << 16);
}

__device__ __forceinline__ float to_fp32(fp16 element) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(element.bits));
  return value;
}

__device__ __forceinline__ float read(const float *element) { return __ldg(element); }
__device__ __forceinline__ int read(const int *element) { return __ldg(element); }
__device__ __forceinline__ int read(const unsigned char *element) { return __ldg(element); }

template <typename Element>
__device__ __forceinline__ float read(const Element *element) {
  return to_fp32(Element{__ldg(&element->bits)});
}

// Whether the columns of a row can be loaded in pairs, the first of each even: an odd stride or base forbids it.
template <typename Element>
__device__ __forceinline__ bool holds_pairs(const Element *row) {
  return reinterpret_cast<uint64_t>(row) % (2 * sizeof(Element)) == 0;
}

// Column c, from a load of the pair that it is in: the compiler makes one load of the two columns' own.
template <typename Element>
__device__ __forceinline__ float read_of_pair(const Element *row, int c) {
  const uint32_t pair = __ldg(reinterpret_cast<const uint32_t *>(row + (c & ~1)));
  return to_fp32(Element{static_cast<uint16_t>(c % 2 == 0 ? pair : pair >> 16)});
}

__device__ __forceinline__ float read_of_pair(const float *row, int c) {
  const float2 pair = __ldg(reinterpret_cast<const float2 *>(row + (c & ~1)));
  return c % 2 == 0 ? pair.x : pair.y;
}

// Column c of a row. kEdge: of its nearest to c, up to `last`. kPairs: the row holds pairs, none of them beyond `last`.
template <bool kEdge, bool kPairs, typename Element>
__device__ __forceinline__ float read_column(const Element *row, int c, int last) {
  if constexpr (kPairs) {
    return read_of_pair(row, c);
  } else {
    return read(row + (kEdge ? min(c, last) : c));
  }
}
