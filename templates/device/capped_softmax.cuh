// Online softmax of capped scores, a * tanh(k * s).
//
// A tanh beside the exponential of every score would keep the MUFU (16 operations per cycle and SM) busy for as long
// as the tensor cores work at head_dim 128. The function rises with s, so the maximum is taken over s itself; and where
// the maximum allows it, an odd polynomial takes the tanh's place, whose last multiplication is the one that
// subtracts the maximum: three operations of the FMA pipes for each score beyond those of scores that are not capped.
#pragma once

#include "elementary.cuh"

// See OnlineSoftmax. `maximum` is that of s, and `reference` that of the capped score times log2(e).
struct CappedSoftmax : OnlineSoftmax {
  bool polynomial = false;  // takes tanh's place relative to a reference that stays; the same for a warp

  template <typename Mask, int kTiles>
  __device__ __forceinline__ void update(float (&s)[kTiles][4], const ScaledTanh &cap, float (&correction)[2],
                                         Mask mask) {
    raise_maximum(s, cap, correction, mask);
    exponentiate(s, cap, correction);
  }

  template <typename Mask, int kTiles>
  __device__ __forceinline__ void raise_maximum(const float (&s)[kTiles][4], const ScaledTanh &cap,
                                                float (&correction)[2], Mask) {
    float m[2];
    row_maxima(s, m);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Of a row with no kept key yet, the exponentials are 0 relative to anything.
      const float raised = m[r] == negative_infinity() ? 0.0f : cap.anywhere(m[r]) * kLog2e;
      correction[r] = maximum[r] == negative_infinity() ? 0.0f : exp2_approx(reference[r] - raised);
      reference[r] = raised;
      maximum[r] = m[r];
    }
  }

  // Masked scores are -inf.
  template <int kTiles>
  __device__ __forceinline__ void exponentiate(float (&s)[kTiles][4], const ScaledTanh &cap,
                                               const float (&correction)[2]) {
    bool small = cap.polynomial_serves(reference[0]) && cap.polynomial_serves(reference[1]);
    if (!__all_sync(0xffffffff, small)) {
      // A low cap, or few keys: all scores must be small, not the largest alone.
      float largest = 0.0f;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (s[j][e] != negative_infinity()) largest = fmaxf(largest, fabsf(s[j][e]));
        }
      }
      small = cap.is_near_zero(largest);
    }
    if (__all_sync(0xffffffff, small)) {
      float slope[3];
      of_polynomial(cap, slope);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[j][e] = by_polynomial(s[j][e], slope, reference[e / 2]);
      }
      add(s, correction);  // in either branch: beside the exponentials, not after them
    } else {
      const float a = cap.a * kLog2e;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = by_tanh(s[j][e], a, cap.k, reference[e / 2]);
          s[j][e] = s[j][e] == negative_infinity() ? 0.0f : p;
        }
      }
      add(s, correction);
    }
  }

  // Before key tiles that are exponentiated relative to a reference that stays, of `keys` in all: whether the polynomial is to
  // take tanh's place in them. That is likely to serve where scores like the present maximum would, in every key.
  __device__ __forceinline__ void choose(const ScaledTanh &cap, int keys) {
    const float highest =
        cap.polynomial_limit() - (log2_approx(static_cast<float>(keys)) - 2.0f);  // of a quarter of them
    bool likely = !far_below(cap, keys);
#pragma unroll
    for (int r = 0; r < 2; ++r) likely = likely && reference[r] <= highest;
    polynomial = __all_sync(0xffffffff, likely);
  }

  // With a reference that stays, of one row, but for the sums; no score is -inf.
  template <int kTiles>
  __device__ __forceinline__ void exponentiate(float (&s)[kTiles][4], const ScaledTanh &cap, int r) const {
    if (polynomial) {
      float slope[3];
      of_polynomial(cap, slope);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) s[j][e] = by_polynomial(s[j][e], slope, reference[r]);
      }
    } else {
      const float a = cap.a * kLog2e;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) s[j][e] = by_tanh(s[j][e], a, cap.k, reference[r]);
      }
    }
  }

  // After those key tiles: whether the polynomial served, which the sums tell, so that no score is looked at. None of the
  // exponentials is more than their sum, so all scores were near zero from above. Not for NaN.
  __device__ __forceinline__ bool polynomial_served(const ScaledTanh &cap) {
    if (!polynomial) return true;
    polynomial = false;  // key tiles after these see to themselves
    bool served = true;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      served = served && sum[r] <= exp2_approx(cap.polynomial_limit() - reference[r]);
    return served;
  }

  // Before `finish`: from here on `maximum` is that of the capped scores.
  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (maximum[r] != negative_infinity()) maximum[r] = reference[r] / kLog2e;
    }
  }

 private:
  // Whether `keys` scores that are not near zero from below could matter to a row's sum, which does not fall any more: the
  // polynomial rises everywhere, so each is off by less than exp(-0.537 a), and together by less than 2^-10 of the sum.
  __device__ __forceinline__ bool far_below(const ScaledTanh &cap, int keys) const {
    bool far = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float row_sum = quad_sum(sum[r]);  // of all lanes, whatever the others find
      const float off = static_cast<float>(keys) * exp2_approx(-0.537f * kLog2e * cap.a - reference[r]);
      far = far || !(off <= 0x1p-10f * row_sum);
    }
    return far;
  }

  __device__ __forceinline__ static void of_polynomial(const ScaledTanh &cap, float (&slope)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) slope[i] = cap.polynomial[i] * kLog2e;
  }

  __device__ __forceinline__ static float by_polynomial(float s, const float (&slope)[3], float reference) {
    const float y = s * s;
    return exp2_approx(fmaf(s, fmaf(y, fmaf(y, slope[2], slope[1]), slope[0]), -reference));
  }

  __device__ __forceinline__ static float by_tanh(float s, float a, float k, float reference) {
    return exp2_approx(fmaf(a, tanh_approx(k * s), -reference));
  }
};
