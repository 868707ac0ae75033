// What the assembly of templates/device does, for the kernel printed before this; chapters are the PTX ISA's.
//
// Copies finish in any order, in some launches not before all threads wait, and products of a warp run when they are
// committed or when they are waited for. Not emulated: memory that other threads see late or out of order for want of a
// fence, registers that `wgmma_fence` must order, and the numbers of registers.
#pragma once

namespace emulator {

// "Parallel Synchronization and Communication Instructions: mbarrier", as 64 opaque bits.
struct Phase {
  int32_t bytes;  // that are still to come; less than 0 where copies landed before they were announced
  uint8_t expected, pending;
  uint8_t parity;
  uint8_t initialised;
};

constexpr uint8_t kInitialised = 0x5a;

inline Phase &phase_of(Barrier *barrier) {
  Phase &phase = reinterpret_cast<Phase &>(barrier->state);
  if (phase.initialised != kInitialised) fault("an mbarrier that is not initialised");
  return phase;
}

inline void complete_if_due(Phase &phase) {
  progressed();
  if (phase.pending > 0 || phase.bytes != 0) return;
  phase.pending = phase.expected;
  phase.parity ^= 1;
}

inline void arrive_at(Barrier *barrier, int bytes) {
  maybe_yield();
  Phase &phase = phase_of(barrier);
  if (phase.pending == 0) fault("more arrivals at an mbarrier than the %d it expects", phase.expected);
  --phase.pending;
  phase.bytes += bytes;
  complete_if_due(phase);
  maybe_yield();
}

inline void deliver(Barrier *barrier, int bytes) {
  Phase &phase = phase_of(barrier);
  phase.bytes -= bytes;
  complete_if_due(phase);
}

// The same place in another block's shared memory.
template <typename T>
T *at_same_place(T *pointer, const Block &block, const Block &other) {
  return reinterpret_cast<T *>(other.shared + (reinterpret_cast<char *>(pointer) - block.shared));
}

// The 128-byte swizzle of wgmma.cuh.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7) % 8) << 4; }

inline uint16_t &element(const Block &block, uint32_t address) {
  return *reinterpret_cast<uint16_t *>(block.shared + swizzled(address));
}

// What tests/emulate.py writes in place of a CUtensorMap. Of elements, from the innermost dimension outwards.
struct HostTensorMap {
  uint16_t *data;
  int64_t strides[5];
  int32_t lengths[5], box[5], rank;
};
static_assert(sizeof(HostTensorMap) <= sizeof(TensorMap));

constexpr uint16_t kUnwritten = 0x7fff;  // what O holds before the launch: a NaN that no conversion yields

struct Box {
  HostTensorMap map;
  int begin[5];

  int elements() const {
    int count = 1;
    for (int i = 0; i < map.rank; ++i) count *= map.box[i];
    return count;
  }

  // Null outside of the tensor.
  uint16_t *at(int index) const {
    int64_t offset = 0;
    for (int i = 0; i < map.rank; ++i) {
      const int place = begin[i] + index % map.box[i];
      if (place < 0 || place >= map.lengths[i]) return nullptr;
      offset += place * map.strides[i];
      index /= map.box[i];
    }
    return map.data + offset;
  }

  void load(const Block &block, uint32_t address) const {
    for (int i = 0; i < elements(); ++i) {
      const uint16_t *source = at(i);
      element(block, address + 2 * i) = source ? *source : 0;
    }
  }

