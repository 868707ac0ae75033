// The threads of a Hopper SM as fibers of one CPU thread, one of which runs at a time.
//
// A fiber gives way where it waits, and at random where others could be faster. What another thread of a warp or of a
// block does in between is thus as early or as late as a GPU might have it, but for what hopper.h leaves out.
// Included before the printed kernel.
#pragma once

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>
#include <ucontext.h>

namespace emulator {

struct Block;

// D[64 x 8 columns] (+)= A B as one lane issued it: hopper.h.
struct Product {
  float *d;
  int columns;                  // of 8
  const uint32_t *a_registers;  // null: a_shared
  uint64_t a_shared, b;
  bool b_is_transposed;  // MN-major
  bool accumulate;
};

struct Fiber {
  Block *block;
  int thread;
  bool started = false, done = false;
  const char *waits_for = nullptr;  // for messages
  uint64_t waits_at = 0;
  int stores_unread = 0;  // bulk stores that may still read shared memory
  std::vector<Product> issued;
  std::vector<std::vector<Product>> groups;  // committed, not waited for
  std::unique_ptr<char[]> stack;
  ucontext_t beginning;
  jmp_buf context;
};

struct Warp {
  int arrived = 0;
  unsigned turn = 0;
  const char *instruction = nullptr;
  uint64_t values[2][32];  // of this turn and the one before, which some lanes have not read yet
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  unsigned turn = 0;
  bool any = false, result = false;
  bool votes = false;
};

struct Block {
  int index;
  char *shared;  // shared memory, address 0
  std::unique_ptr<char[]> memory;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  NamedBarrier named[16];
  std::vector<const void *> barriers;  // mbarriers, once initialised
};

// Of the copy engine, in any order.
struct Copy {
  bool store;
  std::function<void()> finish;
};

// One launch.
struct Machine {
  std::function<void()> kernel;
  int threads, cluster, shared_bytes;
  unsigned yields_every;  // time a fiber could
  bool late;              // copies finish when all threads wait for them, stores last
  uint64_t random;
  long progress;  // changes where something happened that others may wait for
  std::vector<std::unique_ptr<Block>> running;
  std::vector<Copy> in_flight;
  jmp_buf scheduler, failed;
  char message[4096];
};

static Machine machine;
static Fiber *self = nullptr;  // null: the scheduler

inline unsigned draw(unsigned below) {  // xorshift64*
  uint64_t &x = machine.random;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return static_cast<unsigned>((x * 0x2545F4914F6CDD1Dull) >> 33) % below;
}

inline void progressed() { ++machine.progress; }

// Ends the launch with a message.
[[noreturn]] inline void fault(const char *format, ...) {
  char *text = machine.message;
  char *const end = text + sizeof(machine.message);
  if (self) text += snprintf(text, end - text, "block %d, thread %d: ", self->block->index, self->thread);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, end - text, format, arguments);
  va_end(arguments);
  _longjmp(machine.failed, 1);
}

__attribute__((noinline)) inline void yield() {
  if (_setjmp(self->context) == 0) _longjmp(machine.scheduler, 1);
}

inline void maybe_yield() {
  if (draw(machine.yields_every) == 0) yield();
}

template <typename Condition>
void wait_until(Condition holds, const char *what, uint64_t at = 0) {
  self->waits_for = what, self->waits_at = at;
  while (!holds()) yield();
  self->waits_for = nullptr;
}

// All lanes of a warp give a word, and see those of the others.
inline const uint64_t *exchange(uint64_t value, const char *instruction) {
  maybe_yield();
  Warp &warp = self->block->warps[self->thread / 32];
  if (warp.arrived > 0 && warp.instruction != instruction) {
    fault("at %s, where other lanes of its warp are at %s", instruction, warp.instruction);
  }
  warp.instruction = instruction;
  const unsigned turn = warp.turn;
  uint64_t *values = warp.values[turn % 2];
  values[self->thread % 32] = value;
  if (++warp.arrived == 32) {
    warp.arrived = 0, ++warp.turn;
    progressed();
  } else {
    wait_until([&] { return warp.turn != turn; }, instruction);
  }
  return values;
}

inline char *shared_memory() { return self->block->shared + 16; }  // not aligned as the kernel wants it

inline uint32_t address_of(const void *pointer) {
  const ptrdiff_t address = static_cast<const char *>(pointer) - self->block->shared;
  if (address < 0 || address > machine.shared_bytes + 16) fault("an address outside of shared memory");
  return static_cast<uint32_t>(address);
}

// Another block of the cluster (PTX "mapa").
inline Block &in_cluster(const Block &block, uint32_t rank) {
  for (auto &other : machine.running) {
    if (other->index == block.index / machine.cluster * machine.cluster + static_cast<int>(rank))
      return *other;
  }
  fault("block %u of the cluster has gone", rank);
}

// PTX "bar": `threads` counts those that sync and those that only arrive.
inline void arrive_at(NamedBarrier &barrier, int id, int threads, bool votes, bool vote) {
  if (barrier.arrived > 0 && barrier.threads != threads) {
    fault("named barrier %d is for %d threads here, and for %d elsewhere", id, threads, barrier.threads);
  }
  if (barrier.arrived > 0 && barrier.votes != votes)
    fault("named barrier %d: some threads vote, others don't", id);
  barrier.threads = threads, barrier.votes = votes;
  barrier.any = barrier.any || vote;
  if (++barrier.arrived == threads) {
    barrier.result = barrier.any, barrier.any = false;
    barrier.arrived = 0, ++barrier.turn;
  }
  progressed();
}

inline bool named_barrier(int id, int threads, bool waits, bool votes = false, bool vote = false) {
  if (id < 0 || id > 15) fault("there is no named barrier %d", id);
  maybe_yield();
  NamedBarrier &barrier = self->block->named[id];
  const unsigned turn = barrier.turn;
  arrive_at(barrier, id, threads, votes, vote);
  if (waits) wait_until([&] { return barrier.turn != turn; }, "named barrier", id);
  const bool result = barrier.result;
  maybe_yield();
  return result;
}

}  // namespace emulator

static Index gridDim;

inline size_t __cvta_generic_to_shared(const void *pointer) { return emulator::address_of(pointer); }

inline void __syncthreads() { emulator::named_barrier(0, emulator::machine.threads, true); }
inline void __syncwarp() { emulator::exchange(0, "__syncwarp"); }

inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t *votes = emulator::exchange(vote, "a vote");
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return static_cast<T>(emulator::exchange(static_cast<uint64_t>(value), "__shfl_sync")[lane]);
}

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return __uint_as_float(emulator::exchange(bits, "__shfl_xor_sync")[emulator::self->thread % 32 ^ lanes]);
}

inline unsigned atomicInc(unsigned *address, unsigned last) {
  emulator::maybe_yield();
  const unsigned old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}

// "stmatrix": lane i names row i % 8 of matrix i / 8, and holds columns 2 * (i % 4) and the next of row i / 4 of each.
template <typename... Fragments>
void store_matrices(uint32_t row_address, Fragments... fragments) {
  char *shared = emulator::self->block->shared;
  const int lane = emulator::self->thread % 32;
  const uint64_t *addresses = emulator::exchange(row_address, "stmatrix");
  int matrix = 0;
  for (const uint32_t fragment : {fragments...}) {
    const uint32_t address = addresses[8 * matrix++ + lane / 4] + 4 * (lane % 4);
    std::memcpy(shared + address, &fragment, 4);
  }
}
