// The C library returns a freed block of more than 32 MB, and any large one at the end of its heap,
// to the operating system at once; the next one is then zeroed and mapped page by page, which costs
// more than many kernels. Here freed blocks stay, and neighbours become one: whatever sizes a step
// asks for in whatever order, it finds the pages that the step before it left.
//
// Blocks are cut from a stretch of address space as large as memory, of which only what was touched
// is memory: of the free ranges the smallest that is large enough. What is held never exceeds the
// most that was ever in use at once by more than an eighth: where fresh pages would, free ones go
// back to the operating system first.
#include "memory_pool.h"

#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef _WIN32
#include <malloc.h>
#else
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace gdfast::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20;
// Address space is opened for use in steps of so much.
constexpr size_t kStep = 64 << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// A stretch of address space; what lies between `begin` and `open` may be used.
struct Stretch {
  char *mapped, *begin, *open, *end;
};

#ifdef _WIN32
size_t page() { return 4096; }
Stretch reserve(size_t bytes) {
  const size_t size = round_up(bytes, kStep);
  char* begin = static_cast<char*>(_aligned_malloc(size, page()));
  return {begin, begin, begin, begin == nullptr ? nullptr : begin + size};
}
void unreserve(const Stretch& stretch) { _aligned_free(stretch.mapped); }
bool open_for_use(char*, size_t) { return true; }
void give_pages_back(char*, size_t) {}
#else
size_t page() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Without access a mapping costs nothing, even where the system counts what could be written.
Stretch reserve(size_t bytes) {
  const size_t least = round_up(bytes, kStep) + kHugePage;
  size_t size = least;
  rlimit limit;
  const bool unlimited = getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur == RLIM_INFINITY;
  const long pages = sysconf(_SC_PHYS_PAGES);
  if (unlimited && pages > 0 && static_cast<size_t>(pages) * page() > least) {
    size = static_cast<size_t>(pages) * page();
  }
  for (;;) {
    void* mapped =
        mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped != MAP_FAILED) {
      char* bytes_mapped = static_cast<char*>(mapped);
      const size_t beyond = reinterpret_cast<size_t>(mapped) % kHugePage;
      char* begin = bytes_mapped + (beyond == 0 ? 0 : kHugePage - beyond);
      return {bytes_mapped, begin, begin, bytes_mapped + size};
    }
    if (size == least) return {};
    size = size / 2 > least ? round_up(size / 2, kHugePage) : least;
  }
}
void unreserve(const Stretch& stretch) {
  munmap(stretch.mapped, static_cast<size_t>(stretch.end - stretch.mapped));
}

// A fault for each 2 MB, and few TLB misses.
bool open_for_use(char* begin, size_t bytes) {
  if (mprotect(begin, bytes, PROT_READ | PROT_WRITE) != 0) return false;
#ifdef MADV_HUGEPAGE
  madvise(begin, bytes, MADV_HUGEPAGE);
#endif
  return true;
}
void give_pages_back(char* begin, size_t bytes) { madvise(begin, bytes, MADV_DONTNEED); }
#endif

class Pool {
 public:
  void* take(size_t wanted) {
    const size_t bytes = round_up(wanted == 0 ? 1 : wanted, page());
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = by_size_.lower_bound({bytes, nullptr});
    if (found == by_size_.end()) {
      grow(bytes);
      found = by_size_.lower_bound({bytes, nullptr});
    }
    char* block = found->second;
    const Range range = remove(free_.find(block));
    // Where in a range its touched pages lie is not known: of a part of it as many are as can be.
    const size_t touched = range.touched < bytes ? range.touched : bytes;
    if (range.bytes > bytes) insert(block + bytes, {range.bytes - bytes, range.touched - touched});
    sizes_[block] = bytes;
    taken_ += bytes;
    if (taken_ > most_taken_) most_taken_ = taken_;
    if (touched < bytes) {
      while (kept_ > 0 && taken_ + kept_ > most_taken_ + most_taken_ / 8) clean_largest();
    }
    return block;
  }

