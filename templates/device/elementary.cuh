// Elementary functions on the hardware's fast instructions.
//
// PTX: "Floating Point Instructions": "tanh" (relative error 2^-11), "lg2" (2^-22), "sqrt", "rsqrt" (relative error 2^-23).
#pragma once

#include "softmax.cuh"

__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a * tanh(k * x), with a and k the same for a whole tile.
//
// A tanh beside the exponential of every score keeps the MUFU (16 operations per cycle and SM) busy for as long as
// the tensor cores work at head_dim 128. Where all |k * x| of a tile are at most 1, the odd polynomial of degree 7
// with the least relative error on [-1, 1], 8e-5, takes the FMA pipes instead, and is six times as exact.
struct ScaledTanh {
  float a, k;
  float polynomial[4];  // coefficients of x, x^3, x^5, x^7

  // Whether `near_zero` serves for arguments of magnitude up to `largest`; not for NaN.
  __device__ __forceinline__ bool is_near_zero(float largest) const { return largest * fabsf(k) <= 1.0f; }

  __device__ __forceinline__ float near_zero(float x) const {
    const float y = x * x;
    return x * (polynomial[0] + y * (polynomial[1] + y * (polynomial[2] + y * polynomial[3])));
  }

  __device__ __forceinline__ float anywhere(float x) const { return a * tanh_approx(k * x); }
};

__device__ __forceinline__ ScaledTanh scaled_tanh(float a, float k) {
  const float k2 = k * k, ak = a * k;
  return {a, k, {ak * 0.9999186f, ak * k2 * -0.3306543f, ak * k2 * k2 * 0.11889755f, ak * k2 * k2 * k2 * -0.026629679f}};
}