  void store(const Block &block, uint32_t address) const {
    for (int i = 0; i < elements(); ++i) {
      uint16_t *target = at(i);
      if (target == nullptr) continue;
      if (*target != kUnwritten) fault("an element of O is stored twice");
      *target = element(block, address + 2 * i);
    }
  }
};

inline Box box_of(const TensorMap *map, std::initializer_list<int> begin) {
  Box box;
  std::memcpy(&box.map, map, sizeof(box.map));
  if (static_cast<int>(begin.size()) != box.map.rank) fault("coordinates of another tensor map");
  std::copy(begin.begin(), begin.end(), box.begin);
  return box;
}

// "cp.async.bulk.tensor", to the block's shared memory: lands some time, then completes on the barrier.
inline void start_load(void *target, const Box &box, Barrier *full, unsigned ranks = 0) {
  Block &block = *self->block;
  const uint32_t address = address_of(target);
  if (address % 1024 != 0) fault("a copy to an address that is not aligned for the swizzle");
  for (int rank = 0; rank < machine.cluster; ++rank) {
    if (ranks != 0 && (ranks >> rank & 1) == 0) continue;
    Block &other = ranks == 0 ? block : in_cluster(block, rank);
    Barrier *barrier = at_same_place(full, block, other);
    machine.in_flight.push_back({false, [=, &other] {
                                   box.load(other, address);
                                   deliver(barrier, 2 * box.elements());
                                 }});
    if (ranks == 0) break;
  }
  maybe_yield();
}

// The same from shared memory, which it reads some time.
inline void start_store(const void *source, const Box &box) {
  Fiber &issuer = *self;
  const uint32_t address = address_of(source);
  ++issuer.stores_unread;
  machine.in_flight.push_back({true, [=, &issuer] {
                                 box.store(*issuer.block, address);
                                 --issuer.stores_unread;
                                 progressed();
                               }});
  maybe_yield();
}

// "Matrix-descriptor"
struct Operand {
  uint32_t base, leading, stride;

  explicit Operand(uint64_t descriptor)
      : base((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) fault("a matrix descriptor without the 128-byte swizzle");
  }

  float k_major(const Block &block, int row, int k) const {
    return to_fp32(Element{element(block, base + row / 8 * stride + row % 8 * 128 + 2 * k)});
  }

  float mn_major(const Block &block, int k, int column) const {
    const uint32_t row = k / 8 * stride + k % 8 * 128;
    return to_fp32(Element{element(block, base + column / 64 * leading + row + 2 * (column % 64))});
  }
};

inline float from_pair(uint32_t pair, int half) {
  return to_fp32(Element{static_cast<uint16_t>(pair >> 16 * half)});
}

// "Asynchronous Warpgroup Level Matrix Instructions: wgmma.mma_async": the 16 rows of one warp, of all whose lanes.
inline void run_product(const Fiber *const *lanes, const Product *const *products) {
  const Product &first = *products[0];
  const Block &block = *lanes[0]->block;
  const int rows_begin = lanes[0]->thread / 32 % 4 * 16, columns = 8 * first.columns;
  static float a[16][16], b[16][256];
  for (int row = 0; row < 16 && first.a_registers == nullptr; ++row) {
    for (int k = 0; k < 16; ++k) a[row][k] = Operand(first.a_shared).k_major(block, rows_begin + row, k);
  }
  for (int lane = 0; lane < 32 && first.a_registers != nullptr; ++lane) {
    for (int e = 0; e < 8; ++e) {  // of four registers, the rows alternate
      const int row = lane / 4 + e / 2 % 2 * 8, k = e / 4 * 8 + 2 * (lane % 4) + e % 2;
      a[row][k] = from_pair(products[lane]->a_registers[e / 2], e % 2);
    }
  }
  const Operand operand(first.b);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < columns; ++n) {
      b[k][n] = first.b_is_transposed ? operand.mn_major(block, k, n) : operand.k_major(block, n, k);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product &product = *products[lane];
    if (product.b != first.b || product.a_shared != first.a_shared) fault("lanes issue different products");
    for (int i = 0; i < 4 * first.columns; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float sum = product.accumulate ? product.d[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      product.d[i] = sum;
    }
  }
}

// Runs this warp's groups but the last ones.
inline void run_groups(size_t unfinished) {
  Fiber *lanes[32];
  for (int lane = 0; lane < 32; ++lane)
    lanes[lane] = self->block->fibers[self->thread / 32 * 32 + lane].get();
  while (lanes[0]->groups.size() > unfinished) {
    for (size_t i = 0; i < lanes[0]->groups[0].size(); ++i) {
      const Product *products[32];
      for (int lane = 0; lane < 32; ++lane) products[lane] = &lanes[lane]->groups[0][i];
      run_product(lanes, products);
    }
    for (Fiber *lane : lanes) lane->groups.erase(lane->groups.begin());
  }
}

inline void run_groups_together(size_t unfinished, bool runs) {
  exchange(0, "wgmma");
  if (self->thread % 32 == 0 && runs) run_groups(unfinished);
  exchange(0, "wgmma");
}

}  // namespace emulator

