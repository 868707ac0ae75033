// Stream-K: what does not fill a wave of tiles is cut into equal shares, which begin and end anywhere in a tile.
//
// Osama et al., "Stream-K: Work-Centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the GPU" (PPoPP
// 2023). A block works on the end of one tile first, and leaves what it has for the block that holds the tile's
// beginning; which began with the end of another tile, so that it hardly waits. The last share is the first block's:
// blocks wait for earlier ones alone, and since they start in order, none that waits keeps out the one it waits for.
#pragma once

#include "softmax.cuh"

// `units` key tiles in shares as equal as they can be; share i is [begin(i), begin(i + 1)).
struct Shares {
  int units, count;

  __device__ __forceinline__ int begin(int i) const { return i * (units / count) + min(i, units % count); }
  __device__ __forceinline__ int length(int i) const { return units / count + (i < units % count); }
};

// What one warpgroup knows of its 64 rows after some of their keys: O and the softmax, as its threads hold them.
template <int kTiles>
struct Partial {
  float4 output[kTiles][128];  // a warp's stores are contiguous
  float4 maximum[128];         // of two rows, and the references of the two
  float2 sum[128];

  template <typename Softmax>
  __device__ __forceinline__ void store(const float (&o)[kTiles][4], const Softmax &softmax, int thread) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      __stcg(&output[j][thread], make_float4(o[j][0], o[j][1], o[j][2], o[j][3]));
    }
    __stcg(&maximum[thread],
           make_float4(softmax.maximum[0], softmax.maximum[1], softmax.reference[0], softmax.reference[1]));
    __stcg(&sum[thread], make_float2(softmax.sum[0], softmax.sum[1]));
  }

  // Adds these keys to those of `o` and `softmax`.
  template <typename Softmax>
  __device__ __forceinline__ void add_to(float (&o)[kTiles][4], Softmax &softmax, int thread) const {
    const float4 m = __ldcg(&maximum[thread]);
    const float2 l = __ldcg(&sum[thread]);
    const float maxima[2] = {m.x, m.y}, references[2] = {m.z, m.w}, sums[2] = {l.x, l.y};
    float before[2], added[2];  // factors that take both to the higher maximum
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool higher = maxima[r] > softmax.maximum[r];
      const float raised = higher ? references[r] : softmax.reference[r];
      // A row with no kept key yet has maximum -inf, and a reference that means nothing.
      before[r] =
          softmax.maximum[r] == negative_infinity() ? 0.0f : exp2_approx(softmax.reference[r] - raised);
      added[r] = maxima[r] == negative_infinity() ? 0.0f : exp2_approx(references[r] - raised);
      softmax.sum[r] = fmaf(softmax.sum[r], before[r], sums[r] * added[r]);
      softmax.reference[r] = raised;
      softmax.maximum[r] = fmaxf(softmax.maximum[r], maxima[r]);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      // Loads stay behind the fence: of all at once, ptxas keeps so many in flight that other registers spill.
      if (j % 4 == 0) __threadfence_block();
      const float4 other = __ldcg(&output[j][thread]);
      o[j][0] = fmaf(o[j][0], before[0], other.x * added[0]);
      o[j][1] = fmaf(o[j][1], before[0], other.y * added[0]);
      o[j][2] = fmaf(o[j][2], before[1], other.z * added[1]);
      o[j][3] = fmaf(o[j][3], before[1], other.w * added[1]);
    }
  }
};

// A flag in global memory, 0 or 1. PTX ISA, "Memory Consistency Model: Release and Acquire Patterns": what the threads
// of a warpgroup wrote before they met at a barrier, after which one of them raises the flag, is seen by those that
// meet the one that lowered it.
__device__ __forceinline__ void raise_flag(uint32_t *flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

// Waits for it, and leaves it at 0 for the next launch.
__device__ __forceinline__ void lower_flag(uint32_t *flag) {
  uint32_t raised;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  } while (raised == 0);
  asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(flag) : "memory");
}
