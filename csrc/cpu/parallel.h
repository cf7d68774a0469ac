// Work shared among OpenMP threads: the pool that PyTorch uses too, where both load one libgomp.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>

#include "workspace.h"

namespace gdfast::cpu {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls task(index, thread) for every index below count. Threads take the next index as they come
// free, so a task must not depend on which thread runs it: results stay the same from run to run.
template <typename Task>
void parallel_for(int64_t count, int threads, const Task& task) {
#ifdef _OPENMP
  const int team = static_cast<int>(min_of(count, threads));
  if (team > 1 && !is_forked_child()) {
    // On cache lines of its own: beside it on the stack lies what the tasks read all the time.
    struct alignas(128) {
      int64_t value = 0;
    } next;
#pragma omp parallel num_threads(team)
    {
      const int thread = omp_get_thread_num();
      for (;;) {
        const int64_t index = __atomic_fetch_add(&next.value, 1, __ATOMIC_RELAXED);
        if (index >= count) break;
        task(index, thread);
      }
    }
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t index = 0; index < count; ++index) task(index, 0);
}

// Hands out parts of one Workspace, each aligned to a cache line.
class Carver {
 public:
  // With no memory, it only counts.
  explicit Carver(char* memory = nullptr) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    char* part = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(part);
  }

  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// The scratch of one kernel call: a part that all threads share and one for each thread, both laid
// out by functions that take their pieces from a Carver.
class ThreadScratch {
 public:
  template <typename CarveShared, typename CarveOwn>
  ThreadScratch(int threads, const CarveShared& carve_shared, const CarveOwn& carve_own)
      : ThreadScratch(threads, size_of(carve_shared), size_of(carve_own)) {
    Carver carver(workspace_.data());
    carve_shared(carver);
  }

  Carver of(int thread) const { return Carver(workspace_.data() + shared_ + own_ * thread); }

 private:
  ThreadScratch(int threads, int64_t shared, int64_t own)
      : shared_(shared), own_(own), workspace_(shared + own * threads) {}

  template <typename Carve>
  static int64_t size_of(const Carve& carve) {
    Carver counter;
    carve(counter);
    return counter.used();
  }

  int64_t shared_, own_;
  Workspace workspace_;
};

}  // namespace
}  // namespace gdfast::cpu
