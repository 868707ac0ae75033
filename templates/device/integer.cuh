// Integer division as Python and mathematics define it.
#pragma once

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }  // a >= 0, b > 0

__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Rounds towards minus infinity for every sign of a and b; C's `/` rounds towards zero.
template <typename Int>
__host__ __device__ constexpr Int floor_div(Int a, Int b) {
  return a / b - (a % b != 0 && (a % b < 0) != (b < 0) ? 1 : 0);
}

// Has the sign of b; C's `%` has the sign of a.
template <typename Int>
__host__ __device__ constexpr Int floor_mod(Int a, Int b) {
  return a - floor_div(a, b) * b;
}

// Of 64 bits what is beyond all positions is as good as 2^30, to which positions can be added in 32.
__host__ __device__ constexpr int saturated(long long x) {
  return x < -(1 << 30) ? -(1 << 30) : x > 1 << 30 ? 1 << 30 : static_cast<int>(x);
}

// The multiples of a divisor that is known at run time, among the columns of a tile: a multiplication and a comparison.
//
// Lemire, Kaser, Kurz, "Faster remainder by direct computation" (2019): x is a multiple of n if the low half of
// x * ceil(2^32 / n) is less than that factor; here for x < 2^10 and n <= 2^9. A greater divisor has at most one multiple
// among the columns, of which there are at most 256, and 2^9 serves in its place.
struct Multiples {
  unsigned divisor;  // at most 2^9
  unsigned factor;   // ceil(2^32 / divisor), 0 for 2^32

  // What `hold` takes to test c - target, where the target is from 0 to below the divisor.
  __host__ __device__ unsigned from(int target) const {
    return (divisor - (target < 511 ? target : 511)) * factor;
  }

  __host__ __device__ bool hold(unsigned start, int c) const { return start + c * factor <= factor - 1; }
};

__host__ __device__ inline Multiples multiples_of(int divisor) {
  const unsigned small = divisor < 512 ? divisor : 512;
  return {small, 0xffffffffu / small + 1};
}