inline void Barrier::init(uint32_t arrivals) {
  const auto count = static_cast<uint8_t>(arrivals);
  reinterpret_cast<emulator::Phase &>(state) = {0, count, count, 0, emulator::kInitialised};
  emulator::self->block->barriers.push_back(this);
}

inline void Barrier::arrive() { emulator::arrive_at(this, 0); }
inline void Barrier::arrive(uint32_t arrivals) {
  for (uint32_t i = 0; i < arrivals; ++i) arrive();
}
inline void Barrier::arrive_expect(uint32_t bytes) { emulator::arrive_at(this, static_cast<int>(bytes)); }

inline void Barrier::arrive_remote(uint32_t rank, uint32_t arrivals) {
  const emulator::Block &block = *emulator::self->block;
  Barrier *remote = emulator::at_same_place(this, block, emulator::in_cluster(block, rank));
  for (uint32_t i = 0; i < arrivals; ++i) emulator::arrive_at(remote, 0);
}

inline bool Barrier::try_wait(uint32_t parity) {
  emulator::maybe_yield();
  const emulator::Phase &phase = emulator::phase_of(this);
  emulator::Fiber &fiber = *emulator::self;
  if (phase.parity != (parity & 1)) {
    fiber.waits_for = nullptr;
    return true;
  }
  fiber.waits_for = parity & 1 ? "mbarrier, parity 1," : "mbarrier, parity 0,";
  fiber.waits_at = emulator::address_of(this);
  emulator::yield();
  return false;
}

inline void fence_barrier_init() {}

inline uint32_t cluster_rank() { return emulator::self->block->index % emulator::machine.cluster; }

// "barrier.cluster": a named barrier of the cluster's first block, that no block of threads has.
inline void cluster_sync() {
  using namespace emulator;
  maybe_yield();
  NamedBarrier &barrier = in_cluster(*self->block, 0).named[15];
  const unsigned turn = barrier.turn;
  arrive_at(barrier, 15, machine.threads * machine.cluster, false, false);
  wait_until([&] { return barrier.turn != turn; }, "barrier of the cluster");
}

// "st.async"
inline void store_remote(int *destination, int value, Barrier *full, uint32_t rank) {
  using namespace emulator;
  const Block &block = *self->block, &other = in_cluster(block, rank);
  int *target = at_same_place(destination, block, other);
  Barrier *barrier = at_same_place(full, block, other);
  machine.in_flight.push_back({false, [=] {
                                 *target = value;
                                 deliver(barrier, sizeof(int));
                               }});
  maybe_yield();
}

template <int kThreads>
void named_barrier_sync(int id) {
  emulator::named_barrier(id, kThreads, true);
}

template <int kThreads>
void named_barrier_arrive(int id) {
  emulator::named_barrier(id, kThreads, false);
}

template <int kThreads>
bool named_barrier_any(int id, bool vote) {
  return __shfl_sync(0xffffffff, emulator::named_barrier(id, kThreads, true, true, vote), 0);
}

inline void prefetch_tensor_map(const TensorMap *) {}

inline void tma_load(void *target, const TensorMap *map, Barrier *full, int column, int row, int head,
                     int batch) {
  emulator::start_load(target, emulator::box_of(map, {column, row, head, batch}), full);
}

