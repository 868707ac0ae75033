// Elements of tensors that a mask or score reads, through the read-only cache, as the numbers they stand for.
#pragma once

#include "types.cuh"

__device__ __forceinline__ float read(const float *element) { return __ldg(element); }
__device__ __forceinline__ int read(const int *element) { return __ldg(element); }
__device__ __forceinline__ int read(const unsigned char *element) { return __ldg(element); }

// The upper half of an fp32.
__device__ __forceinline__ float read(const bf16 *element) {
  return __uint_as_float(static_cast<uint32_t>(__ldg(&element->bits)) << 16);
}

__device__ __forceinline__ float read(const fp16 *element) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(__ldg(&element->bits)));
  return value;
}