  void give(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sizes_.find(static_cast<char*>(block));
    taken_ -= found->second;
    add_free(found->first, {found->second, found->second});
    sizes_.erase(found);
  }

  PoolUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {taken_, kept_};
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (kept_ > 0) clean_largest();
    most_taken_ = taken_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // A free range, and how much of it may hold pages.
  struct Range {
    size_t bytes, touched;
  };
  using Free = std::map<char*, Range>;

  void insert(char* begin, Range range) {
    free_.emplace(begin, range);
    by_size_.emplace(range.bytes, begin);
    kept_ += range.touched;
  }

  Range remove(Free::iterator it) {
    const Range range = it->second;
    by_size_.erase({range.bytes, it->first});
    kept_ -= range.touched;
    free_.erase(it);
    return range;
  }

  // A range, and its free neighbours in the same stretch, become one.
  void add_free(char* begin, Range range) {
    const auto join = [&](Free::iterator it) {
      const Range other = remove(it);
      range.bytes += other.bytes;
      range.touched += other.touched;
    };
    const auto after = free_.lower_bound(begin);
    if (after != free_.end() && after->first == begin + range.bytes && !begins(after->first)) {
      join(after);
    }
    const auto next = free_.lower_bound(begin);
    if (next != free_.begin() && !begins(begin)) {
      const auto before = std::prev(next);
      if (before->first + before->second.bytes == begin) {
        begin = before->first;
        join(before);
      }
    }
    insert(begin, range);
  }

  bool begins(const char* address) const {
    for (const Stretch& stretch : stretches_) {
      if (stretch.begin == address) return true;
    }
    return false;
  }

  // Makes a free range of at least so many bytes. Throws std::bad_alloc.
  void grow(size_t bytes) {
    if (!stretches_.empty() && open_more(bytes)) return;
    Stretch fresh = reserve(bytes);
    if (fresh.begin == nullptr) {
      unreserve_unused();
      fresh = reserve(bytes);
    }
    if (fresh.begin == nullptr) throw std::bad_alloc();
    stretches_.push_back(fresh);
    if (!open_more(bytes)) throw std::bad_alloc();
  }

  void unreserve_unused() {
    for (size_t i = stretches_.size(); i-- > 0;) {
      const Stretch stretch = stretches_[i];
      const auto it = free_.find(stretch.begin);
      if (it == free_.end() || stretch.begin + it->second.bytes != stretch.open) continue;
      remove(it);
      unreserve(stretch);
      stretches_.erase(stretches_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

  bool open_more(size_t bytes) {
    Stretch& stretch = stretches_.back();
    size_t before = 0;  // what is free at the end already
    if (!free_.empty()) {
      const auto last = free_.lower_bound(stretch.open);
      if (last != free_.begin()) {
        const auto it = std::prev(last);
        if (it->first >= stretch.begin && it->first + it->second.bytes == stretch.open) {
          before = it->second.bytes;
        }
      }
    }
    const size_t room = static_cast<size_t>(stretch.end - stretch.open);
    size_t more = round_up(bytes - before, kStep);
    if (more > room) more = room;
    if (before + more < bytes || !open_for_use(stretch.open, more)) return false;
    char* begin = stretch.open;
    stretch.open += more;
    add_free(begin, {more, 0});
    return true;
  }

  void clean_largest() {
    auto largest = free_.begin();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second.touched > largest->second.touched) largest = it;
    }
    give_pages_back(largest->first, largest->second.bytes);
    kept_ -= largest->second.touched;
    largest->second.touched = 0;
  }

  std::mutex mutex_;
  std::vector<Stretch> stretches_;
  std::unordered_map<char*, size_t> sizes_;     // of the blocks in use
  Free free_;                                   // by address
  std::set<std::pair<size_t, char*>> by_size_;  // the same ranges
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
