// Work of which every thread has a share of its own, so that kernels after one another find in the
// cache of each core what the same thread has put there.
#pragma once

#include "parallel.h"

namespace gdfast::cpu {
namespace {

// As parallel_for, where thread t of T begins with indices [t * count / T, (t + 1) * count / T) and
// then helps those that are behind. A line of memory that another core has written takes as long to
// read as hundreds of multiplications: kernels that hand large tensors over to each other should
// agree on whose index has which part of them. A thread calls start(thread) before its first task.
template <typename Start, typename Task>
void parallel_shares(int64_t count, int threads, const Start& start, const Task& task) {
#ifdef _OPENMP
  const int team = static_cast<int>(min_of(count, threads));
  if (team > 1 && !is_forked_child()) {
    struct alignas(64) Share {  // a cache line of its own
      int64_t next, end;
    };
    const Workspace memory(team * sizeof(Share));
    Share* const shares = Carver(memory.data()).take<Share>(team);
    for (int t = 0; t < team; ++t) shares[t] = {t * count / team, (t + 1) * count / team};
#pragma omp parallel num_threads(team)
    {
      const int thread = omp_get_thread_num();
      bool started = false;
      for (int turn = 0; turn < team; ++turn) {
        Share& share = shares[(thread + turn) % team];
        while (__atomic_load_n(&share.next, __ATOMIC_RELAXED) < share.end) {
          const int64_t index = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
          if (index >= share.end) break;
          if (!started) start(thread);
          started = true;
          task(index, thread);
        }
      }
    }
    return;
  }
#else
  (void)threads;
#endif
  if (count > 0) start(0);
  for (int64_t index = 0; index < count; ++index) task(index, 0);
}

template <typename Task>
void parallel_shares(int64_t count, int threads, const Task& task) {
  parallel_shares(count, threads, [](int) {}, task);
}

}  // namespace
}  // namespace gdfast::cpu
