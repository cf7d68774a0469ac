// The scheduler of the simulator: block after block, and in a block warp after warp, each as far as
// it gets without the others.
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "device.h"
#include "fiber.h"

namespace gdfast::cuda {

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simulator {
namespace {

constexpr int kBarriers = 16;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostShared = 227 * 1024;
constexpr unsigned char kNaN = 0xff;  // repeated, a NaN in every floating type
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;  // the sanitizer sees more
#else
constexpr size_t kGuard = 1024;
#endif
constexpr unsigned char kGuardByte = 0xa5;

enum class State { kReady, kAtWarp, kAtBarrier, kWaiting, kEnded };

struct Copy {
  void* to;
  const void* from;  // null for zeros
  size_t bytes;
  int group;
};

struct Fiber {
  Context context;
  State state = State::kEnded;
  const char* waits_at = nullptr;  // kAtWarp, kWaiting
  void* brought = nullptr;
  void (*act)(void* const*) = nullptr;
  bool (*ready)(const void*) = nullptr;
  const void* argument = nullptr;
  int barrier = 0;
  std::vector<Copy> copies;
  int committed = 0;
};

struct Barrier {
  int expected = 0, arrived = 0;
};

// One launch at a time: kernels find what is theirs here.
std::mutex one_launch;
std::deque<Fiber> fibers;  // stay for the next launch, with their stacks
Fiber* running = nullptr;
Context scheduler;
const std::function<void()>* body = nullptr;
std::string error;
unsigned char* shared = nullptr;
size_t shared_size = 0;
int thread_count = 0;
bool descending = false;
int64_t begun = 0;
Barrier barriers[kBarriers];

int nth(int i, int count) { return descending ? count - 1 - i : i; }

void suspend() { running->context.switch_to(scheduler); }

void fiber_main() {
  Context::arrive_from(scheduler);
  try {
    (*body)();
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  running->state = State::kEnded;
  running->context.switch_to(scheduler, true);
}

bool can_run(const Fiber& fiber) {
  return fiber.state == State::kReady ||
         (fiber.state == State::kWaiting && fiber.ready(fiber.argument));
}

void run_fiber(int thread) {
  running = &fibers[thread];
  running->state = State::kReady;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  scheduler.switch_to(running->context);
  running = nullptr;
  if (!error.empty()) throw std::runtime_error("thread " + std::to_string(thread) + ": " + error);
}

// Lets the collective happen that all lanes of a warp have reached.
bool meet(int first) {
  void* brought[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fiber& fiber = fibers[first + lane];
    if (fiber.state != State::kAtWarp) return false;
    if (std::strcmp(fiber.waits_at, fibers[first].waits_at) != 0) return false;
    brought[lane] = fiber.brought;
  }
  fibers[first].act(brought);
  for (int lane = 0; lane < kWarp; ++lane) fibers[first + lane].state = State::kReady;
  return true;
}

// Runs a warp until it waits for others. Returns whether anything ran.
bool run_warp(int first) {
  for (bool any = false;; any = true) {
    bool ran = false;
    for (int i = 0; i < kWarp; ++i) {
      const int thread = first + nth(i, kWarp);
      if (!can_run(fibers[thread])) continue;
      run_fiber(thread);
      ran = true;
    }
    if (!meet(first) && !ran) return any;
  }
}

bool open_barriers() {
  bool opened = false;
  for (int id = 0; id < kBarriers; ++id) {
    Barrier& barrier = barriers[id];
    if (barrier.arrived == 0 || barrier.arrived != barrier.expected) continue;
    for (int thread = 0; thread < thread_count; ++thread) {
      Fiber& fiber = fibers[thread];
      if (fiber.state == State::kAtBarrier && fiber.barrier == id) fiber.state = State::kReady;
    }
    barrier = Barrier{};
    opened = true;
  }
  return opened;
}

std::string where(const Fiber& fiber) {
  switch (fiber.state) {
    case State::kEnded:
      return "ended";
    case State::kAtBarrier:
      if (fiber.barrier == 0) return "at sync_block";
      return "at sync_threads_of " + std::to_string(fiber.barrier);
    default:
      return std::string("at ") + fiber.waits_at;
  }
}

// Who waits where, as "threads 0-15 at sync_block, 16-31 ended".
std::string standstill() {
  std::string text = "not all threads reach the same collective: threads ";
  for (int begin = 0, end; begin < thread_count; begin = end) {
    const std::string here = where(fibers[begin]);
    for (end = begin + 1; end < thread_count && where(fibers[end]) == here;) ++end;
    if (begin > 0) text += ", ";
    text += std::to_string(begin);
    if (end - begin > 1) text += "-" + std::to_string(end - 1);
    text += " " + here;
    if (text.size() > 1000) return text + ", ...";
  }
  return text;
}

bool all_ended() {
  for (int thread = 0; thread < thread_count; ++thread) {
    if (fibers[thread].state != State::kEnded) return false;
  }
  return true;
}

void run_block() {
  ++begun;
  std::memset(shared, kNaN, shared_size);
  std::memset(shared + shared_size, kGuardByte, kGuard);
  for (Barrier& barrier : barriers) barrier = Barrier{};
  for (int thread = 0; thread < thread_count; ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.copies.clear();
    fiber.committed = 0;
    fiber.state = State::kReady;
    fiber.context.begin(fiber_main);
  }
  const int warps = thread_count / kWarp;
  while (!all_ended()) {
    bool ran = false;
    for (int i = 0; i < warps; ++i) ran |= run_warp(nth(i, warps) * kWarp);
    if (!open_barriers() && !ran) throw std::runtime_error(standstill());
  }
  for (size_t i = 0; i < kGuard; ++i) {
    if (shared[shared_size + i] == kGuardByte) continue;
    throw std::runtime_error("shared memory: expected no writes past its " +
                             std::to_string(shared_size) + " bytes, found one at byte " +
                             std::to_string(shared_size + i));
  }
}

bool read_order() {
  const char* const given = std::getenv("GDFAST_CUDA_SIMULATOR_ORDER");
  const std::string order = given == nullptr ? "ascending" : given;
  if (order != "ascending" && order != "descending") {
    throw std::runtime_error("GDFAST_CUDA_SIMULATOR_ORDER: expected ascending or descending, got " +
                             order);
  }
  return order == "descending";
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

}  // namespace

int64_t block_number() { return begun; }

void fail(const std::string& what) {
  if (running == nullptr) throw std::runtime_error(what);
  error = what;
  running->context.switch_to(scheduler);
  std::abort();  // nobody comes back to a fiber with an error
}

void meet_warp(const char* name, void* brought, void (*act)(void* const* lanes)) {
  running->state = State::kAtWarp;
  running->waits_at = name;
  running->brought = brought;
  running->act = act;
  suspend();
}

void meet_threads(int barrier, int threads) {
  if (barrier < 0 || barrier >= kBarriers) fail("barrier: expected 0 to 15");
  if (threads % kWarp != 0 || threads > thread_count) {
    fail("barrier: threads: expected whole warps of the block, got " + std::to_string(threads));
  }
  Barrier& at = barriers[barrier];
  if (at.arrived > 0 && at.expected != threads) {
    fail("barrier " + std::to_string(barrier) + ": expected " + std::to_string(at.expected) +
         " threads as others do, got " + std::to_string(threads));
  }
  at.expected = threads;
  ++at.arrived;
  running->state = State::kAtBarrier;
  running->barrier = barrier;
  suspend();
}

void wait_until(const char* name, bool (*ready)(const void*), const void* argument) {
  if (ready(argument)) return;
  running->state = State::kWaiting;
  running->waits_at = name;
  running->ready = ready;
  running->argument = argument;
  suspend();
}

void copy_later(void* to, const void* from, size_t bytes) {
  std::memset(to, kNaN, bytes);
  running->copies.push_back({to, from, bytes, running->committed});
}

void commit_copies() { ++running->committed; }

void wait_for_copies(int pending) {
  std::vector<Copy>& copies = running->copies;
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (copy.group >= running->committed - pending) {
      copies[kept++] = copy;
    } else if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.bytes);
    } else {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
  copies.resize(kept);
}

void run(const char* op, dim3 grid, unsigned threads, size_t shared_bytes,
         const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const std::string prefix = std::string(op) + ": CUDA simulator: ";
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  try {
    require(threads > 0 && threads <= kMostThreads && threads % kWarp == 0,
            "threads: expected whole warps, at most 1024, got " + std::to_string(threads));
    require(grid.x > 0 && grid.x <= 2147483647u && grid.y > 0 && grid.y <= 65535u && grid.z > 0 &&
                grid.z <= 65535u,
            "grid: expected 1 to 2147483647, 65535, 65535, got " + std::to_string(grid.x) + ", " +
                std::to_string(grid.y) + ", " + std::to_string(grid.z));
    require(shared_bytes <= kMostShared,
            "shared memory: expected at most 232448 bytes, got " + std::to_string(shared_bytes));
    descending = read_order();
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, shared_bytes + kGuard) != 0) throw std::bad_alloc();
    const std::unique_ptr<unsigned char, Free> owner(static_cast<unsigned char*>(memory));
    shared = owner.get();
    shared_size = shared_bytes;
    thread_count = static_cast<int>(threads);
    while (fibers.size() < threads) fibers.emplace_back();
    body = &kernel;
    error.clear();
    gridDim = grid;
    blockDim = dim3(threads);
    const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = descending ? blocks - 1 - i : i;
      blockIdx = dim3(static_cast<unsigned>(block % grid.x),
                      static_cast<unsigned>(block / grid.x % grid.y),
                      static_cast<unsigned>(block / grid.x / grid.y));
      try {
        run_block();
      } catch (const std::runtime_error& thrown) {
        throw std::runtime_error("block (" + std::to_string(blockIdx.x) + ", " +
                                 std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
                                 "): " + thrown.what());
      }
    }
  } catch (const std::runtime_error& thrown) {
    running = nullptr;
    throw std::runtime_error(prefix + thrown.what());
  }
}

}  // namespace simulator

unsigned char* shared_memory() { return simulator::shared; }

}  // namespace gdfast::cuda
