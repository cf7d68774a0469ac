// hopper.h without a GPU. As far as a kernel can tell: boxes come with the swizzle, at the latest
// moment, when somebody waits for their barrier, and until then their place is poisoned; products
// read shared memory through their descriptors, in the layouts of the PTX ISA ("Canonical Layouts"
// of wgmma), only at the wait that covers them. Written from that text alone, so that a
// misunderstanding of it would be in the kernel and here alike: only a GPU can tell. Not simulated:
// the fences between kinds of memory access, the count of registers, several blocks at once.
#pragma once

#include <vector>

#include "../conv2d_problem.h"
#include "simulator.h"

#define GDFAST_HOPPER

namespace gdfast::cuda {

struct TensorMap {
  unsigned char* address;
  Axis axes[4];
  int box[4];
  int element;  // bytes
};

template <typename T>
TensorMap tensor_map(const char* op, const void* address, const Axis (&axes)[4],
                     const int (&box)[4]) {
  static_assert(sizeof(T) == 2 || std::is_same_v<T, float>, "half types or float");
  const auto require = [op](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string(op) + ": CUDA simulator: tensor_map: " + what);
  };
  TensorMap map{static_cast<unsigned char*>(const_cast<void*>(address)), {}, {}, sizeof(T)};
  require(reinterpret_cast<uintptr_t>(address) % 16 == 0, "address: expected a multiple of 16");
  const int row = box[0] * map.element;
  require(row == kBoxRow || row == kHalfBoxRow, "box: expected rows of 128 or 64 bytes");
  for (int i = 0; i < 4; ++i) {
    require(axes[i].size > 0 && axes[i].size <= int64_t{1} << 32, "size: expected 1 to 2^32");
    require(box[i] > 0 && box[i] <= 256, "box: expected 1 to 256");
    require(i == 0 || (axes[i].bytes % 16 == 0 && axes[i].bytes < int64_t{1} << 40),
            "bytes: expected multiples of 16 below 2^40");
    map.axes[i] = axes[i];
    map.box[i] = box[i];
  }
  return map;
}

inline TensorMap read_once(const char*, const TensorMap& map, int64_t) { return map; }

