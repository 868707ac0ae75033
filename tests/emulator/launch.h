// Runs the kernel printed before this: all blocks of the grid, as many at a time as fit.
#pragma once

namespace emulator {

inline void run_fiber() {
  machine.kernel();
  self->done = true;
  progressed();
  _longjmp(machine.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber &fiber) {
  self = &fiber;
  threadIdx.x = fiber.thread, blockIdx.x = fiber.block->index;
  if (_setjmp(machine.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    setcontext(&fiber.beginning);
  }
  self = nullptr;
}

inline std::unique_ptr<Fiber> new_fiber(Block &block, int thread) {
  constexpr int kStackBytes = 64 << 10;
  auto fiber = std::make_unique<Fiber>();
  fiber->block = &block, fiber->thread = thread;
  fiber->stack.reset(new char[kStackBytes]);
  getcontext(&fiber->beginning);
  fiber->beginning.uc_stack.ss_sp = fiber->stack.get();
  fiber->beginning.uc_stack.ss_size = kStackBytes;
  fiber->beginning.uc_link = nullptr;
  makecontext(&fiber->beginning, run_fiber, 0);
  return fiber;
}

inline void start_block(int index) {
  auto block = std::make_unique<Block>();
  block->index = index;
  const size_t bytes = machine.shared_bytes + 16;
  block->memory.reset(new char[bytes + 1024]);
  block->shared = block->memory.get() + -reinterpret_cast<uintptr_t>(block->memory.get()) % 1024;
  std::memset(block->shared, 0xff, bytes);  // NaN, and no barrier
  block->warps.resize(machine.threads / 32);
  for (int thread = 0; thread < machine.threads; ++thread) block->fibers.push_back(new_fiber(*block, thread));
  machine.running.push_back(std::move(block));
  progressed();
}

inline void check_end(const Block &block) {
  for (auto &fiber : block.fibers) {
    if (fiber->stores_unread > 0)
      fault("block %d ends before its stores have read shared memory", block.index);
    if (!fiber->groups.empty()) fault("block %d ends before its matrix products", block.index);
  }
  for (const void *barrier : block.barriers) {
    const auto &phase = *static_cast<const Phase *>(barrier);
    if (phase.pending != phase.expected || phase.bytes != 0) {
      fault("block %d ends within a phase of the mbarrier at %d", block.index,
            static_cast<int>(static_cast<const char *>(barrier) - block.shared));
    }
  }
}

inline bool has_ended(const Block &block) {
  return std::all_of(block.fibers.begin(), block.fibers.end(), [](auto &fiber) { return fiber->done; });
}

// Clusters start and end as one.
inline void end_blocks() {
  auto &running = machine.running;
  for (size_t i = 0; i < running.size();) {
    const auto begin = running.begin() + i, end = begin + machine.cluster;
    if (std::all_of(begin, end, [](auto &block) { return has_ended(*block); })) {
      for (auto block = begin; block != end; ++block) check_end(**block);
      running.erase(begin, end);
      progressed();
    } else {
      i += machine.cluster;
    }
  }
}

inline void finish_copy(size_t index) {
  auto &in_flight = machine.in_flight;
  const Copy copy = std::move(in_flight[index]);
  in_flight.erase(in_flight.begin() + index);
  copy.finish();
}

inline void finish_some_copies(bool quiet) {
  const auto &in_flight = machine.in_flight;
  if (!machine.late) {
    const size_t count = draw(3) == 0 ? in_flight.size() : draw(in_flight.size() + 1);
    for (size_t i = 0; i < count; ++i) finish_copy(draw(in_flight.size()));
  } else if (quiet && !in_flight.empty()) {
    size_t index = draw(in_flight.size());
    for (size_t i = 0; i < in_flight.size() && in_flight[index].store; ++i)
      index = (index + 1) % in_flight.size();
    finish_copy(index);
  }
}

// For some rounds a block, or a warp of it, does not run.
struct Pause {
  int rounds = 0, block = -1, warp = -1;

  void next() {
    if (--rounds > 0) return;
    *this = {1 + static_cast<int>(draw(1000)), -1, -1};
    if (draw(2) == 0) return;
    block = machine.running[draw(machine.running.size())]->index;
    if (draw(2) == 0) warp = draw(machine.threads / 32);
  }

  bool holds(const Fiber &fiber) const {
    return fiber.block->index == block && (warp < 0 || fiber.thread / 32 == warp);
  }
};

[[noreturn]] inline void report_deadlock(int next, int blocks) {
  char text[2048];
  int length = snprintf(text, sizeof(text), "deadlock, with %d of %d blocks begun:", next, blocks);
  for (auto &block : machine.running) {
    for (auto &fiber : block->fibers) {
      if (fiber->done || !fiber->waits_for || (fiber->thread % 128 != 0 && fiber->thread > 0)) continue;
      if (length > 1900) break;
      length += snprintf(text + length, sizeof(text) - length, "\n  block %d, thread %d waits for: %.40s %d",
                         block->index, fiber->thread, fiber->waits_for, static_cast<int>(fiber->waits_at));
    }
  }
  fault("%s", text);
}

inline void run_all(int blocks, int resident) {
  constexpr int kRoundsStuck = 100;
  int next = 0, stuck = 0;
  Pause pause;
  while (next < blocks || !machine.running.empty()) {
    const long before = machine.progress;
    while (next < blocks && static_cast<int>(machine.running.size()) < resident * machine.cluster) {
      for (int rank = 0; rank < machine.cluster; ++rank) start_block(next++);
    }
    pause.next();
    const int first = draw(machine.running.size() * machine.threads);
    for (size_t i = 0; i < machine.running.size() * machine.threads; ++i) {
      const size_t place = (first + i) % (machine.running.size() * machine.threads);
      Fiber &fiber = *machine.running[place / machine.threads]->fibers[place % machine.threads];
      if (!fiber.done && !pause.holds(fiber)) resume(fiber);
    }
    const bool quiet = machine.progress == before;
    if (quiet) pause = Pause{1000};  // of none
    stuck = quiet && machine.in_flight.empty() ? stuck + 1 : 0;
    finish_some_copies(quiet);
    end_blocks();
    if (stuck > kRoundsStuck) report_deadlock(next, blocks);
  }
}

}  // namespace emulator

// Null, or what went wrong. `resident` blocks, or clusters of them, run at a time. Seeds from a multiple of 6 on have
// all tempers of the machine.
static const char *launch(std::function<void()> kernel, int threads, int blocks, int cluster, int resident,
                          int shared_bytes, unsigned seed) {
  using emulator::machine;
  machine.kernel = std::move(kernel);
  machine.threads = threads, machine.cluster = cluster, machine.shared_bytes = shared_bytes;
  machine.random = seed * 2654435769ull + 1;
  for (int i = 0; i < 8; ++i) emulator::draw(2);
  const unsigned choices[] = {3, 20, 500};
  machine.late = seed % 2;
  machine.yields_every = choices[seed / 2 % 3];
  machine.progress = 0;
  machine.running.clear();
  machine.in_flight.clear();
  gridDim.x = blocks;
  if (_setjmp(machine.failed) != 0) return machine.message;
  emulator::run_all(blocks, resident);
  return nullptr;
}