inline void tma_load_packed(void *target, const TensorMap *map, Barrier *full, int column, int row, int head,
                            int batch) {
  emulator::start_load(target, emulator::box_of(map, {column, 0, row, head, batch}), full);
}

inline void tma_load_multicast(void *target, const TensorMap *map, Barrier *full, uint16_t blocks, int column,
                               int row, int head, int batch) {
  emulator::start_load(target, emulator::box_of(map, {column, row, head, batch}), full, blocks);
}

inline void tma_store(const TensorMap *map, const void *source, int column, int row, int head, int batch) {
  emulator::start_store(source, emulator::box_of(map, {column, row, head, batch}));
}

inline void tma_store_packed(const TensorMap *map, const void *source, int column, int row, int head,
                             int batch) {
  emulator::start_store(source, emulator::box_of(map, {column, 0, row, head, batch}));
}

inline void tma_store_commit() {}

inline void tma_store_wait_read() {
  emulator::Fiber &fiber = *emulator::self;
  emulator::wait_until([&] { return fiber.stores_unread == 0; }, "reads of its stores");
}

inline void fence_async_proxy() {}

// "Warp Level Matrix Load Instruction: ldmatrix": lane i gives the address of row i % 8 of matrix i / 8, and gets two
// neighbours of row i / 4 of each.
inline void ldmatrix(uint32_t (&fragment)[4], uint32_t address) {
  const emulator::Block &block = *emulator::self->block;
  const int lane = emulator::self->thread % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32_t row = __shfl_sync(0xffffffff, address, 8 * matrix + lane / 4);
    std::memcpy(&fragment[matrix], block.shared + row + 4 * (lane % 4), 4);
  }
}

inline void wgmma_fence() {}

inline void wgmma_commit() {
  emulator::Fiber &fiber = *emulator::self;
  fiber.groups.push_back(std::move(fiber.issued));
  fiber.issued.clear();
  emulator::run_groups_together(0, emulator::draw(2) == 0);
}

template <int kUnfinished>
void wgmma_wait() {
  emulator::run_groups_together(kUnfinished, true);
}

// Products are run by functions that the compiler does not look into: it keeps no register across them.
template <int kTiles>
void pin_registers(float (&)[kTiles][4]) {}
template <int kSteps>
void pin_registers(uint32_t (&)[kSteps][4]) {}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

namespace {

template <int kColumns>
void issue(float (&d)[kColumns][4], const uint32_t *a_registers, uint64_t a, uint64_t b, bool b_is_transposed,
           int accumulate) {
  emulator::self->issued.push_back({&d[0][0], kColumns, a_registers, a, b, b_is_transposed, accumulate != 0});
}

inline void wgmma_scores(float (&d)[kTileKv / 8][4], uint64_t a, uint64_t b, int accumulate) {
  issue(d, nullptr, a, b, false, accumulate);
}

inline void wgmma_scores(float (&d)[kTileKv / 8][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  issue(d, a, 0, b, false, accumulate);
}

inline void wgmma_output(float (&d)[kHeadDimV / 8][4], uint64_t a, uint64_t b, int accumulate) {
  issue(d, nullptr, a, b, true, accumulate);
}

inline void wgmma_output(float (&d)[kHeadDimV / 8][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  issue(d, a, 0, b, true, accumulate);
}

}  // namespace

inline int forget(int value) { return value; }

// Flags of stream_k.cuh. "Memory Consistency Model": the CPU's is stronger.
inline void raise_flag(uint32_t *flag) {
  emulator::maybe_yield();
  if (*flag != 0) emulator::fault("a flag is raised twice");
  *flag = 1;
  emulator::progressed();
}

inline void lower_flag(uint32_t *flag) {
  emulator::wait_until([=] { return *flag != 0; }, "a flag in global memory");
  *flag = 0;
}