namespace simulator {

// In the 8 bytes that a barrier has.
struct Barrier {
  uint16_t expected, missing;
  int32_t bytes_and_phase;  // bytes to come, times 2, and the phase's parity
};
static_assert(sizeof(Barrier) == sizeof(uint64_t), "a barrier has 8 bytes");

struct Box {
  unsigned char* to;
  TensorMap map;  // whose thread may have ended when the box comes
  int at[4];
  uint64_t* barrier;
  const unsigned char* line = nullptr;  // or bytes side by side
  int bytes = 0;
};

// What a thread has started to write, and what lay there then.
struct Store {
  const TensorMap* map;
  int at[4];
  const unsigned char* from;
  std::vector<unsigned char> bytes;
  int group;
};

struct Multiplication {
  float* d;
  uint64_t a, b;
  bool accumulate;
  void (*run)(const Multiplication&, int thread);
  int group;
  const uint32_t* fragment;  // of a, where that is in registers,
  uint32_t fragments[4][4];  // and what it was then, with those of the lanes that share its rows
};

// What is under way in the block that runs.
struct UnderWay {
  int64_t block = -1;
  std::vector<Box> boxes;
  std::vector<Multiplication> products[1024];
  int committed[1024] = {};
  std::vector<Store> stores[1024];
  int committed_stores[1024] = {};
};

inline UnderWay& under_way() {
  static UnderWay now;
  if (now.block != block_number()) {
    now.block = block_number();
    now.boxes.clear();
    for (auto& products : now.products) products.clear();
    for (int& committed : now.committed) committed = 0;
    for (auto& stores : now.stores) stores.clear();
    for (int& committed : now.committed_stores) committed = 0;
  }
  return now;
}

inline Barrier read_barrier(const uint64_t* from) {
  Barrier barrier;
  std::memcpy(&barrier, from, sizeof barrier);
  return barrier;
}

inline void write_barrier(uint64_t* to, Barrier barrier) {
  if (barrier.missing == 0 && barrier.bytes_and_phase / 2 == 0) {
    barrier.missing = barrier.expected;
    barrier.bytes_and_phase ^= 1;
  }
  std::memcpy(to, &barrier, sizeof barrier);
}

inline void arrive(uint64_t* at, int bytes) {
  Barrier barrier = read_barrier(at);
  if (barrier.missing == 0 || barrier.missing > barrier.expected) {
    fail("barrier: expected a barrier_init before, and no more arrivals than it said");
  }
  --barrier.missing;
  barrier.bytes_and_phase += 2 * bytes;
  write_barrier(at, barrier);
}

// The place of a byte of a box: chunks of 16 bytes change places within their row.
inline size_t swizzled(size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

inline size_t swizzled_half(size_t offset) { return offset ^ (offset >> 7 & 3) << 4; }

inline int box_rows(const TensorMap& map) { return map.box[1] * map.box[2] * map.box[3]; }
inline int row_bytes(const TensorMap& map) { return map.box[0] * map.element; }
inline int box_bytes(const TensorMap& map) { return box_rows(map) * row_bytes(map); }

// Calls each(address, or null outside of the tensor, offset from the box's first byte) for the
// elements of a box, `shared` in shared memory: chunks change places by the address.
template <typename Each>
void for_each_element(const TensorMap& map, const int (&first)[4], const unsigned char* shared,
                      Each&& each) {
  const auto begin = static_cast<size_t>(shared - shared_memory());
  for (int row = 0; row < box_rows(map); ++row) {
    const int in_box[4] = {0, row % map.box[1], row / map.box[1] % map.box[2],
                           row / map.box[1] / map.box[2]};
    bool inside = true;
    int64_t from = 0;
    for (int i = 1; i < 4; ++i) {
      const int64_t at = int64_t{first[i]} + in_box[i];
      inside = inside && at >= 0 && at < map.axes[i].size;
      from += at * map.axes[i].bytes;
    }
    for (int i = 0; i < map.box[0]; ++i) {
      const int64_t at = int64_t{first[0]} + i;
      const bool exists = inside && at >= 0 && at < map.axes[0].size;
      const size_t place = begin + static_cast<size_t>(row * row_bytes(map) + map.element * i);
      each(exists ? map.address + from + map.element * at : nullptr,
           (row_bytes(map) == kBoxRow ? swizzled(place) : swizzled_half(place)) - begin);
    }
  }
}

inline void complete(uint64_t* at, int bytes) {
  Barrier barrier = read_barrier(at);
  barrier.bytes_and_phase -= 2 * bytes;
  write_barrier(at, barrier);
}

inline void deliver(const Box& box) {
  if (box.line != nullptr) {
    std::memcpy(box.to, box.line, static_cast<size_t>(box.bytes));
    return complete(box.barrier, box.bytes);
  }
  const TensorMap& map = box.map;
  const auto bytes = static_cast<size_t>(map.element);
  for_each_element(map, box.at, box.to, [&](const unsigned char* from, size_t offset) {
    if (from != nullptr) {
      std::memcpy(box.to + offset, from, bytes);
    } else {
      std::memset(box.to + offset, 0, bytes);
    }
  });
  complete(box.barrier, box_bytes(map));
}

struct Wait {
  uint64_t* barrier;
  int parity;
};

inline bool is_over(const void* argument) {
  const auto& wait = *static_cast<const Wait*>(argument);
  std::vector<Box>& boxes = under_way().boxes;
  size_t kept = 0;
  for (const Box& box : boxes) {
    if (box.barrier == wait.barrier) {
      deliver(box);
    } else {
      boxes[kept++] = box;
    }
  }
  boxes.resize(kept);
  return (read_barrier(wait.barrier).bytes_and_phase & 1) != wait.parity;
}

struct StoredMatrices {
  unsigned char* row;
  uint32_t registers[4];
};

// stmatrix with .trans: a lane's registers are pairs of a column, of the matrix in memory, whose
// rows the first 16 lanes have the addresses of.
inline void store_matrices(void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 2; ++matrix) {
      uint16_t pair[2];
      std::memcpy(pair, &static_cast<StoredMatrices*>(lanes[lane])->registers[matrix], sizeof pair);
      for (int i = 0; i < 2; ++i) {
        auto* const to = static_cast<StoredMatrices*>(lanes[8 * matrix + lane % 4 * 2 + i]);
        std::memcpy(to->row + 2 * (lane / 4), &pair[i], sizeof pair[i]);
      }
    }
  }
}

// stmatrix without it, of four: a lane's registers are pairs of a row.
inline void store_rows(void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const StoredMatrices& its = *static_cast<StoredMatrices*>(lanes[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      auto* const to = static_cast<StoredMatrices*>(lanes[8 * matrix + lane / 4]);
      std::memcpy(to->row + lane % 4 * 4, &its.registers[matrix], sizeof its.registers[matrix]);
    }
  }
}

}  // namespace simulator

// --- Barriers ---------------------------------------------------------------------------------

GDFAST_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  simulator::write_barrier(barrier, {count, count, 0});
}

GDFAST_DEVICE void barriers_ready() {}
GDFAST_DEVICE void barrier_arrive(uint64_t* barrier) { simulator::arrive(barrier, 0); }

