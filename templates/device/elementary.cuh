// Elementary functions on the hardware's fast instructions.
//
// PTX: "Floating Point Instructions": "lg2" (error 2^-22), "sqrt", "rsqrt" (relative error 2^-23).
#pragma once

#include "softmax.cuh"

// 1 - 2 / (1 + exp(2 x)), to 3e-7. "tanh.approx" is one operation instead of two, but off by 2^-11 of its value: of a
// score capped at 50 that can be 1.5% of its exponential, seven times what rounding to bf16 costs.
__device__ __forceinline__ float tanh_approx(float x) {
  return fmaf(-2.0f, reciprocal_approx(1.0f + exp2_approx(2.0f * kLog2e * x)), 1.0f);
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
// the tensor cores work at head_dim 128. Where all |k * x| of a tile are at most 0.6, the odd polynomial of degree 5
// with the least relative error on [-0.6, 0.6], 6e-5, takes the FMA pipes instead; where a tile's values are at most 16,
// so that the lse is off by less than 1e-3.
struct ScaledTanh {
  float a, k;
  float polynomial[3];  // coefficients of x, x^3, x^5

  // Whether `near_zero` serves for arguments of magnitude up to `largest`; not for NaN.
  __device__ __forceinline__ bool is_near_zero(float largest) const {
    return largest * fabsf(k) * fmaxf(1.0f, fabsf(a) * (0.6f / 16.0f)) <= 0.6f;
  }

  __device__ __forceinline__ float near_zero(float x) const {
    const float y = x * x;
    return x * (polynomial[0] + y * (polynomial[1] + y * polynomial[2]));
  }

  // Whether the polynomial may stand for a row of scores, the largest of a * tanh(k * x) * log2(e) being `log2_value`: x is
  // near zero from above, and what is not near zero from below, where tanh is -0.537, is less than exp(-16) = 1.1e-7 of the
  // largest exponential; the polynomial rises everywhere, so it gives less than that too. a is positive.
  __device__ __forceinline__ bool polynomial_serves(float log2_value) const {
    return log2_value <= polynomial_limit() && log2_value >= fmaxf(16.0f - 0.537f * a, -16.0f) * kLog2e;
  }

  // The largest a * tanh(k * x) * log2(e) that the polynomial may stand for.
  __device__ __forceinline__ float polynomial_limit() const { return fminf(0.537f * a, 16.0f) * kLog2e; }

  __device__ __forceinline__ float anywhere(float x) const { return a * tanh_approx(k * x); }
};

__device__ __forceinline__ ScaledTanh scaled_tanh(float a, float k) {
  if (k < 0.0f) a = -a, k = -k;  // tanh is odd
  const float k2 = k * k, ak = a * k;
  return {a, k, {ak * 0.99993686f, ak * k2 * -0.33012808f, ak * k2 * k2 * 0.108398f}};
}
