// The C library returns a freed block of more than 32 MB, and any large one at the end of its heap,
// to the operating system at once; the next one is then zeroed and mapped page by page, which costs
// more than many kernels. Here freed blocks stay, and neighbours become one: whatever sizes a step
// asks for in whatever order, it finds the pages that the step before it left.
//
// Blocks are cut from stretches of address space, of which only what was touched is memory: of the
// free ranges the smallest that is large enough. What is in use and kept together exceeds the most
// that was ever in use by an eighth at most: where fresh pages would, free ones go back to the
// operating system first. Some orders of sizes leave more between blocks; their steps would give
// pages back and map others anew for ever. So what goes back widens that eighth, up to a quarter.
#include "memory_pool.h"

#include <cstddef>
#include <cstdint>
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
// Address space is opened for use in steps of so much, and reserved in stretches of at least
// kStretch.
constexpr size_t kStep = 64 << 20;
constexpr size_t kStretch = size_t{1} << 30;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// A stretch of address space; what lies between `begin` and `open` may be used.
struct Stretch {
  char *mapped, *begin, *open, *end;
};

#ifdef _WIN32
size_t page() { return 4096; }
Stretch reserve(size_t least, size_t) {
  char* begin = static_cast<char*>(_aligned_malloc(least, page()));
  return {begin, begin, begin, begin == nullptr ? nullptr : begin + least};
}
void unreserve(const Stretch& stretch) { _aligned_free(stretch.mapped); }
bool open_for_use(char*, size_t) { return true; }
void give_pages_back(char*, size_t) {}
#else
size_t page() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Without access a mapping costs nothing, even where the system counts what could be written. But
// it counts for a limit on address space: with one, no more is reserved than what is asked for.
Stretch reserve(size_t least, size_t wanted) {
  rlimit limit;
  const bool limited = getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY;
  least += kHugePage;  // for a beginning at a multiple of it
  for (size_t size = limited || wanted < least ? least : wanted;; size = least) {
    void* mapped =
        mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped != MAP_FAILED) {
      char* first = static_cast<char*>(mapped);
      const size_t beyond = reinterpret_cast<size_t>(mapped) % kHugePage;
      char* begin = first + (beyond == 0 ? 0 : kHugePage - beyond);
      return {first, begin, begin, first + size};
    }
    if (size == least) return {};
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
    if (wanted > SIZE_MAX / 2) throw std::bad_alloc();
    const size_t bytes = round_up(wanted == 0 ? 1 : wanted, page());
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = by_size_.lower_bound({bytes, nullptr});
    if (found == by_size_.end()) {
      grow(bytes);
      found = by_size_.lower_bound({bytes, nullptr});
    }
    char* block = found->second;
    sizes_.emplace(block, bytes);
    cut_front(block, bytes);
    const size_t touched = untouch_front(block, bytes);
    taken_ += bytes;
    if (taken_ > most_taken_) most_taken_ = taken_;
    if (touched < bytes) {
      while (kept_ > 0 && taken_ + kept_ > most_taken_ + most_kept_beyond()) {
        given_back_ += clean_largest();
      }
    }
    return block;
  }

  void give(void* block) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sizes_.find(static_cast<char*>(block));
    const size_t bytes = found->second;
    sizes_.erase(found);
    taken_ -= bytes;
    try {
      add_free(static_cast<char*>(block), bytes);
      touch(static_cast<char*>(block), bytes);
    } catch (const std::bad_alloc&) {
      // No memory even for the list of what is free: the block is lost.
    }
  }

  PoolUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {taken_, kept_};
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (kept_ > 0) clean_largest();
    most_taken_ = taken_;
    given_back_ = 0;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  using Ranges = std::map<char*, size_t>;  // bytes by beginning

  // Joins a range with its neighbours among `ranges`, but for those of another stretch.
  template <typename Removed>
  std::pair<char*, size_t> joined(Ranges& ranges, char* begin, size_t bytes, Removed&& removed) {
    auto after = ranges.lower_bound(begin);
    if (after != ranges.end() && after->first == begin + bytes && !begins(after->first)) {
      bytes += after->second;
      removed(after->first, after->second);
      after = ranges.erase(after);
    }
    if (after != ranges.begin() && !begins(begin)) {
      const auto before = std::prev(after);
      if (before->first + before->second == begin) {
        begin = before->first;
        bytes += before->second;
        removed(before->first, before->second);
        ranges.erase(before);
      }
    }
    return {begin, bytes};
  }

  void add_free(char* begin, size_t bytes) {
    const auto range = joined(free_, begin, bytes,
                              [&](char* other, size_t size) { by_size_.erase({size, other}); });
    free_.insert(range);
    by_size_.emplace(range.second, range.first);
  }

  // Takes the first bytes of the free range that begins there. Nodes are used again, so that
  // nothing is allocated.
  void cut_front(char* begin, size_t bytes) {
    auto range = free_.extract(begin);
    auto sized = by_size_.extract({range.mapped(), begin});
    if (range.mapped() == bytes) return;
    range.key() += bytes;
    range.mapped() -= bytes;
    sized.value() = {range.mapped(), range.key()};
    free_.insert(std::move(range));
    by_size_.insert(std::move(sized));
  }

  // Notes that free bytes may hold pages.
  void touch(char* begin, size_t bytes) {
    touched_.insert(joined(touched_, begin, bytes, [](char*, size_t) {}));
    kept_ += bytes;
  }

  // The reverse, for the front of a free range, where no interval begins earlier. Returns how many
  // of the bytes may hold pages.
  size_t untouch_front(char* begin, size_t bytes) {
    size_t touched = 0;
    for (auto it = touched_.lower_bound(begin); it != touched_.end() && it->first < begin + bytes;
         it = touched_.lower_bound(begin)) {
      auto interval = touched_.extract(it);
      const size_t left = static_cast<size_t>(begin + bytes - interval.key());
      if (interval.mapped() <= left) {
        touched += interval.mapped();
        continue;
      }
      touched += left;
      interval.key() += left;
      interval.mapped() -= left;
      touched_.insert(std::move(interval));
      break;
    }
    kept_ -= touched;
    return touched;
  }

  size_t most_kept_beyond() const {
    const size_t eighth = most_taken_ / 8;
    return eighth + (given_back_ / 4 < eighth ? given_back_ / 4 : eighth);
  }

  // Returns how many bytes went back.
  size_t clean_largest() {
    auto largest = touched_.begin();
    for (auto it = largest; it != touched_.end(); ++it) {
      if (it->second > largest->second) largest = it;
    }
    const size_t bytes = largest->second;
    give_pages_back(largest->first, bytes);
    kept_ -= bytes;
    touched_.erase(largest);
    return bytes;
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
    if (add_stretch(bytes)) return;
    unreserve_unused();
    if (!add_stretch(bytes)) throw std::bad_alloc();
  }

  bool add_stretch(size_t bytes) {
    size_t wanted = kStretch;
    for (const Stretch& stretch : stretches_) {
      wanted += static_cast<size_t>(stretch.end - stretch.mapped);
    }
    stretches_.reserve(stretches_.size() + 1);
    const Stretch fresh = reserve(round_up(bytes, kStep), wanted);
    if (fresh.begin == nullptr) return false;
    stretches_.push_back(fresh);
    if (open_more(bytes)) return true;
    stretches_.pop_back();
    unreserve(fresh);
    return false;
  }

  bool open_more(size_t bytes) {
    Stretch& stretch = stretches_.back();
    size_t before = 0;  // what is free at the end already
    auto last = free_.lower_bound(stretch.open);
    if (last != free_.begin()) {
      --last;
      if (last->first >= stretch.begin && last->first + last->second == stretch.open) {
        before = last->second;
      }
    }
    const size_t room = static_cast<size_t>(stretch.end - stretch.open);
    const size_t least = bytes - before;
    size_t more = round_up(least, kStep);
    if (more > room) more = room;
    if (more < least) return false;
    if (!open_for_use(stretch.open, more)) {
      more = least;
      if (!open_for_use(stretch.open, more)) return false;
    }
    char* begin = stretch.open;
    stretch.open += more;
    add_free(begin, more);
    return true;
  }

  void unreserve_unused() {
    for (size_t i = stretches_.size(); i-- > 0;) {
      const Stretch stretch = stretches_[i];
      const auto it = free_.find(stretch.begin);
      if (it == free_.end() || stretch.begin + it->second != stretch.open) continue;
      const size_t bytes = it->second;
      cut_front(stretch.begin, bytes);
      untouch_front(stretch.begin, bytes);
      unreserve(stretch);
      stretches_.erase(stretches_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

  std::mutex mutex_;
  std::vector<Stretch> stretches_;
  std::unordered_map<char*, size_t> sizes_;     // of the blocks in use
  Ranges free_;                                 // what may be given out
  std::set<std::pair<size_t, char*>> by_size_;  // the same
  Ranges touched_;                              // the parts of it that may hold pages
  size_t taken_ = 0, kept_ = 0, most_taken_ = 0;
  size_t given_back_ = 0;  // to make room for fresh pages, since release()
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
