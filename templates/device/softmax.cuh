// Online softmax of one warp's 16 rows in accumulator layout (see mma.cuh).
//
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention" (2022),
// algorithm 1. A thread holds two rows of every 16, shared with the three other lanes of its quad. exp(scale * s)
// is computed as exp2(scale_log2 * s) with scale_log2 = scale * log2(e), one FFMA and one MUFU operation.
// `scale` must be positive: the maximum is taken over the unscaled scores.
#pragma once

#include "types.cuh"

// PTX: "Floating Point Instructions": "ex2" (two ulp; of -inf it is +0) and "rcp" (one ulp).
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

struct OnlineSoftmax {
  float maximum[2];    // of the unscaled scores so far, per row; -inf before the first kept key
  float reference[2];  // `maximum` scaled, or 0 where it is -inf: what the exponentials are relative to
  float sum[2];        // of exp2 over this thread's columns so far, relative to `maximum`

  __device__ __forceinline__ OnlineSoftmax()
      : maximum{negative_infinity(), negative_infinity()}, reference{0, 0}, sum{0, 0} {}

  // Replaces the scores of the next keys by P = exp(scale * (s - maximum)), and returns in `correction` the factor
  // that takes earlier sums and outputs to the new maximum. Unmasked promises that no score is -inf.
  template <typename Mask, int kTiles>
  __device__ __forceinline__ void update(float (&s)[kTiles][4], float scale_log2, float (&correction)[2],
                                         Mask mask) {
    raise_maximum(s, scale_log2, correction, mask);
    exponentiate(s, scale_log2, correction);
  }

  // The first half of `update`: reads the scores only.
  template <typename Mask, int kTiles>
  __device__ __forceinline__ void raise_maximum(const float (&s)[kTiles][4], float scale_log2,
                                                float (&correction)[2], Mask) {
    float m[2];
    row_maxima(s, m);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A row with no kept key yet has maximum -inf; relative to 0 its exponentials are 0 instead of NaN.
      reference[r] = Mask::value && m[r] == negative_infinity() ? 0.0f : __fmul_rn(m[r], scale_log2);
      // Both products rounded, not fused: a maximum that stays gives exactly 1, and nothing drifts over the keys.
      correction[r] = exp2_approx(__fmul_rn(maximum[r], scale_log2) - reference[r]);
      maximum[r] = m[r];
    }
  }

  // The second half.
  template <int kTiles>
  __device__ __forceinline__ void exponentiate(float (&s)[kTiles][4], float scale_log2,
                                               const float (&correction)[2]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = exp2_approx(fmaf(s[j][e], scale_log2, -reference[e / 2]));
    }
    add(s, correction);
  }

  // With a reference that stays, of one row, but for the sums. The softmax is the same with any reference, and the error
  // too while nothing overflows (Hong et al., "FlashDecoding++", 2023, section 3): see `in_range`.
  template <int kTiles>
  __device__ __forceinline__ void exponentiate(float (&s)[kTiles][4], float scale_log2, int r) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) s[j][e] = exp2_approx(fmaf(s[j][e], scale_log2, -reference[r]));
    }
  }

  // Before `finish`: whether sums and outputs stayed in range, though the reference may have been less than the maximum.
  template <int kTiles>
  __device__ __forceinline__ bool in_range(const float (&o)[kTiles][4]) const {
    float nothing[4] = {};  // NaN where an output is not finite
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) nothing[e] = fmaf(o[j][e], 0.0f, nothing[e]);
    }
    return sums_in_range() && nothing[0] + nothing[1] + nothing[2] + nothing[3] == 0.0f;
  }

  // Half of fp32's exponents are left to what the sums are multiplied by, and to outputs. Not for NaN.
  __device__ __forceinline__ bool sums_in_range() const { return sum[0] <= 0x1p60f && sum[1] <= 0x1p60f; }

  // Whether the references are maxima of some keys, so that sums cannot become too small.
  __device__ __forceinline__ bool has_maximum() const {
    return maximum[0] > negative_infinity() && maximum[1] > negative_infinity();
  }

  // And are no lower than scores usually are, in natural units: where a bias all but drops the first keys, they are no
  // reference for the others.
  __device__ __forceinline__ bool has_usual_maximum() const {
    return maximum[0] > -16.0f && maximum[1] > -16.0f;
  }

  // The maxima of the rows, with these scores.
  template <int kTiles>
  __device__ __forceinline__ void row_maxima(const float (&s)[kTiles][4], float (&m)[2]) const {
    m[0] = maximum[0], m[1] = maximum[1];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) m[r] = fmaxf(m[r], fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    }
    m[0] = quad_max(m[0]);
    m[1] = quad_max(m[1]);
  }

  // Adds exponentials to the sums: in pairs and after all of them are computed, since a chain of additions as long as
  // the row would wait for each of them.
  template <int kTiles>
  __device__ __forceinline__ void add(const float (&s)[kTiles][4], const float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = fmaf(sum[r], correction[r], row_sum(s, r));
  }

  // Of one row, relative to a reference that stays.
  template <int kTiles>
  __device__ __forceinline__ void add(const float (&s)[kTiles][4], int r) {
    sum[r] += row_sum(s, r);
  }

  template <int kTiles>
  __device__ __forceinline__ static float row_sum(const float (&s)[kTiles][4], int r) {
    float added = s[0][2 * r] + s[0][2 * r + 1];
#pragma unroll
    for (int j = 1; j < kTiles; ++j) added += s[j][2 * r] + s[j][2 * r + 1];
    return added;
  }

  // Ends the pass over the keys: 1 / sum of each row, 0 for a row with no kept key. Leaves the whole row in `sum`.
  __device__ __forceinline__ void finish(float (&inverse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_sum(sum[r]);
      inverse[r] = sum[r] == 0.0f ? 0.0f : reciprocal_approx(sum[r]);
    }
  }

  // The same where a logit without a value, `sink`, joins the sum of each row: exp(sink) beside the exp(scale * s).
  __device__ __forceinline__ void finish(float (&inverse)[2], float sink, float scale) {
    const float factor = scale * kLog2e;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float raised = fmaxf(maximum[r], sink / scale);
      const float reference = raised == negative_infinity() ? 0.0f : raised * factor;
      const float correction = exp2_approx(fmaf(maximum[r], factor, -reference));
      sum[r] = fmaf(quad_sum(sum[r]), correction, exp2_approx(fmaf(sink, kLog2e, -reference)));
      inverse[r] = sum[r] == 0.0f ? 0.0f : correction * reciprocal_approx(sum[r]);
      maximum[r] = raised;
    }
  }

  // Natural logarithm of the sum of exp(scale * s) over row r, after `finish`; -inf for a row with no kept key.
  __device__ __forceinline__ float log_sum_exp(int r, float scale) const {
    return sum[r] == 0.0f ? negative_infinity() : maximum[r] * scale + __logf(sum[r]);
  }
};

// O = diag(factor) O
template <int kTiles>
__device__ __forceinline__ void scale_rows(float (&o)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) o[j][e] *= factor[e / 2];
  }
}
