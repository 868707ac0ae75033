// mbarrier: a barrier in shared memory that counts arrivals and, for copies, bytes.
// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
//
// A barrier completes a phase when its expected arrivals have come and its pending bytes are zero; waiters name the
// parity of the phase that they wait for. A ring of stages uses two of them per stage: `full` (the copy has landed)
// and `empty` (every reader is done). Starting the writer at parity 1 lets its first pass through the ring not wait.
#pragma once

#include "mma.cuh"

struct Barrier {
  uint64_t state;

  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }

  // As many arrivals at once.
  __device__ __forceinline__ void arrive(uint32_t arrivals) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals)
                 : "memory");
  }

  // Arrives on the barrier at the same address in block `rank` of the cluster.
  __device__ __forceinline__ void arrive_remote(uint32_t rank, uint32_t arrivals = 1) {
    asm volatile(
        "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
        " mbarrier.arrive.shared::cluster.b64 _, [remote], %2;\n}" ::"r"(shared_address(this)),
        "r"(rank), "r"(arrivals)
        : "memory");
  }

  // Arrives once and announces `bytes` that a bulk copy will deliver in this phase.
  __device__ __forceinline__ void arrive_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
                 "r"(bytes)
                 : "memory");
  }

  // Waits until the phase of this parity has completed. The loop is C++ on purpose: with a branch inside the assembly
  // two tilings (d64 192x64 and 192x48) hung on an H200, for a reason that was not found.
  __device__ __forceinline__ void wait(uint32_t parity) {
    while (!try_wait(parity)) {}
  }

  // Sleeps for a while at most; whether the phase has completed.
  __device__ __forceinline__ bool try_wait(uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n .reg .pred done;\n mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        " selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return done != 0;
  }
};

// Makes the initialised barriers visible to the copy engine and to the cluster's other blocks.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A stage of a ring and the parity that its barriers are at.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// This block's number in its cluster (PTX "%cluster_ctarank").
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of every block of the cluster (PTX "barrier.cluster").
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
}

// Writes a word at the same address in block `rank`, delivered on that block's barrier (PTX "st.async").
__device__ __forceinline__ void store_remote(int *destination, int value, Barrier *full, uint32_t rank) {
  asm volatile(
      "{\n .reg .b32 remote, remote_full;\n mapa.shared::cluster.u32 remote, %0, %3;\n"
      " mapa.shared::cluster.u32 remote_full, %2, %3;\n"
      " st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [remote], %1, [remote_full];\n}" ::"r"(
          shared_address(destination)),
      "r"(value), "r"(shared_address(full)), "r"(rank)
      : "memory");
}

// Named barriers (PTX "bar.sync", "bar.arrive"): `threads` counts those that sync and those that only arrive.
template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// And whether any of the threads said so (PTX "barrier.red.or").
template <int kThreads>
__device__ __forceinline__ bool named_barrier_any(int id, bool vote) {
  uint32_t any;
  asm volatile(
      "{\n .reg .pred vote, any;\n setp.ne.u32 vote, %3, 0;\n barrier.cta.red.or.aligned.pred any, %1, %2, vote;\n"
      " selp.u32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "r"(id), "n"(kThreads), "r"(static_cast<uint32_t>(vote))
      : "memory");
  return __shfl_sync(0xffffffff, any, 0) != 0;  // uniform, and ptxas is to know
}

template <int kThreads>
__device__ __forceinline__ void named_barrier_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
