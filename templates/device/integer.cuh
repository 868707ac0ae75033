// Integer division as Python and mathematics define it.
#pragma once

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }  // a >= 0, b > 0

__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Rounds towards minus infinity for every sign of a and b; C's `/` rounds towards zero.
__host__ __device__ constexpr int floor_div(int a, int b) {
  return a / b - (a % b != 0 && (a % b < 0) != (b < 0) ? 1 : 0);
}

// Has the sign of b; C's `%` has the sign of a.
__host__ __device__ constexpr int floor_mod(int a, int b) { return a - floor_div(a, b) * b; }
