// The C library returns a freed block of more than 32 MB, and any large one at the end of its heap,
// to the operating system at once; the next one is then zeroed and mapped page by page, which costs
// more than many kernels. Here blocks wait in a list for the next request of about their size.
//
// What is held never exceeds the most that was ever in use at once by more than a twentieth: before
// new memory is mapped beyond that, blocks that have waited longest are unmapped.
#include "memory_pool.h"

#include <list>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#ifdef _WIN32
#include <malloc.h>
#else
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace gdfast::cpu {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = 2 << 20;

#ifdef _WIN32
void* map_block(size_t bytes) { return _aligned_malloc(bytes, kPage); }
void unmap_block(void* block, size_t) { _aligned_free(block); }
#else
// On whole huge pages where it is large enough for some: a fault for each 2 MB and few TLB misses.
// The rest behind the last whole one stays on ordinary pages, so that nothing is rounded up.
void* map_block(size_t bytes) {
  const size_t slack = bytes >= kHugePage ? kHugePage : 0;
  void* mapped =
      mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  if (slack > 0) {
    const size_t before = (kHugePage - reinterpret_cast<size_t>(begin) % kHugePage) % kHugePage;
    if (before > 0) munmap(begin, before);
    if (before < slack) munmap(begin + before + bytes, slack - before);
    begin += before;
#ifdef MADV_HUGEPAGE
    madvise(begin, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  return begin;
}
void unmap_block(void* block, size_t bytes) { munmap(block, bytes); }
#endif

class Pool {
 public:
  void* take(size_t wanted) {
    const size_t bytes = (wanted + kPage - 1) / kPage * kPage;
    const std::lock_guard<std::mutex> lock(mutex_);
    taken_ += bytes;
    void* block = take_waiting(bytes);
    if (block == nullptr) {
      if (taken_ > most_taken_) most_taken_ = taken_;
      while (!waiting_.empty() && taken_ + kept_ > most_taken_ + most_taken_ / 20) unmap_oldest();
      block = map_block(bytes);
      if (block == nullptr) {
        while (!waiting_.empty()) unmap_oldest();
        block = map_block(bytes);
      }
      if (block == nullptr) {
        taken_ -= bytes;
        throw std::bad_alloc();
      }
      sizes_[block] = bytes;
    }
    if (taken_ > most_taken_) most_taken_ = taken_;
    return block;
  }

  void give(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = sizes_.at(block);
    taken_ -= bytes;
    kept_ += bytes;
    waiting_.push_back(block);
    by_size_.emplace(bytes, std::prev(waiting_.end()));
  }

  PoolUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {taken_, kept_};
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!waiting_.empty()) unmap_oldest();
    most_taken_ = taken_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  using Waiting = std::list<void*>;  // in the order in which they were given
  using BySize = std::multimap<size_t, Waiting::iterator>;

  // The smallest waiting block that is large enough, unless it is an eighth too large: then most of
  // the difference would be lost to everybody.
  void* take_waiting(size_t bytes) {
    const auto found = by_size_.lower_bound(bytes);
    if (found == by_size_.end() || found->first > bytes + bytes / 8) return nullptr;
    void* block = *found->second;
    kept_ -= found->first;
    taken_ += found->first - bytes;
    waiting_.erase(found->second);
    by_size_.erase(found);
    return block;
  }

  void unmap_oldest() {
    void* block = waiting_.front();
    const size_t bytes = sizes_.at(block);
    auto [found, end] = by_size_.equal_range(bytes);
    while (found != end && *found->second != block) ++found;
    by_size_.erase(found);
    waiting_.pop_front();
    sizes_.erase(block);
    kept_ -= bytes;
    unmap_block(block, bytes);
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> sizes_;  // of every block, in use or waiting
  Waiting waiting_;
  BySize by_size_;
  size_t taken_ = 0, kept_ = 0, most_taken_ = 0;
};

// Never destroyed: tensors may be freed later than this module's variables.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

#ifndef _WIN32
// A fork copies the lock as it is; nobody may be inside while that happens.
const int fork_handlers =
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); },
                   [] { pool().mutex().unlock(); });
#endif

}  // namespace

void* pool_take(size_t bytes) { return pool().take(bytes); }
void pool_give(void* block) { pool().give(block); }
PoolUse pool_use() { return pool().use(); }
void pool_release() { pool().release(); }

}  // namespace gdfast::cpu
