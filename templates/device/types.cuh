// Integer names, the 16-bit element types, and the constants that NVRTC lacks.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no <cstdint>
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

// Storage only: arithmetic is fp32, or happens inside the tensor cores.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// A compile-time yes or no that is passed as an argument: `step(tile, Masked{})`.
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};
using Masked = Constant<true>;
using Unmasked = Constant<false>;

// The same value, of an origin that the compiler cannot see: what depends on it is computed anew where it stands,
// instead of being kept in registers from an earlier computation.
__device__ __forceinline__ int forget(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Two fp32 values to one register of two elements, `low` in the low half; round to nearest even.
// PTX: "Data Movement and Conversion Instructions: cvt" (its first source becomes the high half).
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