GDFAST_DEVICE void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  simulator::arrive(barrier, bytes);
}

GDFAST_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  const simulator::Wait wait{barrier, parity};
  simulator::wait_until("barrier_wait", simulator::is_over, &wait);
}

// --- Memory -----------------------------------------------------------------------------------

GDFAST_DEVICE void load_box(void* shared, const TensorMap& map, const int (&at)[4],
                            uint64_t* barrier) {
  auto* const to = static_cast<unsigned char*>(shared);
  if ((to - shared_memory()) % 128 != 0) simulator::fail("load_box: expected a multiple of 128");
  std::memset(to, 0xff, static_cast<size_t>(simulator::box_bytes(map)));
  simulator::under_way().boxes.push_back({to, map, {at[0], at[1], at[2], at[3]}, barrier});
}

GDFAST_DEVICE void expect_boxes(const TensorMap&) {}

GDFAST_DEVICE void load_line(void* shared, const void* from, int bytes, uint64_t* barrier) {
  simulator::require_aligned("load_line", shared);
  simulator::require_aligned("load_line", from);
  if (bytes <= 0 || bytes % 16 != 0) simulator::fail("load_line: expected a multiple of 16 bytes");
  auto* const to = static_cast<unsigned char*>(shared);
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  simulator::under_way().boxes.push_back(
      {to, {}, {}, barrier, static_cast<const unsigned char*>(from), bytes});
}

// Written as late as can be: who changes shared memory before the wait is told of it.
GDFAST_DEVICE void store_box(const TensorMap& map, const int (&at)[4], const void* shared) {
  const auto* const from = static_cast<const unsigned char*>(shared);
  if ((from - shared_memory()) % 1024 != 0) {
    simulator::fail("store_box: expected a multiple of 1024");
  }
  for (const int first : at) {
    if (first < 0) simulator::fail("store_box: expected places from 0 on");
  }
  simulator::UnderWay& now = simulator::under_way();
  now.stores[threadIdx.x].push_back({&map,
                                     {at[0], at[1], at[2], at[3]},
                                     from,
                                     {from, from + simulator::box_bytes(map)},
                                     now.committed_stores[threadIdx.x]});
}

GDFAST_DEVICE void stores_ready() {}
GDFAST_DEVICE void stores_commit() { ++simulator::under_way().committed_stores[threadIdx.x]; }

template <int kPending>
GDFAST_DEVICE void stores_wait() {
  simulator::UnderWay& now = simulator::under_way();
  std::vector<simulator::Store>& stores = now.stores[threadIdx.x];
  size_t done = 0;
  for (; done < stores.size(); ++done) {
    const simulator::Store& store = stores[done];
    if (store.group >= now.committed_stores[threadIdx.x] - kPending) break;
    if (std::memcmp(store.bytes.data(), store.from, store.bytes.size()) != 0) {
      simulator::fail("store_box: what is stored was changed before it was waited for");
    }
    const auto store_one = [&](unsigned char* to, size_t offset) {
      const auto bytes = static_cast<size_t>(store.map->element);
      if (to != nullptr) std::memcpy(to, store.bytes.data() + offset, bytes);
    };
    simulator::for_each_element(*store.map, store.at, store.from, store_one);
  }
  stores.erase(stores.begin(), stores.begin() + static_cast<std::ptrdiff_t>(done));
}

template <int kPending>
GDFAST_DEVICE void stores_wait_read() {
  stores_wait<kPending>();
}

GDFAST_DEVICE void stmatrix_x2_transposed(void* shared_row, uint32_t first, uint32_t second) {
  simulator::require_aligned("stmatrix_x2_transposed", shared_row);
  simulator::StoredMatrices matrices{static_cast<unsigned char*>(shared_row), {first, second}};
  simulator::meet_warp("stmatrix_x2_transposed", &matrices, simulator::store_matrices);
}

GDFAST_DEVICE void stmatrix_x4(void* shared_row, const uint32_t (&words)[4]) {
  simulator::require_aligned("stmatrix_x4", shared_row);
  simulator::StoredMatrices matrices{static_cast<unsigned char*>(shared_row),
                                     {words[0], words[1], words[2], words[3]}};
  simulator::meet_warp("stmatrix_x4", &matrices, simulator::store_rows);
}

// --- Registers --------------------------------------------------------------------------------

GDFAST_DEVICE float near_quotient(float a, float b) { return a / b; }
GDFAST_DEVICE int computed_again(int value) { return value; }

template <int kCount>
GDFAST_DEVICE void give_registers() {}

template <int kCount>
GDFAST_DEVICE void take_registers() {}

}  // namespace gdfast::cuda

#include "hopper_simulator_products.h"
